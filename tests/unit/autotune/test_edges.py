"""Harm at the edges of what a policy applies to: which loads are asked, the verdict, and whole studies on an engine that breaks there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sere_autotune.certify.edges import judged, loads
from sere_autotune.outcome import Ending
from sere_autotune.result import screen
from sere_autotune.study.schema import Verdict
from sere_autotune.trial.engine import BlockReport
from sere_autotune.trial.items import load_items, split
from sere_autotune.trial.load import Load, Request
from sere_autotune.trial.measures import Pairs
from sere_ext.contract.errors import BudgetExhaustedError, EngineCrashError
from sere_ext.contract.policy import EXACT_POLICY, Policy
from tests.kit.planted import PlantedEngine, Quiet, run, spec_for, write_items


def policy(*ranges: tuple[int, int], kind: str = "topk") -> Policy:
    return Policy.model_validate(
        {"buckets": [{"minTokens": low, "maxTokens": high, "kind": kind, "S": 2} for low, high in ranges]}
    )


@pytest.mark.parametrize(
    ("ranges", "tuned", "tokens", "most", "expected"),
    [
        ([(8, 64)], [16], 1.0, 32, [8, 32]),  # the engine runs no more than 32
        ([(8, 64)], [16], 1.0, 0, [8, 64]),
        ([(8, 128)], [16], 1.0, 0, [8, 64]),  # four times the tuned load, where nobody knows what the engine runs
        ([(16, 64)], [16], 1.0, 64, [64]),
        ([(16, 17)], [16], 1.0, 64, []),
        ([(8, 64)], [16], 4.0, 64, [2]),  # three drafts a request: 64 tokens are the tuned load
        ([(1, 4), (5, 64)], [2, 16], 1.0, 64, [1, 4, 5, 64]),
        ([(8, 32), (33, 64)], [16, 64], 1.0, 64, [8, 32]),  # 32 and 33 are one load
    ],
)
def test_the_loads_are_those_of_the_smallest_and_largest_steps(
    ranges: list[tuple[int, int]], tuned: list[float], tokens: float, most: int, expected: list[int]
) -> None:
    assert loads(policy(*ranges), tuned, tokens, most) == expected


def test_exact_buckets_have_no_edges() -> None:
    mixed = Policy.model_validate({
        "buckets": [{"minTokens": 2, "maxTokens": 15, "kind": "exact"}, {"minTokens": 16, "maxTokens": 64, "kind": "topk", "S": 2}]
    })  # fmt: skip
    assert loads(mixed, [16], 1.0, 64) == [64]
    assert loads(EXACT_POLICY, [16], 1.0, 64) == []


def seen(n: int, losses: int, gains: int = 0) -> Pairs:
    found = Pairs()
    found.n, found.losses, found.gains = n, losses, gains
    return found


def test_few_losses_show_nothing_and_many_fail_the_candidate() -> None:
    passed = Verdict("passed", "p = 0.01 on 1,000 items")
    found = judged(passed, [(8, seen(96, 2)), (32, seen(96, 0))], 0.01)
    assert found.verdict == "passed" and [part.harmed for part in found.parts] == [False, False]
    found = judged(passed, [(8, seen(96, 9, 1)), (32, seen(96, 0))], 0.01)
    assert found.verdict == "accuracy" and [part.harmed for part in found.parts] == [True, False]
    assert found.reason.startswith(
        "-8.33 points at 8 requests at a time, where the policy applies too, shown to be over the limit"
    )
    assert judged(passed, [], 0.01) == passed


def test_a_single_edge_may_be_less_sure_than_one_of_four() -> None:
    """Four losses in 96 have p = 0.016 at a limit of 1 point: enough for one edge, too little for one of four."""
    passed = Verdict("passed", "")
    assert judged(passed, [(8, seen(96, 4))], 0.01).verdict == "accuracy"
    assert judged(passed, [(load, seen(96, 4 if load == 8 else 0)) for load in (2, 4, 8, 64)], 0.01).verdict == "passed"


class Edged(PlantedEngine):
    """Breaks, or dies, where it is asked at loads other than 16 under the policies that `bad` tells."""

    def __init__(self, bad: Callable[[Policy, int], bool], dies: bool = False) -> None:
        super().__init__(most_requests=32)
        self.bad, self.dies = bad, dies
        self.asked: list[tuple[str, int]] = []
        self.lost = 0.0

    def right(self, prompt: str, lost: float, gained: float) -> bool:
        return super().right(prompt, max(lost, self.lost), gained)

    def block(self, requests: Any, load: Load, *rest: Any, **named: Any) -> BlockReport:
        self.lost = 0.0
        if load.concurrency != 16:
            self.asked.append((self.policy.digest, load.concurrency))
            if self.bad(self.policy, load.concurrency):
                self.lost = 0.3
                if self.dies:
                    raise EngineCrashError("planted")
        requests_: list[Request] = list(requests)
        return super().block(requests_, load, *rest, **named)


def study(tmp_path: Path, engine: Edged, report: Quiet | None = None, **changes: Any) -> Any:
    tmp_path.mkdir(exist_ok=True)
    items = write_items(tmp_path / "items.jsonl", 4000)
    return run(spec_for(tmp_path / "out", items, search__trials=8, **changes), engine, report)


def chosen(finished: Any) -> Policy:
    assert finished.outcome.ending is Ending.CHOSEN, finished.outcome.message
    return Policy.parse(finished.profile["spec"]["policy"])


def test_the_chosen_policy_is_asked_at_its_edges_and_the_screen_says_what_was_seen(tmp_path: Path) -> None:
    engine = Edged(lambda *_: False)
    best = chosen(finished := study(tmp_path, engine))
    assert engine.asked == [(best.digest, 8), (best.digest, 32)]
    result = finished.summary["ladder"][finished.summary["chosen"] - 1]["result"]
    assert [(part["kind"], part["name"], part["harmed"]) for part in result["parts"]] == [
        ("edge", "8 requests at a time", False),
        ("edge", "32 requests at a time", False),
    ]
    lines = screen.parts(result)
    assert [line.split(", where")[0] for line in lines] == [f"harm check at {load} requests at a time" for load in (8, 32)]
    assert all(line.endswith(" gained: no harm shown") for line in lines)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "harm check at 8 requests at a time" in page and "certifies nothing" in page
    again = Edged(lambda *_: True)
    assert chosen(study(tmp_path, again)) == best and not again.asked  # what a finished study found stays


def test_a_policy_that_breaks_at_an_edge_gives_way_to_a_safer_one(tmp_path: Path) -> None:
    fastest = chosen(study(tmp_path / "a", Edged(lambda *_: False)))
    engine = Edged(lambda policy, load: policy == fastest and load == 8)
    finished = study(tmp_path / "b", engine)
    safer = chosen(finished)
    assert safer != fastest and {digest for digest, _ in engine.asked} == {fastest.digest, safer.digest}
    verdicts = {row["describe"]: row["verdict"] for row in finished.summary["ladder"]}
    assert verdicts[fastest.describe()] == "accuracy" and verdicts[safer.describe()] == "passed"


def test_where_every_policy_breaks_at_an_edge_nothing_is_chosen_and_the_reason_is_named(tmp_path: Path) -> None:
    finished = study(tmp_path, Edged(lambda policy, load: load == 32))
    assert finished.outcome.ending is Ending.INFEASIBLE and finished.profile is None
    assert "points at 32 requests at a time, where the policy applies too" in finished.outcome.message
    assert "search.buckets" in finished.outcome.message


def test_a_policy_that_the_engine_dies_of_at_an_edge_is_not_chosen(tmp_path: Path) -> None:
    fastest = chosen(study(tmp_path / "a", Edged(lambda *_: False)))
    finished = study(tmp_path / "b", Edged(lambda policy, load: policy == fastest, dies=True))
    assert chosen(finished) != fastest
    row = next(row for row in finished.summary["ladder"] if row["describe"] == fastest.describe())
    assert row["verdict"] == "crashed" and "at 8 requests at a time" in row["result"]["reason"]


def test_a_spent_budget_leaves_edges_out_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sere_autotune.certify import stage

    real = stage.edges.without_harm

    def late(run: Any, *rest: Any) -> int | None:
        run.left_s = lambda: 1.0
        try:
            return real(run, *rest)
        finally:
            del run.left_s

    monkeypatch.setattr(stage.edges, "without_harm", late)
    report, engine = Quiet(), Edged(lambda *_: True)
    chosen(study(tmp_path, engine, report))
    assert not engine.asked
    assert [step for step in report.steps if "not asked, since the budget is spent" in step]


def test_a_budget_that_ends_in_the_middle_of_an_edge_keeps_the_certificate(tmp_path: Path) -> None:
    class Spent(Edged):
        def block(self, requests: Any, load: Load, *rest: Any, **named: Any) -> BlockReport:
            if load.concurrency == 32:
                raise BudgetExhaustedError("the budget ran out while the engine was running a block")
            return super().block(requests, load, *rest, **named)

    report = Quiet()
    finished = study(tmp_path, Spent(lambda *_: False), report)
    chosen(finished)
    assert "32 requests at a time: not asked, since the budget is spent" in report.steps
    parts = finished.summary["ladder"][finished.summary["chosen"] - 1]["result"]["parts"]
    assert [part["name"] for part in parts] == ["8 requests at a time"]


def test_a_policy_under_which_requests_fail_at_an_edge_is_not_chosen(tmp_path: Path) -> None:
    """No answer is no loss: "0 of 0 answers lost" would be no harm shown."""

    class Refusing(Edged):
        def block(self, requests: Any, load: Load, *rest: Any, **named: Any) -> BlockReport:
            report = super().block(requests, load, *rest, **named)
            if load.concurrency == 32:
                sent = [replace(s, correct=None, text="", error="RuntimeError: no room") for s in report.block.sent]
                report = replace(report, block=replace(report.block, sent=sent))
            return report

    finished = study(tmp_path, Refusing(lambda *_: False))
    assert finished.outcome.ending is Ending.INFEASIBLE and finished.profile is None
    reasons = {row["verdict"]: row["result"]["reason"] for row in finished.summary["ladder"]}
    assert reasons["failures"].startswith("100.00% of requests failed at 32 requests at a time")


class SafestIsFastest(Edged):
    """The safest candidate of the ladder is measured fastest on held-out items, and breaks at its edges."""

    def __init__(self, safest: Policy, searched: set[str]) -> None:
        super().__init__(lambda policy, _: policy == safest)
        self.safest, self.searched = safest, searched

    def block(self, requests: Any, load: Load, *rest: Any, **named: Any) -> BlockReport:
        held_out = any(request.prompt not in self.searched for request in requests)
        self.tpot_ms = 8.0 if self.policy == self.safest and held_out else 20.0
        return super().block(requests, load, *rest, **named)


@pytest.mark.parametrize("advisory", [False, True])
def test_where_nothing_safer_is_left_the_harm_is_named_and_nothing_that_showed_it_is_given(
    tmp_path: Path, advisory: bool
) -> None:
    first = study(tmp_path / "a", Edged(lambda *_: False))
    ladder = [Policy.parse(row["policy"]) for row in first.summary["ladder"]]
    assert len(ladder) > 1
    accuracy = spec_for(tmp_path / "a" / "out", tmp_path / "a" / "items.jsonl").accuracy
    searched = {item.prompt for item in split(load_items(accuracy), accuracy.search_items)[0]}
    path = tmp_path / "b"
    path.mkdir()
    spec = spec_for(path / "out", write_items(path / "items.jsonl", 4000), search__trials=8)
    finished = run(spec, SafestIsFastest(ladder[0], searched), advisory=advisory)
    assert finished.summary["ladder"][0]["verdict"] == "accuracy"
    if advisory:
        assert finished.outcome.advisory and finished.profile["spec"]["evidence"]["certified"] is False
        assert Policy.parse(finished.profile["spec"]["policy"]) != ladder[0]
    else:
        assert finished.outcome.ending is Ending.INFEASIBLE
        assert "where the policy applies too, shown to be over the limit" in finished.outcome.message
        assert "passed too, but a safer one showed harm" in screen.lines(finished.summary)
