"""A trial's figures and its place in the search: items with partners, failed requests, an engine that dies of a block."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sere_autotune.outcome import Ending
from sere_autotune.trial.load import Block, Sent
from sere_autotune.trial.measures import Answer, answers, constraints, summarise
from sere_ext.contract.errors import EngineCrashError, UsageError
from tests.kit.planted import PlantedEngine, Quiet, run, spec_for, write_items


def sent(item: str | None, correct: bool | None, error: str | None = None, tokens: int = 4) -> Sent:
    return Sent(item, correct, "", 0 if error else tokens, 10.0, 40.0, 0.0, 0.04, error=error)


def test_failures_that_exact_routing_shares_are_no_fault_of_the_policy() -> None:
    exact = answers([sent("a", True), sent("b", None, "too long"), sent("c", True)])
    assert set(exact) == {"a", "c"}
    level = summarise(0, Block([sent("a", True), sent("b", None, "ValueError: too long")], 1.0), exact)
    assert (level.failures, level.shared_failures, level.first_error) == (1, 1, "ValueError: too long")
    assert (level.accuracy, level.items, level.losses) == (1.0, 1, 0)
    assert constraints([level], [], 0.01, 0.0)["failures"] <= 0
    own = summarise(0, Block([sent("a", True), sent("c", None, "ValueError: no")], 1.0), exact)
    assert constraints([own], [], 0.01, 0.0)["failures"] == 0.5


def test_a_trial_without_partners_is_undecided_and_not_feasible() -> None:
    level = summarise(0, Block([sent("a", True), sent("b", True)], 1.0), {"z": Answer(True, "")})
    assert level.items == 0
    assert constraints([level], [], 0.01, 0.0)["accuracy"] > 0
    assert constraints([level], [], 0.01, 0.0, is_exact=True)["accuracy"] <= 0


class Changed(PlantedEngine):
    """Changes what the planted engine would have answered."""

    def __init__(self, change: Any) -> None:
        super().__init__()
        self.change = change

    def block(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        report = super().block(requests, *args, **kwargs)
        report.block.sent = self.change(report.block.sent)
        return report


@pytest.fixture
def items(tmp_path: Path) -> Path:
    return write_items(tmp_path / "items.jsonl", 6000)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda s: replace(s, correct=None, error="ValueError: no tokenizer", tokens=0),
            "every request failed: ValueError: no token",
        ),
        (lambda s: replace(s, tokens=1), r"no timed answer has two tokens .* raise accuracy.tasks.N.maxTokens, or give workload"),
    ],
)
def test_an_exact_trial_that_shows_nothing_ends_with_what_to_do(tmp_path: Path, items: Path, change: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        run(spec_for(tmp_path / "out", items), Changed(lambda block: [change(s) for s in block]))


def test_a_bad_item_is_printed_and_does_not_keep_a_study_from_its_end(tmp_path: Path, items: Path) -> None:
    """Every 500th prompt is refused by the engine, under exact routing as under any other."""

    def refuse(block: list[Sent]) -> list[Sent]:
        return [
            replace(s, correct=None, error="ValueError: too long", tokens=0) if int(s.item or "0", 16) % 500 == 0 else s
            for s in block
        ]

    report = Quiet()
    finished = run(spec_for(tmp_path / "out", items, search__trials=8, slo__maxFailureShare=0.05), Changed(refuse), report)
    assert finished.outcome.ending is Ending.CHOSEN, finished.outcome.message
    assert "ValueError: too long" in {row["error"] for row in report.rows}
    assert not any("failures" in row["broken"] for row in report.rows)


class Slow(PlantedEngine):
    """Answers one request a second: a block holds what its time allows."""

    def block(self, requests: Any, load: Any, fillers: Any = (), deadline_s: Any = None, *args: Any, **kwargs: Any) -> Any:
        report = super().block(requests[: int(deadline_s)], load, fillers, deadline_s, *args, **kwargs)
        report.block.seconds = float(len(report.block.sent))
        return report


def test_a_slow_engines_trials_have_partners_and_their_windows_move_on(tmp_path: Path, items: Path) -> None:
    """Exact routing answers 120 of the 1,000 items; a trial answers 60 of its 500."""
    asked: list[set[str]] = []

    class Watched(Slow):
        def block(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            report = super().block(requests, *args, **kwargs)
            if self.policy.buckets:
                asked.append({s.item for s in report.block.sent})
            return report

    spec = spec_for(tmp_path / "out", items, search__trials=6, search__trialSeconds=60, accuracy__searchItems=1000)
    finished = run(spec, Watched())
    trials = finished.summary["trials"]
    assert all(0 < trial["items"] <= 60 for trial in trials[1:])
    ranked = asked[: len(trials) - 1]
    assert len(set.union(*ranked)) > 100, "all that exact routing answered are used, not the same sixty again"


class Dying(PlantedEngine):
    """Dies in the given blocks, counted from 1, and is whole again when it is asked for the next."""

    def __init__(self, *deaths: int) -> None:
        super().__init__()
        self.deaths, self.calls = deaths, 0

    def block(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls in self.deaths:
            raise EngineCrashError("killed")
        return super().block(*args, **kwargs)


def test_a_trial_whose_engine_dies_once_is_repeated_on_a_new_one(tmp_path: Path, items: Path) -> None:
    sound = run(spec_for(tmp_path / "sound", items), PlantedEngine()).summary["trials"]
    report = Quiet()
    finished = run(spec_for(tmp_path / "out", items), Dying(1, 4, 9), report)
    assert not any(trial["crash"] for trial in finished.summary["trials"])
    assert [t["policy"] for t in finished.summary["trials"]] == [t["policy"] for t in sound]
    assert finished.outcome.ending is Ending.CHOSEN
