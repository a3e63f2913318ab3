"""What a trial's line and the live table say: a trial over the limit of accuracy on a few items has only been ranked."""

from __future__ import annotations

import io
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
