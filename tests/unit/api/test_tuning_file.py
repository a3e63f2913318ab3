"""What a SereTuningJob says, the tuner understands; and what the tuner refuses, the API server refuses as well."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from jsonschema import Draft4Validator
from pydantic import ValidationError

from sere_autotune.tuning.spec import TuningSpec
from sere_ext.contract.errors import SpecError
from sere_operator.api.common import parse_spec
from sere_operator.api.crdgen import DEFINITIONS
from sere_operator.api.rules import RULES
from sere_operator.api.tuning import SereTuningJobSpec
from sere_operator.plan.objects.pods import Storage
from sere_operator.plan.tuning.objects import tuning_file
from tests.kit import tuning_bounds
from tests.kit.tuning_bounds import Case


def job(change: dict[str, Any]) -> SereTuningJobSpec:
    """The tuned sample as a tuning job, with `change` laid over its top level, one level deep."""
    kept = tuning_bounds.base_spec()
    for field, value in change.items():
        kept[field] = {**kept[field], **value}
    return parse_spec(SereTuningJobSpec, kept)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"tuning": {"workload": {"load": {"concurrency": [4, 16]}}, "rungs": 1, "policies": ["sere"]}},
        {"tuning": {"workload": {"dataset": {"uri": "pvc://data/chat.jsonl"}, "load": {"requestsPerSecond": 2, "arrivals": "poisson"}}}},
        {"tuning": {"similarity": {"uri": "pvc://data/sim.safetensors"}}},
        {"tuning": {"similarity": None, "policies": ["topk", "oea"]}},
        {"tuning": {"search": {"trialSeconds": 8, "itemsPerTrial": 100}, "certify": {"pairs": 4, "blockSeconds": 10, "items": 400}}},
        {"slo": {"tpotMs": {"p50": 9, "p95": 20, "p99": 30}, "e2elMs": {"p99": 900}}},
        {"accuracy": {"searchItems": 200, "tasks": [{"uri": "pvc://a/b", "metric": "regex", "pattern": "(x)", "maxTokens": 9, "stop": ["\n"]}]}},
        {"accuracy": {"tasks": [{"configMap": {"name": "items", "key": "items.jsonl"}}]}},
        {"engine": {"extraArgs": ["--enforce-eager"], "tensorParallelSize": 2}},
    ],
    ids=["sample", "closed loop", "dataset", "similarity made before", "no similarity", "the tuner's sections", "limits", "regex", "config map", "engine"],
)  # fmt: skip
def test_the_tuner_reads_what_the_operator_writes(change: dict[str, Any]) -> None:
    spec = job(change)
    read = TuningSpec.model_validate(tuning_file(spec, Storage()))
    assert (read.similarity is None and read.calibrate is None) == (spec.tuning.similarity is None)
    assert read.accuracy.max_drop_points == spec.accuracy.max_drop_points
    assert read.search.trials == spec.tuning.trials
    assert read.slo.limits() == [
        (metric.removesuffix("Ms"), statistic, limit)
        for metric, limits in spec.slo.to_json_dict().items()
        for statistic, limit in limits.items()
    ]


@pytest.fixture(scope="module")
def server() -> Draft4Validator:
    """The schema of a SereTuningJob's spec as the API server has it; bounds of draft 4 are open or closed by a boolean."""
    definition = next(d for d in DEFINITIONS if d.kind == "SereTuningJob").to_dict()
    schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
    return Draft4Validator(_with_rules_as_bounds(schema))


def _with_rules_as_bounds(schema: Any) -> Any:
    """The schema with each rule of the form `self > 0.5`, which fractional bounds have, as a bound in place of the bound."""
    if isinstance(schema, list):
        return [_with_rules_as_bounds(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _with_rules_as_bounds(value) for key, value in schema.items()}
    for rule in schema.get("x-kubernetes-validations", []):
        words = rule["rule"].split()
        if len(words) == 3 and words[0] == "self" and words[1] in (">", ">=", "<", "<="):
            name = "inimum" if words[1].startswith(">") else "aximum"
            found |= {f"m{name}": float(words[2]), f"exclusiveM{name}": not words[1].endswith("=")}
    return found


@pytest.mark.parametrize("case", [*tuning_bounds.cases()], ids=str)
def test_the_server_and_the_tuner_refuse_the_same_values(case: Case, server: Draft4Validator) -> None:
    told = [error.message for error in server.iter_errors(case.spec())]
    assert (not told) == case.fits, told
    assert taken_by_the_tuner(case) == case.fits


def taken_by_the_tuner(case: Case) -> bool:
    try:
        TuningSpec.model_validate(tuning_bounds.tuning_yaml(case.spec()))
    except ValidationError:
        return False
    return True


def test_there_is_a_case_for_what_the_two_once_disagreed_on() -> None:
    found = {(case.place, case.fits) for case in tuning_bounds.cases()}
    for place in (
        ("accuracy", "confidence"),
        ("engine", "maxModelLen"),
        ("tuning", "search", "itemsPerTrial"),
        ("slo", "tpotMs", "p90"),
    ):
        assert {(place, True), (place, False)} <= found
    assert Case(("accuracy", "confidence"), 0.5, False) in [*tuning_bounds.cases()]
    mean = {**tuning_bounds.base_spec(), "slo": {"tpotMs": {"mean": 5}}}
    with pytest.raises(SpecError, match="unknown field"):
        parse_spec(SereTuningJobSpec, mean)
    with pytest.raises(ValidationError, match="mean"):
        TuningSpec.model_validate(tuning_bounds.tuning_yaml(mean))


@pytest.mark.parametrize("case", [*tuning_bounds.flags()], ids=str)
def test_flags_that_are_set_otherwise_are_refused_in_every_form(case: Case) -> None:
    """By the models of both sides, and by the list of forms that the API server is given."""
    assert taken_by_the_tuner(case) == case.fits
    argument = case.value[0]
    listed = re.search(r"n in (\[.*?\])", RULES["Engine"][0].rule)
    assert listed is not None
    name = argument.split("=")[0].split(".")[0].replace("_", "-")
    owned = {name, name.replace("--no-", "--")} & set(yaml.safe_load(listed[1]))
    assert bool(owned or re.search(r"^-[^=]*\s", argument) or "$(" in argument) != case.fits


def test_every_metric_and_kind_goes_through() -> None:
    """Whatever the resource takes ends in a tuning.yaml that says the same."""
    tasks = [
        {"uri": "pvc://a/b", "metric": metric, **({"pattern": "(x)"} if metric == "regex" else {})}
        for metric in ("exact", "numeric", "regex", "contains")
    ]
    spec = job({"accuracy": {"tasks": tasks}, "tuning": {"policies": ["sere", "topk", "oea", "hybrid"], "rungs": 2}})
    read = TuningSpec.model_validate(tuning_file(spec, Storage()))
    assert [task.metric for task in read.accuracy.tasks] == ["exact", "numeric", "regex", "contains"]
    assert read.search.policies == spec.tuning.policies
    assert read.search.rungs == 2
