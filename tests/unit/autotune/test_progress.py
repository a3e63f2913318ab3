"""What a trial's line and the live table say: a trial over the limit of accuracy on a few items has only been ranked."""

from __future__ import annotations

import io
import threading
import time
from typing import Any

import pytest
from rich.console import Console

from sere_autotune.progress import Progress
from sere_autotune.words import over_limits

ROW: dict[str, Any] = {
    "number": 1, "policy": "oea S=2", "exact": False, "tpotMs": 20.23, "accuracy": 0.9896, "dropPoints": 1.0417, "items": 96,
    "active": 19.4, "broken": ["accuracy"], "stopped": None, "error": None,
}  # fmt: skip


def shown(row: dict[str, Any], *, terminal: bool = False) -> str:
    screen = io.StringIO()
    console = Console(file=screen, width=160, force_terminal=terminal, color_system=None)
    progress = Progress(console, "sere tune m")
    progress.trial(row)
    if terminal:
        console.print(progress._draw())
    return screen.getvalue()


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.s = 100.0

    def __call__(self) -> float:
        return self.s


def test_a_silent_log_says_at_most_once_a_minute_what_runs_and_for_how_long() -> None:
    clock, screen = Clock(), io.StringIO()
    progress = Progress(Console(file=screen, width=160), "sere tune m", clock=clock)

    def lines(until: float) -> list[str]:
        screen.truncate(screen.seek(0))
        while clock.s < until:
            clock.s += 1
            progress.beat()
        return screen.getvalue().splitlines()

    progress.stage("starting the engine", 8)
    assert lines(109) == []
    assert lines(169) == ['  at work for 10 s since "starting the engine"']
    assert lines(170) == ['  at work for 70 s since "starting the engine"']
    progress.step("block 1 of [8] done", 100)
    assert lines(229) == [], "one line a minute, however often the run falls silent"
    assert lines(240) == ['  at work for 60 s since "block 1 of [8] done", about 40 s left']
    assert lines(300) == ['  at work for 120 s since "block 1 of [8] done"'], "longer than was expected"


def test_a_run_in_a_log_beats_by_itself_and_stops_with_its_end() -> None:
    clock, screen = Clock(), io.StringIO()
    with Progress(Console(file=screen), "sere tune m", clock=clock) as progress:
        (thread,) = [found for found in threading.enumerate() if found.name == "progress"]
        progress.stage("search", 8)
        clock.s += 11
        for _ in range(50):
            if "at work for 11 s" in screen.getvalue():
                break
            time.sleep(0.1)
        assert 'at work for 11 s since "search"' in screen.getvalue()
    thread.join(5)
    assert not thread.is_alive()


def test_the_live_table_counts_the_seconds_of_what_runs_and_those_that_are_left() -> None:
    clock = Clock()
    progress = Progress(Console(file=io.StringIO(), force_terminal=True, width=160), "sere tune m", clock=clock)
    progress.step("trial 0: exact", 200)
    progress.name = "search"
    clock.s += 34
    screen = io.StringIO()
    Console(file=screen, width=160).print(progress._draw())
    shown = screen.getvalue()
    assert "sere tune m" in shown and "accuracy" not in shown, "no empty table before the first trial"
    assert "search: trial 0: exact, 34 s; 34 s in all, about 3 min left" in shown


def test_a_trial_over_the_limit_of_accuracy_says_what_one_answer_is_and_that_it_only_ranks() -> None:
    text = shown(ROW)
    assert "-1.04 points  over the limit of accuracy on 96 items, where one answer is 1.04 points; a trial only ranks" in text


def test_the_live_table_says_it_once_below_the_trials() -> None:
    text = shown(ROW, terminal=True)
    assert "Trials only rank: on 96 items one answer is 1.04 points. Held-out items decide." in " ".join(text.split())
    exact = {**ROW, "exact": True, "items": 0, "broken": []}
    assert "only rank" not in shown(exact, terminal=True), "nothing was compared yet"


@pytest.mark.parametrize(
    ("broken", "items", "words"),
    [
        (["tpot.p95"], 96, "over the limit of tpot.p95"),
        (["tpot.p95", "failures"], 96, "over the limit of tpot.p95, failures"),
        (
            ["accuracy", "tpot.p95"],
            500,
            "over the limit of tpot.p95, accuracy on 500 items, where one answer is 0.20 points; a trial only ranks",
        ),
        (["accuracy"], 0, "over the limit of accuracy"),
    ],
)
def test_only_the_limit_of_accuracy_depends_on_the_items(broken: list[str], items: int, words: str) -> None:
    assert over_limits(broken, items) == words
