"""The study as the only truth: a whole run on a planted engine, killed, resumed, out of budget, refused."""

import datetime
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from sere_autotune import plan_text, planner
from sere_autotune.calibration import Origin, Source
from sere_autotune.certify import stage
from sere_autotune.outcome import Ending
from sere_autotune.progress import Progress
from sere_autotune.result import profile, screen
from sere_autotune.search.learned import FINAL_TRIALS
from sere_autotune.search.sizing import certificate_size
from sere_autotune.study import meter
from sere_autotune.study.budget import Budget
from sere_autotune.study.run import Run
from sere_autotune.study.schema import Pace
from sere_autotune.study.study import TuningStudy, fingerprint
from sere_autotune.trial.engine import EngineFacts
from sere_autotune.trial.stats import power
from sere_autotune.tuning.spec import TuningSpec
from sere_ext.contract.errors import BudgetExhaustedError, EngineCrashError, SereError, UnsupportedError, UsageError
from sere_ext.contract.policy import Kind, Policy
from sere_ext.contract.profile import Profile
from tests.kit import ROOT
from tests.kit.planted import PlantedEngine, Quiet, run, spec_for, truth, write_items


@pytest.fixture
def items(tmp_path: Path) -> Path:
    return write_items(tmp_path / "items.jsonl", 6000)


def test_a_run_ends_with_a_certified_faster_policy_within_its_budget(tmp_path: Path, items: Path) -> None:
    report = Quiet()
    finished = run(spec_for(tmp_path / "out", items, search__trials=12), PlantedEngine(), report)
    assert finished.outcome.ending is Ending.CHOSEN, finished.outcome.message
    profile = Profile.read(tmp_path / "out" / "profile.json")
    evidence = profile.spec.evidence
    assert evidence.certified
    assert evidence.accuracy.upper_bound_points is not None
    assert evidence.accuracy.upper_bound_points <= 1.0
    assert evidence.speedup.value == pytest.approx(truth(profile.spec.policy)[2], rel=0.05)
    assert evidence.speedup.condition == "TPOT p95, equal concurrency 16"
    assert evidence.active_experts is not None
    assert evidence.active_experts.exact > evidence.active_experts.chosen
    assert len(report.rows) == 12
    trials = finished.outcome.published()["trials"]
    assert set(trials) == {"scheduled", "completed", "feasible", "infeasible", "failed"}  # what the operator reads
    assert trials["completed"] == 12 == trials["feasible"] + trials["infeasible"]
    assert report.rows[0]["exact"]
    assert all((tmp_path / "out" / name).exists() for name in ("study.journal", "summary.json", "report.html"))


def test_the_screen_needs_no_glossary(tmp_path: Path, items: Path) -> None:
    """The plan, every step and the closing lines of a whole run, as somebody reads them who has read nothing else."""
    shown = io.StringIO()
    spec = spec_for(tmp_path / "out", items)
    finished = run(spec, PlantedEngine(), Progress(Console(file=shown, width=200), ""))
    plan = planner.make_plan(spec, 6000, 4000, None, 0, None, source=Source(Origin.UNUSED))
    text = "\n".join([plan_text.describe(plan, spec), shown.getvalue(), screen.lines(finished.summary)])
    assert "certification of up to" in text and "exact routing against itself" in text and "ceiling: round 1" in text
    assert not re.findall(r"\b(?:rungs?|noise floor|waves?)\b", text)


def test_a_finished_study_says_the_same_again_without_an_engine(tmp_path: Path, items: Path) -> None:
    spec = spec_for(tmp_path / "out", items)
    first = run(spec, PlantedEngine())
    engine = PlantedEngine()
    again = run(spec, engine)
    assert engine.blocks == 0
    assert again.outcome == first.outcome
    assert again.summary["trials"] == first.summary["trials"]


def test_a_finished_study_writes_the_same_profile_again(tmp_path: Path, items: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever pinned its digest finds it again, on another day and after the most load was measured."""
    spec = spec_for(tmp_path / "out", items)
    run(spec, PlantedEngine())
    before = (tmp_path / "out" / "profile.json").read_bytes()

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return datetime.datetime(2030, 1, 1, tzinfo=tz)

    monkeypatch.setattr(profile.datetime, "datetime", Later)
    again = run(spec_for(tmp_path / "out", items, certify__mostLoad=True), PlantedEngine())
    assert again.summary["mostLoad"]["load"]
    assert (tmp_path / "out" / "profile.json").read_bytes() == before


class Elsewhere(PlantedEngine):
    """Stops at its fourth block, or runs on another device."""

    def __init__(self, device: str = "") -> None:
        super().__init__()
        self.device = device

    def start(self) -> EngineFacts:
        facts = super().start()
        return replace(facts, key={**facts.key, "device": self.device}) if self.device else facts

    def block(self, *args: Any, **kwargs: Any) -> Any:
        if not self.device and self.blocks >= 5:
            raise KeyboardInterrupt
        return super().block(*args, **kwargs)


@pytest.mark.parametrize("blocks", [0, 1], ids=["before it", "in it"])
def test_a_tuner_killed_in_its_first_trial_begins_with_exact_routing_again(tmp_path: Path, items: Path, blocks: int) -> None:
    class Killed(PlantedEngine):
        def block(self, *args: Any, **kwargs: Any) -> Any:
            if self.blocks >= blocks:
                raise KeyboardInterrupt
            return super().block(*args, **kwargs)

    spec = spec_for(tmp_path / "out", items)
    with pytest.raises(KeyboardInterrupt):
        run(spec, Killed())
    tried = [trial["policy"] for trial in run(spec, PlantedEngine()).summary["trials"]]
    assert tried[:2] == ["exact", "oea S=2 share=0.50 for 8-64 tokens, exact elsewhere"]


def test_trials_of_another_device_are_not_gone_on_with(tmp_path: Path, items: Path) -> None:
    """As where a tuning pod comes back on a node with other GPUs."""
    spec = spec_for(tmp_path / "out", items)
    with pytest.raises(KeyboardInterrupt):
        run(spec, Elsewhere())
    with pytest.raises(UsageError, match=r"trials of another engine: device was .* and is other; .*--fresh"):
        run(spec, Elsewhere("other"))


def test_killed_with_minus_9_it_goes_on_and_loses_at_most_the_trial_in_flight(tmp_path: Path, items: Path) -> None:
    calls = tmp_path / "calls.log"
    command = [sys.executable, "-m", "tests.kit.planted", str(tmp_path / "out"), str(items), "8", "0"]
    at_blocks = (3, 9, 20)  # in the search, near its end, in certification
    kills = len(at_blocks)
    for at_block in at_blocks:
        victim = subprocess.Popen([*command, str(at_block)], stdout=subprocess.DEVNULL, cwd=ROOT)  # it hangs in that block
        deadline = time.monotonic() + 120
        while not calls.exists() or len(calls.read_text().splitlines()) < at_block:
            assert victim.poll() is None and time.monotonic() < deadline, f"it did not come to block {at_block}"
            time.sleep(0.02)
        os.kill(victim.pid, signal.SIGKILL)
        assert victim.wait() == -signal.SIGKILL
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "Chosen"
    study = TuningStudy(tmp_path / "out", None)
    trials = study.study.get_trials()
    study.close()
    complete = [t for t in trials if t.state.name == "COMPLETE"]
    failed = [t for t in trials if t.state.name == "FAIL"]
    assert len(complete) == 8
    assert not [t for t in trials if t.state.name == "RUNNING"]
    assert len(failed) <= kills
    assert {t.user_attrs["retry_of"] for t in complete if "retry_of" in t.user_attrs} <= {t.number for t in failed}
    # Exact twice, 7 trials with exact beside each, 2 x 3 pairs per rung; a kill loses the trial in flight (two blocks).
    blocks = len(calls.read_text().splitlines())
    rungs = sum(rung["result"] is not None for rung in json.loads((tmp_path / "out" / "summary.json").read_text())["ladder"])
    assert blocks <= 2 + 7 * 2 + 6 * rungs + 2 * kills


def test_a_kill_while_the_engine_starts_has_paid_for_the_start(
    tmp_path: Path, items: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lies on disk half-way through a start is what a kill there leaves; it is charged to the run that goes on."""
    monkeypatch.setattr(meter, "BEAT_S", 0.05)
    spec, left = spec_for(tmp_path / "out", items, engine__tensorParallelSize=2), tmp_path / "left"

    class Slow(PlantedEngine):
        def start(self) -> EngineFacts:
            time.sleep(0.4)
            journal, deadline = tmp_path / "out" / "study.journal", time.monotonic() + 20
            for _ in range(2):  # the second beat from here on has charged what came before here
                size = journal.stat().st_size
                while journal.stat().st_size == size and time.monotonic() < deadline:
                    time.sleep(0.005)
            shutil.copytree(tmp_path / "out", left)
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run(spec, Slow())
    took_s = time.monotonic() - began
    assert not any(thread.name == "meter" for thread in threading.enumerate()), "nothing is written after the end"
    study, budget = TuningStudy(left, None), Budget.of(spec.search, devices=2)
    study.restore(budget)
    study.close()
    assert 2 * 0.4 <= budget.device_spent_s <= 2 * took_s, "on two devices"
    assert 0.4 <= budget.wall_spent_s <= took_s
    with pytest.raises(BudgetExhaustedError, match="deviceHours"):
        run(spec_for(left, items, engine__tensorParallelSize=2, search__deviceHours=20.5 / 3600), PlantedEngine())


def test_a_crashing_kind_is_infeasible_and_never_chosen(tmp_path: Path, items: Path) -> None:
    engine = PlantedEngine(crashes=[Kind.OEA])
    finished = run(spec_for(tmp_path / "out", items, search__sampler="random", search__trials=12), engine)
    crashed = [t for t in finished.summary["trials"] if t["crash"]]
    assert crashed
    assert all(min(t["violations"].values()) > 0 for t in crashed)
    assert finished.profile is None or "oea" not in json.dumps(finished.profile["spec"]["policy"])


def test_a_kind_that_the_model_refuses_is_one_trial_less_not_the_end(tmp_path: Path, items: Path) -> None:
    """A router whose scores are not known refuses `oea`, whatever S."""

    class Refusing(PlantedEngine):
        def apply(self, policy: Policy) -> None:
            if any(bucket.kind is Kind.OEA for bucket in policy.buckets):
                raise UnsupportedError("layer 0 gives no scores")
            super().apply(policy)

    finished = run(spec_for(tmp_path / "out", items, search__sampler="random", search__trials=12), Refusing())
    refused = [t for t in finished.summary["trials"] if t["crash"]]
    assert refused and all("gives no scores" in t["crash"] for t in refused)
    assert len(finished.summary["trials"]) == 12 and len(refused) < 6, "the others were measured"


def test_an_engine_that_dies_under_exact_routing_is_a_failure(tmp_path: Path, items: Path) -> None:
    class Broken(PlantedEngine):
        def block(self, *args, **kwargs):
            from sere_ext.contract.errors import EngineCrashError

            raise EngineCrashError("out of memory")

    with pytest.raises(SereError, match="keeps failing"):
        run(spec_for(tmp_path / "out", items), Broken())


def test_an_impossible_latency_limit_ends_with_the_nearest_miss(tmp_path: Path, items: Path) -> None:
    finished = run(spec_for(tmp_path / "out", items, slo__tpotMs__p95=2), PlantedEngine())
    assert finished.outcome.exit_code == 3
    assert "TPOT p95" in finished.outcome.message
    assert "slo.tpotMs.p95" in finished.outcome.message
    assert "exact routing stays" in finished.outcome.message
    assert not (tmp_path / "out" / "profile.json").exists()


def test_a_spent_budget_ends_with_4_and_a_raised_one_goes_on(
    tmp_path: Path, items: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0  # of a clock that blocks alone move, so that the budget pays for as many on every machine

    class Timed(PlantedEngine):
        def block(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal now
            now += 1.0
            return super().block(*args, **kwargs)

    monkeypatch.setattr(time, "monotonic", lambda: now)
    engine = Timed()
    short = spec_for(tmp_path / "out", items, search__deviceHours=14 / 3600, certify__pairs=6)
    finished = run(short, engine)
    assert finished.outcome.exit_code == 4, finished.outcome.message
    assert 0 < engine.blocks < 14
    assert f", {14 - engine.blocks} s left)" in finished.outcome.message, "each block took a second"
    assert "deviceHours" in finished.outcome.message
    more = spec_for(tmp_path / "out", items, search__deviceHours=1, certify__pairs=6)
    before = len(finished.summary["trials"])
    told: list[dict[str, Any]] = []
    again = run(more, PlantedEngine(), Progress(Console(file=io.StringIO()), "", told.append))
    assert again.outcome.ending is Ending.CHOSEN
    assert again.summary["trials"][:before] == finished.summary["trials"]
    counts = [progress["trials"] for progress in told]
    assert told[0]["stage"] == "starting the engine"
    assert counts[0] == before
    assert counts == sorted(counts), "a count that was told is never taken back"


def test_no_block_may_outlive_the_budget(tmp_path: Path, items: Path) -> None:
    engine = PlantedEngine()
    run(spec_for(tmp_path / "out", items, search__deviceHours=100 / 3600, search__trialSeconds=90), engine)
    assert max(engine.cut) <= 100


def test_a_folder_of_another_tuning_is_refused_unless_fresh(tmp_path: Path, items: Path) -> None:
    run(spec_for(tmp_path / "out", items, accuracy__maxDropPoints=2), PlantedEngine())
    other = spec_for(tmp_path / "out", items, accuracy__maxDropPoints=2, slo__tpotMs__p95=39)
    with pytest.raises(UsageError, match="--fresh"):
        run(other, PlantedEngine())
    assert run(other, PlantedEngine(), fresh=True).outcome.ending is Ending.CHOSEN


def test_a_model_that_was_trained_further_in_its_folder_is_another_study(tmp_path: Path, items: Path) -> None:
    """Its shape is the same, and the certificate of the weights before says nothing of it."""
    spec = spec_for(tmp_path / "out", items)
    run(spec, PlantedEngine())
    (Path(spec.model) / "model.safetensors").write_text('{"trained": "further"}')
    with pytest.raises(UsageError, match="a study of another model"):
        run(spec, PlantedEngine())


def test_budgets_may_change_within_a_study_and_nothing_else() -> None:
    plain = {
        "model": "m", "slo": {"tpotMs": {"p95": 20}}, "accuracy": {"tasks": ["items.jsonl"]}, "engine": {"maxModelLen": 64},
        "workload": {"load": {"concurrency": [4, 16]}}, "search": {"policies": ["sere"], "rungs": 2},
    }  # fmt: skip

    def mark(certify: Any = None, **search: Any) -> str:
        changed = {"search": plain["search"] | search, "certify": certify or {}}
        return fingerprint(TuningSpec.model_validate(plain | changed), "sha256:1", "sha256:2")

    assert mark(trials=7) == mark(deviceHours=9) == mark(wallMinutes=3) == mark()
    assert mark(certify={"mostLoad": False}) == mark(), "the most load is measured after the outcome"
    assert mark(certify={"pairs": 4}) != mark()
    assert len({mark(), mark(minShare=[0, 0.7]), mark(rungs=3)}) == 3


def test_two_tuners_in_one_folder_are_refused(tmp_path: Path, items: Path) -> None:
    held = TuningStudy(tmp_path / "out", None)
    with pytest.raises(UsageError, match="another tuner works in"):
        run(spec_for(tmp_path / "out", items), PlantedEngine())
    held.close()


def test_certify_alone_takes_a_policy(tmp_path: Path, items: Path) -> None:
    good = Policy.parse({"buckets": [{"minTokens": 8, "maxTokens": 64, "kind": "topk", "S": 3}]})
    bad = Policy.parse({"buckets": [{"minTokens": 8, "maxTokens": 64, "kind": "topk", "S": 1}]})
    spec = spec_for(tmp_path / "good", items, accuracy__maxDropPoints=2, search__rungs=1)
    assert run(spec, PlantedEngine(), only=good).outcome.ending is Ending.CHOSEN
    finished = run(spec_for(tmp_path / "bad", items, accuracy__maxDropPoints=2, search__rungs=1), PlantedEngine(), only=bad)
    assert finished.outcome.exit_code == 3
    assert "points, p = " in finished.outcome.message


def test_a_rungs_power_is_that_of_the_items_which_may_be_used(tmp_path: Path, items: Path) -> None:
    good = Policy.parse({"buckets": [{"minTokens": 8, "maxTokens": 64, "kind": "topk", "S": 3}]})
    powers = []
    for count in (None, 280):
        spec = spec_for(tmp_path / f"{count}" / "out", items, accuracy__maxDropPoints=2, search__rungs=1, certify__items=count)
        powers.append(run(spec, PlantedEngine(), only=good).summary["ladder"][0]["power"])
    assert powers[0] > 0.9 > 0.7 > powers[1], powers


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_every_sampler_tells_the_same_constraints_for_every_trial(tmp_path: Path, items: Path, sampler: str) -> None:
    run(spec_for(tmp_path / "out", items, search__sampler=sampler), PlantedEngine())
    study = TuningStudy(tmp_path / "out", None)
    keys = {frozenset(t.constraints) for t in study.complete()}
    study.close()
    assert keys == {frozenset({"tpot.p95", "accuracy", "failures"})}


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_exact_routing_is_tried_once_however_much_a_sampler_insists(tmp_path: Path, items: Path, sampler: str) -> None:
    harmful = {"search__policies": ["topk"], "search__trials": 14, "accuracy__maxDropPoints": 0.5}  # all but exact routing
    run(spec_for(tmp_path / "out", items, search__sampler=sampler, **harmful), PlantedEngine())
    study = TuningStudy(tmp_path / "out", None)
    tried = [trial.user_attrs["describe"] for trial in study.complete()]
    asked = len(study.study.get_trials(deepcopy=False))
    study.close()
    assert len(tried) == 14 and tried.count(tried[0]) == 1
    assert asked <= 3 * len(tried)


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_min_share_is_searched_and_a_study_with_it_goes_on(tmp_path: Path, items: Path, sampler: str) -> None:
    changes = {"search__policies": ["oea"], "search__minShare": [0.7, 0, 0.7], "search__sampler": sampler, "search__seed": 2}
    spec = spec_for(tmp_path / "out", items, search__trials=12, **changes)
    with pytest.raises(KeyboardInterrupt):
        run(spec, Elsewhere())
    study = TuningStudy(tmp_path / "out", None)
    before = [trial.user_attrs["describe"] for trial in study.complete()]
    study.close()
    again = run(spec, PlantedEngine())
    assert before and [trial["policy"] for trial in again.summary["trials"]][: len(before)] == before
    tried = [trial["policy"] for trial in again.summary["trials"]]
    assert any("share=0.70" in policy for policy in tried)
    assert not any("share" in policy for policy in tried if "S=1 " in policy)


def test_an_accuracy_rejection_ends_the_trial_early(tmp_path: Path, items: Path) -> None:
    spec = spec_for(tmp_path / "out", items, search__policies=["topk"], search__trials=9)
    finished = run(spec, PlantedEngine())
    harsh = [t for t in finished.summary["trials"] if t["policy"].startswith("topk 1")]
    assert harsh
    assert all(t["stopped"].startswith("accuracy") and t["items"] < 400 and t["violations"]["accuracy"] > 0 for t in harsh)


@pytest.mark.parametrize(("crashes", "refuses"), [([Kind.OEA], []), ([], [Kind.OEA])], ids=["dies of it", "refuses it"])
def test_a_kind_costs_that_kind_and_never_the_study(
    tmp_path: Path, items: Path, crashes: list[Kind], refuses: list[Kind]
) -> None:
    """The first three trials are planned with the first kind: three failures in a row, which used to end the study."""

    class Engine(PlantedEngine):
        def apply(self, policy: Policy) -> None:
            if any(bucket.kind in refuses for bucket in policy.buckets):
                raise UnsupportedError("layer 0 gives no scores")
            super().apply(policy)

    report = Quiet()
    changes = {"search__policies": ["oea", "topk"], "search__minShare": [0], "accuracy__maxDropPoints": 5}
    spec = spec_for(tmp_path / "out", items, search__trials=12, **changes)
    finished = run(spec, Engine(crashes=crashes), report)
    assert finished.outcome.ending is Ending.CHOSEN, finished.outcome.message
    assert {bucket["kind"] for bucket in finished.profile["spec"]["policy"]["buckets"]} == {"topk"}
    crashed = [trial for trial in finished.summary["trials"] if trial["crash"]]
    assert len(crashed) == (1 if refuses else 2), "one refusal is enough, two crashes are"
    assert len(finished.summary["trials"]) == 12
    assert [step for step in report.steps if step.startswith("kind oea is left out from here")]


def test_an_engine_that_no_kind_works_on_ends_the_run_with_the_causes(tmp_path: Path, items: Path) -> None:
    finished = run(spec_for(tmp_path / "out", items), PlantedEngine(crashes=[Kind.OEA, Kind.TOPK]))
    assert finished.outcome.exit_code == 3
    assert "the engine refuses or dies of every kind of policy" in finished.outcome.message
    assert "topk: planted" in finished.outcome.message and "oea: planted" in finished.outcome.message

    class Gone(PlantedEngine):
        def block(self, *args: Any, **kwargs: Any) -> Any:
            if self.blocks >= 3:  # the length of answers, exact routing and the noise floor
                raise EngineCrashError("out of memory")
            return super().block(*args, **kwargs)

    with pytest.raises(SereError, match="keeps failing, under exact routing too"):
        run(spec_for(tmp_path / "other" / "out", items), Gone())


def test_a_candidate_that_crashes_gets_that_verdict_and_the_ladder_goes_on(tmp_path: Path, items: Path) -> None:
    class Fragile(PlantedEngine):
        """Dies of the first policy that is certified, whichever it is."""

        victim = ""
        certifying = False

        def block(self, *args: Any, **kwargs: Any) -> Any:
            if self.certifying and self.policy.buckets:
                self.victim = self.victim or self.policy.digest
                if self.policy.digest == self.victim:
                    raise EngineCrashError("illegal memory access")
            return super().block(*args, **kwargs)

    engine = Fragile()

    class Stages(Quiet):
        def stage(self, name: str, total: int, done: int = 0) -> None:
            engine.certifying = name.startswith("certify")
            super().stage(name, total, done)

    spec = spec_for(tmp_path / "out", items, search__trials=12, accuracy__maxDropPoints=5)
    finished = run(spec, engine, Stages())
    assert [row["verdict"] for row in finished.summary["ladder"]][:2] == ["crashed", "passed"]
    assert finished.outcome.ending is Ending.CHOSEN and finished.outcome.chosen is not None and finished.outcome.chosen > 0
    assert "illegal memory access" in finished.summary["ladder"][0]["result"]["reason"]
    again = run(spec, PlantedEngine())
    assert again.outcome == finished.outcome


@pytest.mark.parametrize("fault", ["fails", "one token"])
def test_a_policy_without_a_time_per_token_is_a_trial_like_others(tmp_path: Path, items: Path, fault: str) -> None:
    """Such a trial once did not count, so that the search went on until the whole budget was spent."""

    class Mute(PlantedEngine):
        def block(self, *args: Any, **kwargs: Any) -> Any:
            assert self.blocks < 100, "the search does not end"
            report = super().block(*args, **kwargs)
            if any(bucket.kind is Kind.TOPK for bucket in self.policy.buckets):
                changed = {"correct": None, "tokens": 0, "error": "no"} if fault == "fails" else {"tokens": 1}
                sent = [replace(request, **changed) for request in report.block.sent]
                report = replace(report, block=replace(report.block, sent=sent))
            return report

    finished = run(spec_for(tmp_path / "out", items), Mute())
    assert len(finished.summary["trials"]) == 6
    assert "topk" not in finished.outcome.message
    json.loads((tmp_path / "out" / "summary.json").read_text(), parse_constant=pytest.fail)


class Slow(PlantedEngine):
    """Answers as planted, each policy at the given speed in certification whatever the search saw."""

    def __init__(self, speed: float) -> None:
        super().__init__()
        self.speed, self.certifying = speed, False

    def block(self, *args: Any, **kwargs: Any) -> Any:
        report = super().block(*args, **kwargs)
        if self.certifying and self.policy.buckets:
            scale = planted_speed(self.policy) / self.speed
            sent = [replace(s, e2el_ms=s.ttft_ms + (s.e2el_ms - s.ttft_ms) * scale) for s in report.block.sent]
            report = replace(report, block=replace(report.block, sent=sent))
        return report


def planted_speed(policy: Policy) -> float:
    return truth(policy)[2]


@pytest.mark.parametrize(("speed", "word"), [(0.9, "slower than exact routing: 0.90x ["), (1.0, "not shown to be faster: ")])
def test_a_policy_that_is_not_faster_is_not_chosen(tmp_path: Path, items: Path, speed: float, word: str) -> None:
    """The search took it for faster; 17 of 20 studies in a world where nothing is faster used to end with a policy."""
    engine = Slow(speed)

    class Stages(Quiet):
        def stage(self, name: str, total: int, done: int = 0) -> None:
            engine.certifying = name.startswith("certify")
            super().stage(name, total, done)

    report = Stages()
    finished = run(spec_for(tmp_path / "out", items, accuracy__maxDropPoints=2), engine, report)
    assert finished.outcome.exit_code == 3
    assert word in finished.outcome.message
    assert not (tmp_path / "out" / "profile.json").exists()
    more = [name for name in report.steps if name.endswith("more pairs")]
    assert bool(more) == (speed == 1.0), "an undecided speed gets more pairs, a slower policy none"
    pairs = {row["result"]["speed"]["pairs"] for row in finished.summary["ladder"] if row["result"]}
    assert pairs == ({6} if more else {3})


def test_a_kill_among_the_further_pairs_of_an_undecided_candidate_changes_no_verdict(
    tmp_path: Path, items: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The budget pays for the pairs that are left, and no longer for all of them once more."""

    class Killed(Slow):
        further = 10**9  # blocks until it is killed

        def block(self, *args: Any, **kwargs: Any) -> Any:
            self.further -= 1
            if self.further < 0:
                raise KeyboardInterrupt
            return super().block(*args, **kwargs)

    class Stages(Quiet):
        def __init__(self, engine: Killed, blocks: int) -> None:
            super().__init__()
            self.engine, self.blocks = engine, blocks

        def stage(self, name: str, total: int, done: int = 0) -> None:
            self.engine.certifying = name.startswith("certify")
            if name.endswith("more pairs"):
                self.engine.further = self.blocks
            super().stage(name, total, done)

    spec = spec_for(tmp_path / "out", items, accuracy__maxDropPoints=2, search__rungs=1)
    engine = Killed(1.0)
    with pytest.raises(KeyboardInterrupt):
        run(spec, engine, Stages(engine, 4))
    monkeypatch.setattr(stage, "_block_seconds", lambda *_: 1.0)
    monkeypatch.setattr(Run, "left_s", lambda _: 3.0)
    engine = Killed(1.0)
    finished = run(spec, engine, Stages(engine, 2))
    assert finished.summary["ladder"][0]["result"]["speed"]["pairs"] == 6


@pytest.mark.parametrize(
    ("answer", "given", "metric"),
    [
        ("The answer is {n}", "{n}", "exact"),  # spelt otherwise than the model answers, or another column of the file
        ('["{n}"]', "{n}", "exact"),  # lists and booleans as text
        ("{n}", "", "exact"),  # a stop string that empties the answers, maxTokens 1
        ("{n}", "<|assistant|>", "contains"),  # a template that the model was not given
    ],
)
def test_an_evaluation_that_exact_routing_fails_certifies_nothing(tmp_path: Path, answer: str, given: str, metric: str) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"item {n}", "answer": answer.format(n=n)}) + "\n" for n in range(3000)))

    class Engine(PlantedEngine):
        def block(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            report = super().block(requests, *args, **kwargs)
            texts = [given.format(n=request.prompt.split()[-1]) for request in requests]
            sent = [
                replace(s, text=text, correct=request.item.correct(text))
                for s, text, request in zip(report.block.sent, texts, requests, strict=False)
            ]
            return replace(report, block=replace(report.block, sent=sent))

    engine = Engine()
    spec = spec_for(tmp_path / "out", path, accuracy__tasks=[{"file": str(path), "metric": metric}])
    finished = run(spec, engine)
    assert finished.outcome.exit_code == 5
    assert engine.blocks == 2, "the length of answers and exact routing: refused before anything is searched"
    assert "exact routing is right on 0 of 500 search items" in finished.outcome.message
    assert finished.outcome.message.count(" wants ") == 3
    policy = Policy.parse({"buckets": [{"minTokens": 8, "maxTokens": 64, "kind": "topk", "S": 3}]})
    alone = run(
        spec_for(tmp_path / "one" / "out", path, accuracy__tasks=[{"file": str(path), "metric": metric}]), Engine(), only=policy
    )
    assert alone.outcome.exit_code == 5


def test_the_declared_items_are_those_whose_chance_was_printed_and_all_where_they_fit(tmp_path: Path, items: Path) -> None:
    finished = run(spec_for(tmp_path / "out", items), PlantedEngine())
    row = finished.summary["ladder"][0]
    assert row["items"] == row["result"]["items"] == finished.summary["accuracy"]["certItems"] == 5000
    short = certificate_size(
        spec_for(tmp_path / "o", items), Pace(4.0, 3.0, 60.0), 1.0, 5000, discordance=0.01, drop=0.001, speedup=1.2, alpha=0.05,
        left_s=600.0, candidates=3,
    )[0]  # fmt: skip
    assert power(short, 0.01, 0.001, 0.01, 0.05) >= 0.95 and short < 5000


def test_what_is_certified_was_measured_twice_before_on_items_of_its_own(tmp_path: Path, items: Path) -> None:
    """The model may think most of a policy that no trial tried, or that one lucky block flattered; the last third of the trials is there for such."""
    for seed in (1, 2, 3):
        spec = spec_for(tmp_path / f"{seed}" / "out", items, search__trials=12, search__rungs=1, search__seed=seed)
        summary = run(spec, PlantedEngine()).summary
        tried = Counter(trial["policy"] for trial in summary["trials"])
        assert [tried[candidate["describe"]] for candidate in summary["ladder"]] == [FINAL_TRIALS], seed
