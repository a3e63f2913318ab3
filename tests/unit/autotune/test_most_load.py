"""The closing bisection: which loads are tried on curves of every shape, and the stage on an engine whose TPOT grows with the load."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sere_autotune import plan_text, planner
from sere_autotune.certify.most_load import STEP, broken, found, grid, next_load, sentence
from sere_autotune.outcome import Ending
from sere_autotune.prepare import prepare
from sere_autotune.result import screen
from sere_autotune.study.schema import MOST_LOAD, OUTCOME, Interval, LoadProbe, MeasuredBlock, MostLoad, Pace
from sere_autotune.study.study import TuningStudy
from sere_autotune.trial.engine import BlockReport
from sere_autotune.trial.items import load_items, split
from sere_autotune.trial.load import Load, Request
from sere_ext.contract.errors import BudgetExhaustedError, EngineCrashError
from sere_ext.contract.policy import EXACT_POLICY, Policy
from tests.kit.planted import PlantedEngine, Quiet, run, spec_for, truth, write_items

TARGET = 36.0  # mean TPOT of exact routing at the tuned load, in ms


def searched(loads: list[float], curve: Callable[[float], float]) -> list[LoadProbe]:
    """The loads that are tried where the policy's TPOT is `curve` of the load."""
    probes: list[LoadProbe] = []
    while (load := next_load(loads, curve(loads[0]), TARGET, probes)) is not None:
        assert load in loads[1:] and load not in {probe.load for probe in probes}, "each load is tried once"
        probes.append(LoadProbe(load, curve(load), "" if curve(load) <= TARGET else "slower"))
    return probes


def test_the_grid_has_whole_requests_and_steps_of_at_most_an_eighth() -> None:
    assert grid(16, 32, whole=True) == [16, 18, 20, 22, 24, 26, 29, 32]
    assert grid(16, None, whole=True)[-1] == 64, "four times the tuned load where nobody knows what the engine can run"
    assert grid(1, 256, whole=True) == [1, 2, 3, 4]
    assert grid(16, 16, whole=True) == grid(16, 8, whole=True) == [16]
    rates = grid(3.0, 7.0, whole=False)
    assert (rates[0], rates[-1]) == pytest.approx((3.0, 7.0))
    assert all(1 < b / a <= STEP for a, b in itertools.pairwise(rates))


def test_where_the_top_holds_nothing_else_is_tried() -> None:
    loads = grid(16, 32, whole=True)
    assert [probe.load for probe in searched(loads, lambda load: 20.0)] == [32]
    assert found(loads, searched(loads, lambda load: 20.0))[0] == 32


@pytest.mark.parametrize("power", [0.2, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("at", [1.03, 1.3, 1.9, 3.2])
def test_a_power_of_the_load_is_solved_in_few_blocks(power: float, at: float) -> None:
    loads = grid(16, None, whole=True)
    probes = searched(loads, lambda load: TARGET * (load / 16 / at) ** power)
    wanted = max(load for load in loads if load <= 16 * at)
    assert found(loads, probes)[:1] == [load for load in [wanted] if load > 16]
    assert len(probes) <= 3


def test_a_curve_of_another_shape_takes_no_more_than_a_bisection() -> None:
    """Flat, then steep at each place in turn: the crossing of a straight line is far off."""
    loads = grid(16, None, whole=True)
    for steep in loads[1:]:
        probes = searched(loads, lambda load, steep=steep: 20.0 if load < steep else 500.0)
        assert len(probes) <= 7
        assert found(loads, probes)[:1] == [load for load in loads[1:] if load < steep][-1:]


def test_a_noisy_curve_ends_and_what_is_found_held_below_what_did_not() -> None:
    loads = grid(16, None, whole=True)
    for seed in range(200):
        noise = random.Random(seed)
        seen: dict[float, float] = {}

        def curve(load: float, noise: random.Random = noise, seen: dict[float, float] = seen) -> float:
            return seen.setdefault(load, 20 * (load / 16) ** 0.7 * noise.lognormvariate(0, 0.3))

        probes = searched(loads, curve)
        assert len(probes) <= 7
        best = found(loads, probes)
        held = [probe.load for probe in probes if probe.holds]
        assert not best or best[0] in held
        assert all(best and load <= best[0] for load in held if load < min((p.load for p in probes if not p.holds), default=99))


def test_a_load_that_breaks_a_limit_is_bisected_though_its_tpot_is_low() -> None:
    loads = grid(16, None, whole=True)
    probes = [LoadProbe(64, 25.0, "TTFT p99 was 6000.0 ms, above the limit of 5000 ms")]
    assert next_load(loads, 20.0, TARGET, probes) == loads[(len(loads) - 1) // 2]


def measured(tpot_ms: float, ttft_ms: float, failures: int = 0) -> MeasuredBlock:
    latency = {"tpot": [tpot_ms] * 20, "ttft": [ttft_ms] * 20, "e2el": [ttft_ms + 50 * tpot_ms] * 20}
    return MeasuredBlock(0, 0, "chosen", [], "", [], latency, 1.0, 20, failures, 51.0)


def test_limits_failures_and_requests_that_only_wait_are_named() -> None:
    exact = [measured(36, 100)]
    limits = [("tpot", "p95", 50.0), ("ttft", "p99", 5000.0)]
    assert broken([measured(30, 200)], exact, limits, 0.0) == ""
    assert "5.0% of requests failed" in broken([measured(30, 200, 1)], exact, limits, 0.01)
    assert "TPOT p95 was 60.0 ms, above the limit of 50 ms" in broken([measured(60, 200)], exact, limits, 0.0)
    assert "TTFT p99 was 6000.0 ms" in broken([measured(30, 6000)], exact, limits, 0.0)
    assert "waited 40% of their time for the first token, 5% under" in broken([measured(30, 1000)], exact, limits, 0.0)


def test_the_sentence_says_what_was_measured_and_that_accuracy_was_not() -> None:
    most = MostLoad(16, False, 31, False, Interval(1.02, 0.99, 1.05, 3), {"exact": 36.0, "chosen": 35.2})
    assert sentence(most) == (
        "31 requests at a time (1.94x) at mean TPOT 35.2 ms, where exact routing has 36.0 ms at 16 "
        "(exact / chosen 1.02 [0.99, 1.05], 3 pairs); accuracy is certified at 16 requests at a time"
    )
    assert sentence(MostLoad(16, False, 32, True, most.ratio, most.tpot_ms)).startswith("at least 32 requests at a time (2.00x)")
    assert sentence(MostLoad(2.5, True, 2.5, reason="at 2.8 it was slower")).startswith(
        "no more than the tuned 2.5 requests/s was shown"
    )
    assert sentence(MostLoad(16, False, reason="deviceHours 1 is spent")) == "not measured: deviceHours 1 is spent"


@pytest.fixture
def items(tmp_path: Path) -> Path:
    return write_items(tmp_path / "items.jsonl", 6000)


def seeking(tmp_path: Path, items: Path, **changes: Any) -> Any:
    return spec_for(tmp_path / "out", items, certify__mostLoad=True, **changes)


class Watched(PlantedEngine):
    """Keeps what every block was asked."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.asked: list[tuple[Policy, Load, list[str]]] = []

    def block(self, requests: Any, load: Load, *rest: Any, **options: Any) -> BlockReport:
        self.asked.append((self.policy, load, [request.prompt for request in requests]))
        return super().block(requests, load, *rest, **options)


def test_the_most_load_is_found_confirmed_and_shown(tmp_path: Path, items: Path) -> None:
    engine, report = Watched(crowding=0.7), Quiet()
    finished = run(seeking(tmp_path, items), engine, report)
    assert finished.outcome.ending is Ending.CHOSEN
    summary = finished.summary
    found = summary["mostLoad"]
    policy = Policy.parse(summary["ladder"][summary["chosen"] - 1]["policy"])
    right = 16 * truth(policy)[2] ** (1 / 0.7)
    assert right / 1.2 <= found["load"] <= right * 1.04
    assert found["ratio"]["pairs"] == 3
    assert found["ratio"]["value"] >= 1
    assert found["times"] == found["load"] / 16
    assert not found["at_least"]
    for text in (screen.lines(summary), (tmp_path / "out" / "report.html").read_text(), "\n".join(report.steps)):
        assert f"{found['load']:g} requests at a time ({found['times']:.2f}x)" in text
    first = next(index for index, (_, load, _) in enumerate(engine.asked) if load.concurrency > 16)
    accuracy = seeking(tmp_path, items).accuracy
    held_out = {item.prompt for item in split(load_items(accuracy), accuracy.search_items)[1]}
    opened = [index for index, (_, _, prompts) in enumerate(engine.asked) if held_out & set(prompts)]
    assert opened and opened[-1] < first, "the certificate's items are not opened again"
    pairs = engine.asked[-6:]
    assert [asked[0] == EXACT_POLICY for asked in pairs] == [True, False, False, True, True, False]
    assert [asked[1].concurrency for asked in pairs if asked[0] == EXACT_POLICY] == [16] * 3
    assert all(len(prompts) == load.concurrency for _, load, prompts in pairs), (
        "each place answers one request, none is left over"
    )


def test_an_open_loop_finds_a_rate_and_the_engine_caps_it(tmp_path: Path, items: Path) -> None:
    load = {"workload__load__requestsPerSecond": 20}
    found = run(seeking(tmp_path, items, **load), PlantedEngine(crowding=0.5)).summary["mostLoad"]
    assert 20 < found["load"] < 80
    assert found["open_loop"]
    capped = run(spec_for(tmp_path / "capped", items, certify__mostLoad=True, **load), PlantedEngine(most_requests=10)).summary
    assert capped["mostLoad"]["at_least"]
    assert capped["mostLoad"]["load"] == pytest.approx(10 / 0.35, rel=0.05), "a request takes 50 + 15 * 20 ms under exact routing"


def test_the_top_is_what_the_engine_runs_at_once(tmp_path: Path, items: Path) -> None:
    found = run(seeking(tmp_path, items), PlantedEngine(most_requests=24)).summary["mostLoad"]
    assert (found["load"], found["at_least"]) == (24, True)
    full = run(spec_for(tmp_path / "full", items, certify__mostLoad=True), PlantedEngine(most_requests=16)).summary["mostLoad"]
    assert full["load"] is None
    assert "no more requests at once than the tuned load" in full["sentence"]


class Failing(PlantedEngine):
    """Fails with an error in the blocks above the tuned load, from the given one on."""

    def __init__(self, error: Exception, spared: int = 0) -> None:
        super().__init__(crowding=0.7)
        self.error, self.spared = error, spared

    def block(self, requests: Any, load: Load, *rest: Any, **options: Any) -> BlockReport:
        if load.concurrency > 16:
            self.spared -= 1
            if self.spared < 0:
                raise self.error
        return super().block(requests, load, *rest, **options)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (EngineCrashError("the engine died under load"), "the engine died under load"),
        (BudgetExhaustedError("the budget ran out"), "the budget ran out"),
        (ZeroDivisionError("odd"), "odd"),
    ],
)
def test_whatever_fails_in_it_leaves_the_outcome_and_says_why(tmp_path: Path, items: Path, error: Exception, words: str) -> None:
    sound = run(spec_for(tmp_path / "sound", items), PlantedEngine(crowding=0.7))
    finished = run(seeking(tmp_path, items), Failing(error, spared=2))
    assert finished.outcome == sound.outcome
    assert finished.summary["mostLoad"]["sentence"] == f"not measured: {words}"
    assert f"Most load not measured: {words}" in screen.lines(finished.summary)
    assert (tmp_path / "out" / "profile.json").exists()


def test_a_tuner_killed_in_it_has_its_profile_and_goes_on_where_it_was(tmp_path: Path, items: Path) -> None:
    spec = seeking(tmp_path, items)
    with pytest.raises(KeyboardInterrupt):
        run(spec, Failing(KeyboardInterrupt(), spared=3))  # type: ignore[arg-type]
    assert (tmp_path / "out" / "profile.json").exists()
    study = TuningStudy(tmp_path / "out", None)
    kept, before = study.get(OUTCOME), study.get(MOST_LOAD)
    study.close()
    assert kept is not None and before is None
    engine = Watched(crowding=0.7)
    again = run(spec, engine)
    assert again.outcome == kept
    assert again.summary["mostLoad"]["ratio"]["pairs"] == 3
    assert all(load.concurrency != 16 or policy == EXACT_POLICY for policy, load, _ in engine.asked), "nothing is certified anew"
    whole = Watched(crowding=0.7)
    run(spec_for(tmp_path / "whole", items, certify__mostLoad=True), whole)
    greater = [asked for asked in whole.asked if asked[1].concurrency > 16]
    assert len([asked for asked in engine.asked if asked[1].concurrency > 16]) <= len(greater) - 2, "its blocks are kept"
    last = Watched()
    run(spec, last)
    assert not last.asked, "a study that has measured it answers at once"


def test_a_finished_study_can_be_asked_for_it(tmp_path: Path, items: Path) -> None:
    first = run(spec_for(tmp_path / "out", items), PlantedEngine(crowding=0.7))
    assert first.summary["mostLoad"] is None
    second = run(seeking(tmp_path, items), PlantedEngine(crowding=0.7))
    assert second.outcome == first.outcome
    assert second.summary["mostLoad"]["load"] > 16


def test_another_device_measures_no_load_and_keeps_the_outcome(tmp_path: Path, items: Path) -> None:
    class Elsewhere(PlantedEngine):
        def start(self) -> Any:
            facts = super().start()
            return replace(facts, key={**facts.key, "device": "other"})

    first = run(spec_for(tmp_path / "out", items), PlantedEngine())
    second = run(seeking(tmp_path, items), Elsewhere())
    assert second.outcome == first.outcome
    assert "device was cpu and is other" in second.summary["mostLoad"]["sentence"]


def test_a_policy_that_holds_no_more_says_so(tmp_path: Path, items: Path) -> None:
    """TPOT that grows with the sixth power of the load: two more requests cost more than the policy gains."""
    found = run(seeking(tmp_path, items, slo__tpotMs__p95=4000), PlantedEngine(crowding=6)).summary["mostLoad"]
    assert found["load"] in (16, 18)
    if found["load"] == 16:
        assert (
            "no more than the tuned 16 requests at a time was shown: at 18 requests at a time mean TPOT was" in found["sentence"]
        )


def test_pairs_that_contradict_the_search_step_down(tmp_path: Path, items: Path) -> None:
    """Single blocks of the policy look fast; beside exact routing it is slower above 20 requests at a time."""

    class Flattering(PlantedEngine):
        exact_seen = False

        def block(self, requests: list[Request], load: Load, *rest: Any, **options: Any) -> BlockReport:
            self.exact_seen |= self.policy == EXACT_POLICY and self.above
            self.above |= load.concurrency > 16
            self.crowding = 2.0 if self.exact_seen and load.concurrency > 20 else 0.0
            return super().block(requests, load, *rest, **options)

        above = False

    report = Quiet()
    found = run(seeking(tmp_path, items), Flattering(most_requests=24), report).summary["mostLoad"]
    assert found["load"] == 20
    assert not found["at_least"]
    assert any("was not shown to be as fast" in step and "a lower load is tried" in step for step in report.steps)


@pytest.mark.parametrize(("slow", "shown"), [(1.1, True), (1.9, False)], ids=["shown by more pairs", "not shown"])
def test_no_load_is_named_whose_latency_is_not_shown(tmp_path: Path, items: Path, slow: float, shown: bool) -> None:
    """At a greater load every other block of the policy is slower; three pairs cannot tell whether it keeps the latency."""

    class Restless(PlantedEngine):
        greater = 0

        def block(self, requests: list[Request], load: Load, *rest: Any, **options: Any) -> BlockReport:
            self.greater += load.concurrency > 16
            self.tpot_ms = 20.0 * (slow if load.concurrency > 16 and self.greater % 2 == 0 else 1.0)
            return super().block(requests, load, *rest, **options)

    found = run(seeking(tmp_path, items), Restless(most_requests=18)).summary["mostLoad"]
    if shown:
        assert found["load"] == 18 and found["ratio"]["pairs"] == 6 and found["ratio"]["low"] >= 1
    else:
        assert found["load"] == 16 and found["ratio"] is None
        assert "no more than the tuned 16 requests at a time was shown" in found["sentence"]


def test_the_dry_run_counts_it(tmp_path: Path, items: Path) -> None:
    """Three blocks find it and six confirm it: each a request's time of warm-up and a quarter of blockSeconds, or a request's time."""
    pace = Pace(8.0, 2.0, 10.0)
    spec = seeking(tmp_path, items, certify__blockSeconds=60)
    assert planner.most_load_seconds(spec, pace) == pytest.approx(9 * (2 + 8 * 2 + 0.5))
    assert planner.most_load_seconds(seeking(tmp_path, items, certify__blockSeconds=4), pace) == pytest.approx(9 * (2 + 2 + 0.5))
    without = spec_for(tmp_path / "out", items, certify__blockSeconds=60)
    plans = [prepare(given).plan for given in (spec, without)]
    told = [plan_text.describe(plan, given) for plan, given in zip(plans, (spec, without), strict=True)]
    assert "; most load at least about 2 min\n" in told[0]
    assert "most load" not in told[1]
    assert [plan.to_dict()["seconds"]["mostLoad"] for plan in plans] == [pytest.approx(9 * 15.5), 0]
