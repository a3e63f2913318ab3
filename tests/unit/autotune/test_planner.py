"""The plan: what certainty costs is said, and refused, before anything is spent."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sere_autotune import calibration, plan_text, planner
from sere_autotune.outcome import Ending, nearest_miss
from sere_autotune.prepare import Prepared, prepare
from sere_autotune.search import pacing
from sere_autotune.study.ledger import Ledger
from sere_autotune.study.schema import Pace
from sere_autotune.trial.items import Item, load_items, search_count, split
from sere_autotune.trial.stats import items_needed, largest_difference, power
from sere_autotune.tuning.spec import AccuracySpec, TaskSpec
from sere_ext.contract.errors import CannotCertifyError, PolicyError, UsageError
from sere_ext.contract.model_config import model_config_digest
from sere_ext.contract.policy import Policy
from sere_ext.contract.similarity import SimilarityMeta
from sere_ext.similarity.file import write_similarity
from tests.kit.planted import PlantedEngine, run, spec_for, write_items


def prepared(tmp_path: Path, count: int, **changes) -> Prepared:
    return prepare(spec_for(tmp_path / "out", write_items(tmp_path / "items.jsonl", count), **changes))


def test_the_dry_run_says_items_limit_and_time(tmp_path: Path) -> None:
    ready = prepared(tmp_path, 8800)
    text = plan_text.describe(ready.plan, ready.spec)
    assert "8,800 items, 7,334 of them kept for certification" in text
    assert "at 1% difference 1,800 items certify a policy that truly costs 0.3 points" in text
    assert "this limit can be certified" in text
    assert "Budget     1 device-hours" in text


def test_the_dry_run_says_which_items_are_for_what(tmp_path: Path) -> None:
    ready = prepared(tmp_path, 1160, accuracy__searchItems=160, search__itemsPerTrial=96)
    text = plan_text.describe(ready.plan, ready.spec)
    assert "1,160 items, 1,000 of them kept for certification" in text
    assert "160 others are searched on: exact routing answers all of them and a trial 96;" in text
    assert "on 96 of them once and on a quarter as many beside each trial" in text
    few = prepared(tmp_path, 1160, accuracy__searchItems=50, search__itemsPerTrial=96)
    assert "answers all of them and a trial 50;" in plan_text.describe(few.plan, few.spec)
    alone = prepare(ready.spec, Policy.parse({"buckets": [{"minTokens": 2, "kind": "topk", "S": 2}]}))
    assert "searched on" not in plan_text.describe(alone.plan, alone.spec), "a given policy is not searched"


def test_the_dry_run_says_up_to_which_difference_the_items_that_are_there_suffice(tmp_path: Path) -> None:
    ready = prepared(tmp_path, 1160, accuracy__searchItems=160)
    lines = plan_text.describe(ready.plan, ready.spec).splitlines()
    (line,) = [line for line in lines if "this limit can be certified" in line]
    assert (
        "1,000 items suffice up to 1.2% difference for a policy that costs nothing, up to 0.34% for one that truly costs 0.3"
        in line
    )
    assert lines.index(line) < min(i for i, other in enumerate(lines) if "difference 1,800 items certify" in other), (
        "before what more would need"
    )
    few = prepared(tmp_path, 500, accuracy__searchItems=160)
    text = plan_text.describe(few.plan, few.spec)
    assert "340 items suffice up to 0.12% difference for a policy that costs nothing, at none for one that" in text


@pytest.mark.parametrize("drop", [0.0, 0.003])
def test_the_largest_difference_is_the_one_at_which_so_many_items_are_needed(drop: float) -> None:
    found = largest_difference(2000, drop, 0.01)
    assert found is not None
    assert power(2000, found, drop, 0.01, 0.05) >= 0.8 > power(2000, found + 0.001, drop, 0.01, 0.05)
    assert items_needed(found, drop, 0.01) == pytest.approx(2000, rel=0.02)
    assert largest_difference(200, drop, 0.01) is None


def test_a_stored_noise_floor_and_pace_are_used(tmp_path: Path) -> None:
    ready = prepared(tmp_path, 4000)
    Ledger(ready.model, ready.out).note(0.009, Pace(50.0, 0.3, 31.0))
    again = prepare(ready.spec)
    text = plan_text.describe(again.plan, again.spec)
    assert "exact against exact is taken to differ on 0.90% of items, from last time" in text
    assert "start about 31 s" in text
    assert "at the pace of the last run" in text


def test_a_policy_to_certify_is_planned_without_a_search(tmp_path: Path) -> None:
    ready = prepared(tmp_path, 8800)
    policy = Policy.parse({"buckets": [{"minTokens": 2, "kind": "topk", "S": 2}]})
    alone = prepare(ready.spec, policy)
    text = plan_text.describe(alone.plan, alone.spec)
    assert "search" not in text.split("Time", 1)[1].split("Budget")[0]
    assert alone.plan.search_s == 0 < ready.plan.search_s
    with pytest.raises(PolicyError, match=r"S = 9 .* above the model's top-k of 4"):
        prepare(ready.spec, Policy.parse({"buckets": [{"minTokens": 2, "kind": "topk", "S": 9}]}))
    group = {"firstLayer": 8, "lastLayer": 9, "buckets": []}
    with pytest.raises(PolicyError, match=r"layers 8-9, but this model has layers 0-7;"):
        prepare(ready.spec, Policy.parse({**policy.to_json_dict(), "layerGroups": [group]}))


SERE = ["sere", "topk"]


def test_the_plan_says_where_the_similarity_comes_from(tmp_path: Path) -> None:
    ready = prepared(tmp_path, 4000, search__policies=SERE)
    text = plan_text.describe(ready.plan, ready.spec)
    assert "Similarity none given; calibrated first, on prompts and answers of the 666 search items" in text
    made = str(tmp_path / "out" / "similarity.safetensors")
    assert ready.plan.to_dict()["similarity"] == {"origin": "calibrated", "path": made, "calibratedOn": "search items"}

    (data := tmp_path / "c.jsonl").write_text("")
    named = prepared(tmp_path, 4000, search__policies=SERE, calibrate__data=str(data))
    assert f"calibrated first, on {data};" in plan_text.describe(named.plan, named.spec)
    assert prepared(tmp_path, 4000, search__policies=["topk"]).source == calibration.Source(calibration.Origin.UNUSED)


@pytest.mark.parametrize(("digest", "origin"), [("", "earlier"), ("sha256:other", "calibrated")])
def test_an_artefact_of_an_earlier_run_is_used_again_for_the_same_model(tmp_path: Path, digest: str, origin: str) -> None:
    ready = prepared(tmp_path, 4000, search__policies=SERE)
    ready.out.mkdir()
    meta = SimilarityMeta(
        model_type="m", model_name="planted", config_digest=digest or model_config_digest(ready.config), data_digest="sha256:1", tokens=7,
        layers=(0,), num_experts=4,
    )  # fmt: skip
    write_similarity(ready.out / "similarity.safetensors", meta, {0: np.eye(4, dtype=np.float32)})
    assert prepare(ready.spec).source.origin == origin


def test_a_policy_that_needs_no_similarity_is_certified_without_calibration(tmp_path: Path) -> None:
    ready = prepared(tmp_path, 4000, search__policies=SERE)
    bucket = {"minTokens": 2, "S": 2}
    for kind, origin in (("topk", "unused"), ("sere", "calibrated")):
        policy = Policy.parse({"buckets": [{**bucket, "kind": kind}]})
        assert prepare(ready.spec, policy).source.origin == origin


@pytest.mark.parametrize(
    ("confidence", "shown", "alpha"), [(0.95, "95%", 0.05), (0.975, "97.5%", 0.025), (0.995, "99.5%", 0.005), (0.9, "90%", 0.1)]
)
def test_confidence_and_alpha_are_shown_as_they_were_given(tmp_path: Path, confidence: float, shown: str, alpha: float) -> None:
    ready = prepared(tmp_path, 8800, accuracy__confidence=confidence, accuracy__maxDropPoints=0.7)
    assert f"limit 0.7 points at {shown};" in plan_text.describe(ready.plan, ready.spec)
    assert json.dumps(ready.plan.to_dict()["alpha"]) == str(round(0.75 * alpha, 12)), (
        "a first study leaves a quarter for later ones"
    )
    assert ready.plan.to_dict()["maxDropPoints"] == 0.7


def test_the_least_limit_is_not_rounded_up_to_tenths(tmp_path: Path) -> None:
    problem = prepared(tmp_path, 8800, accuracy__maxDropPoints=0.03).plan.problem
    assert "0.05 points is the least that these can" in problem


def test_a_budget_below_the_estimate_says_so(tmp_path: Path) -> None:
    ready = prepared(tmp_path, 8800)
    spec = ready.spec
    for hours, short in ((0.01, True), (1000.0, False)):
        raised = spec.model_copy(update={"search": spec.search.model_copy(update={"device_hours": hours})})
        assert ("less than the estimate above" in plan_text.describe(ready.plan, raised)) is short


def test_a_budget_that_pays_for_no_certificate_says_what_would(tmp_path: Path) -> None:
    ready = prepared(tmp_path, 8800)

    def told(hours: float) -> str:
        spec = ready.spec.model_copy(update={"search": ready.spec.search.model_copy(update={"device_hours": hours})})
        return plan_text.describe(ready.plan, spec)

    (enough,) = re.findall(
        r"pays for no certificate: .* give search\.deviceHours ([\d.]+) or more", told(1.01 * ready.plan.start_s / 3600)
    )
    assert 3600 * float(enough) >= ready.plan.least_s > 3600 * (float(enough) - 0.011)
    assert "pays for no certificate" not in told(float(enough))


def test_the_smallest_limit_is_one_number_wherever_it_is_told(tmp_path: Path) -> None:
    plan = prepared(tmp_path, 8800, accuracy__maxDropPoints=0.03).plan
    assert plan.to_dict()["smallestLimitPoints"] == plan.smallest_points == 0.05
    assert "could certify is 0.05 points" in plan_text.describe(plan, prepared(tmp_path, 8800).spec)


def test_a_limit_is_judged_by_what_the_items_can_show_and_not_by_the_rounded_figure(tmp_path: Path) -> None:
    smallest = prepared(tmp_path, 8800).plan.smallest
    assert prepared(tmp_path, 8800, accuracy__maxDropPoints=smallest * 100 + 1e-4).plan.can_certify
    assert not prepared(tmp_path, 8800, accuracy__maxDropPoints=smallest * 100 - 1e-4).plan.can_certify


def test_too_few_items_are_refused_before_anything_is_spent(tmp_path: Path) -> None:
    ready = prepared(tmp_path, 300)
    assert not ready.plan.can_certify
    assert "327 would be needed" in ready.plan.problem
    engine = PlantedEngine()
    with pytest.raises(CannotCertifyError, match="--advisory") as caught:
        run(ready.spec, engine)
    assert caught.value.exit_code == 5
    assert engine.blocks == 0
    assert not (tmp_path / "out").exists()


def test_advisory_goes_on_and_marks_the_profile(tmp_path: Path) -> None:
    ready = prepared(tmp_path, 300, search__policies=["oea"], search__trials=6)
    finished = run(ready.spec, PlantedEngine(), advisory=True)
    assert finished.outcome.ending in (Ending.CHOSEN, Ending.INFEASIBLE)
    if finished.profile is not None:
        assert finished.outcome.advisory
        assert finished.profile["spec"]["evidence"]["certified"] is False


def test_advisory_certifies_nothing_where_exact_routing_has_nothing_to_lose(tmp_path: Path) -> None:
    """Right on 2 of 100 items whatever the policy: no drop can show, and a run that goes on all the same says so."""

    class Guessing(PlantedEngine):
        def right(self, prompt: str, lost: float, gained: float) -> bool:
            return int(prompt.split()[-1]) % 50 == 0

    finished = run(prepared(tmp_path, 4000, search__trials=6).spec, Guessing(), advisory=True)
    assert finished.outcome.advisory and finished.profile is not None
    assert finished.profile["spec"]["evidence"]["certified"] is False
    assert "held-out items" in finished.outcome.message and "cannot lose what is not there" in finished.outcome.message


def test_a_limit_of_nothing_can_never_certify(tmp_path: Path) -> None:
    ready = prepared(tmp_path, 8800, accuracy__maxDropPoints=0)
    assert "cannot be certified by any number of items" in ready.plan.problem
    with pytest.raises(CannotCertifyError):
        run(ready.spec, PlantedEngine())


def test_the_split_is_fixed_by_the_prompts_alone(tmp_path: Path) -> None:
    path = write_items(tmp_path / "items.jsonl", 2000)
    forward = load_items(AccuracySpec(tasks=(TaskSpec(file=str(path)),)))
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))) * 2)  # other order, each twice
    backward = load_items(AccuracySpec(tasks=(TaskSpec(file=str(path)),)))
    assert [i.digest for i in forward] == [i.digest for i in backward]
    search, cert = split(forward, None)
    assert not {i.digest for i in search} & {i.digest for i in cert}
    assert len(search) == 500


@pytest.mark.parametrize(("total", "count"), [(8800, 1466), (1319, 439), (30000, 2000), (3000, 500), (60, 20)])
def test_how_many_items_the_search_sees(total: int, count: int) -> None:
    assert search_count(total, None) == count


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "line 1 cannot be read as JSON"),
        ('{"answer": "1"}', 'needs a "prompt"'),
        ('{"prompt": "a", "solution": "b"}', r'needs an "answer" \(its columns: prompt, solution\); name yours'),
        ("", "no items .*; write one on each line"),
    ],
)
def test_bad_items_are_named_by_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(UsageError, match=words):
        load_items(AccuracySpec(tasks=(TaskSpec(file=str(path)),)))


def test_a_dense_model_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    spec = spec_for(tmp_path / "out", write_items(tmp_path / "items.jsonl", 400))
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UsageError, match="dense model"):
        prepare(spec)
    with pytest.raises(UsageError, match="there is no folder"):  # at once: no hub is asked for a path
        prepare(spec.model_copy(update={"model": str(tmp_path / "modle")}))


@pytest.mark.parametrize(
    ("metric", "pattern", "answer", "text", "right"),
    [
        ("exact", None, "42", " 42\n", True),
        ("exact", None, "42", "x42", False),
        ("numeric", None, "1,234", "so it is 1234.0", True),
        ("numeric", None, "5", "none", False),
        ("contains", None, "yes", "oh yes!", True),
        ("regex", r"#### (\d+)", "7", "so #### 7 is it", True),
        ("regex", r"#### (\d+)", "7", "7", False),
    ],
)
def test_how_answers_are_judged(metric: str, pattern: str | None, answer: str, text: str, right: bool) -> None:
    assert Item("d", "p", answer, TaskSpec(file="f", metric=metric, pattern=pattern)).correct(text) is right


def test_the_nearest_miss_names_limit_distance_and_what_must_give() -> None:
    miss = nearest_miss(
        [("exact", False, {"tpot.p95": 0.2, "accuracy": -1.0}), ("topk 2", True, {"tpot.p95": 0.05, "accuracy": -0.5}),
         ("topk 1", True, {"tpot.p95": -0.1, "accuracy": 3.0})],
        {"tpot.p95": 20.0}, 1.0,
    )  # fmt: skip
    assert miss is not None
    assert miss.text == "topk 2 has TPOT p95 21.0 ms, 5% over the limit of 20 ms"
    assert "slo.tpotMs.p95" in miss.give


def test_a_certificates_estimate_grows_with_the_items_that_its_blocks_hold(tmp_path: Path) -> None:
    """Blocks of the least length would be four times as short here as those that hold all items."""
    spec = spec_for(
        tmp_path / "out", tmp_path / "items.jsonl", certify__pairs=4, certify__blockSeconds=8, certify__blockResidences=4
    )
    pace = Pace(rate_per_s=7.5, residence_s=2.0, start_s=20.0)
    measured_s = 1000 / 7.5 + 1000 / (7.5 * 1.75) + 4 * 2 * planner.WARMUP_RESIDENCES * 2.0  # at 1.75 times the speed
    assert planner.candidate_seconds(spec, pace, 1, 1000) == pytest.approx(measured_s, rel=0.15)
    assert planner.candidate_seconds(spec, pace, 1) < 0.75 * measured_s


@pytest.mark.parametrize(("seconds", "expected"), [([240.0], None), ([240.0, 30.0, 35.0], 35.0)])
def test_the_exact_trial_which_answers_every_item_says_nothing_of_the_others(
    seconds: list[float], expected: float | None, tmp_path: Path
) -> None:
    """A first trial of four minutes made a search of eight look like one of forty minutes."""
    spec, pace = prepared(tmp_path, 4000, search__itemsPerTrial=200, search__trialSeconds=30).spec, Pace(7.5, 2.0, 30.0)
    trials = [SimpleNamespace(user_attrs={"seconds": each}) for each in seconds]
    given: Any = SimpleNamespace(spec=spec, study=SimpleNamespace(complete=lambda: trials, get=lambda key: pace))
    assert pacing.longest_trial_seconds(given) == (expected or planner.estimated_trial_seconds(spec, pace)) < 40


@pytest.mark.parametrize(
    ("device_hours", "rungs", "candidates"),
    [(100, 8, 8), (4, 8, 5), (0.1, 8, planner.LEAST_CANDIDATES), (0.1, 2, 2), (100, 1, 1)],
)
def test_a_ladder_is_as_long_as_half_of_the_budget_pays_for(
    tmp_path: Path, device_hours: float, rungs: int, candidates: int
) -> None:
    """Ten pairs of blocks of a minute take 23 minutes and a bit."""
    spec = spec_for(
        tmp_path / "out", tmp_path / "items.jsonl", search__deviceHours=device_hours, search__rungs=rungs, certify__pairs=10,
        certify__blockSeconds=60,
    )  # fmt: skip
    assert planner.planned_candidates(spec, None) == candidates


def test_a_given_policy_is_the_only_candidate_of_its_plan(tmp_path: Path) -> None:
    topk = Policy.parse({"buckets": [{"minTokens": 8, "maxTokens": 64, "kind": "topk", "S": 3}]})
    spec = spec_for(tmp_path / "out", write_items(tmp_path / "items.jsonl", 1000), search__rungs=8)
    assert prepare(spec, topk).plan.rungs == 1 < prepare(spec).plan.rungs
