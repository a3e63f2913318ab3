"""What a SereTuningJob says, the tuner understands: the operator's tuning.yaml parses as the tuner's own model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from sere_autotune.tuning.spec import TUNED_FLAGS, TuningSpec
from sere_operator.api.common import MANAGED_FLAGS, parse_spec
from sere_operator.api.tuning import Metric, SearchKind, SereTuningJobSpec
from sere_operator.plan.objects.pods import Storage
from sere_operator.plan.tuning.objects import tuning_file

SAMPLE = Path(__file__).parents[3] / "manifests" / "samples" / "tuned.yaml"


def job(change: dict[str, Any]) -> SereTuningJobSpec:
    """The tuned sample as a tuning job, with `change` laid over its top level, one level deep."""
    spec = yaml.safe_load(SAMPLE.read_text())["spec"]
    kept = {key: copy.deepcopy(spec[key]) for key in ("model", "engine", "resources", "slo", "accuracy", "tuning")}
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
        {"tuning": {"search": {"trialSeconds": 8, "itemsPerTrial": 100}, "certify": {"pairs": 4, "blockSeconds": 10, "items": 400}}},
        {"slo": {"tpotMs": {"p50": 9, "p95": 20, "p99": 30}, "e2elMs": {"p99": 900}}},
        {"accuracy": {"searchItems": 200, "tasks": [{"uri": "pvc://a/b", "metric": "regex", "pattern": "(x)", "maxTokens": 9, "stop": ["\n"]}]}},
        {"accuracy": {"tasks": [{"configMap": {"name": "items", "key": "items.jsonl"}}]}},
        {"engine": {"extraArgs": ["--enforce-eager"], "tensorParallelSize": 2}},
    ],
    ids=["sample", "closed loop", "dataset", "similarity made before", "the tuner's sections", "limits", "regex", "config map", "engine"],
)  # fmt: skip
def test_the_tuner_reads_what_the_operator_writes(change: dict[str, Any]) -> None:
    spec = job(change)
    read = TuningSpec.model_validate(tuning_file(spec, Storage()))
    assert read.accuracy.max_drop_points == spec.accuracy.max_drop_points
    assert read.search.trials == spec.tuning.trials
    assert read.slo.limits() == [
        (metric.removesuffix("Ms"), statistic, limit)
        for metric, limits in spec.slo.to_json_dict().items()
        for statistic, limit in limits.items()
    ]


@pytest.mark.parametrize("metric", list(Metric))
def test_every_metric_is_one_of_the_tuner(metric: Metric) -> None:
    pattern = {"pattern": "(x)"} if metric is Metric.REGEX else {}
    tuning_spec = job({"accuracy": {"tasks": [{"uri": "pvc://a/b", "metric": metric.value, **pattern}]}})
    TuningSpec.model_validate(tuning_file(tuning_spec, Storage()))


def test_every_kind_is_one_of_the_tuner() -> None:
    tuning_spec = job({"tuning": {"policies": [kind.value for kind in SearchKind]}})
    assert [kind.value for kind in TuningSpec.model_validate(tuning_file(tuning_spec, Storage())).search.policies] == list(
        SearchKind
    )


def test_flags_that_the_tuner_refuses_are_refused_at_apply() -> None:
    """Else a spec would be accepted and its tuning job end with bad input."""
    assert set(TUNED_FLAGS) <= set(MANAGED_FLAGS)
