"""The tuning file: what is accepted, what is refused, and with which words."""

from pathlib import Path

import pytest
import yaml
from sere_autotune.options import leaves
from sere_autotune.spec import TuningSpec, load_spec, to_yaml
from sere_ext.errors import UsageError

WHOLE = """
model: Qwen/Qwen3-30B-A3B
engine: {maxModelLen: 8192, extraArgs: []}
similarity: qwen3.sim.safetensors
workload:
  dataset: sharegpt.jsonl
  load: {arrivals: poisson, requestsPerSecond: 4}
slo:
  tpotMs: {p95: 20}
  ttftMs: {p99: 500}
accuracy:
  maxDropPoints: 1.0
  confidence: 0.95
  tasks: [{file: items.jsonl, metric: numeric}]
search: {policies: [sere, topk, oea], trials: 60, deviceHours: 4}
out: runs/qwen3
"""


def spec(tmp_path: Path, change: dict | None = None, text: str = WHOLE) -> TuningSpec:
    path = tmp_path / "tuning.yaml"
    path.write_text(text)
    return load_spec(path, change)


def test_the_documented_file_is_read(tmp_path: Path) -> None:
    found = spec(tmp_path)
    assert found.slo.limits() == [("tpot", "p95", 20.0), ("ttft", "p99", 500.0)]
    assert found.workload.load.condition(0) == "equal rate, 4 requests/s"
    assert found.search.trials == 60


def test_only_model_tasks_and_one_limit_are_needed() -> None:
    found = load_spec(None, {("model",): "m", ("accuracy", "tasks"): "items.jsonl", ("slo", "tpotMs", "p95"): 20})
    assert found.workload.load.concurrency == (16,)
    assert found.accuracy.tasks[0].metric == "exact"
    again = TuningSpec.model_validate(yaml.safe_load(to_yaml(found)))
    assert again == found  # what --dry-run prints is a whole tuning file


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({("serch",): {}}, "serch: unknown field"),
        ({("search", "trails"): 3}, "search.trails: unknown field"),
        ({("engine", "extraArgs"): ["--max-model-len=4096"]}, "--max-model-len is set by the tuner"),
        ({("engine", "extraArgs"): ["--additional-config", "{}"]}, "--additional-config is set by the tuner"),
        ({("engine", "extraArgs"): ["--additional_config.sere={}"]}, "--additional-config is set by the tuner"),
        ({("slo",): {}}, "at least one latency limit"),
        ({("slo", "tpotMs", "p95"): -1}, "slo.tpotMs.p95"),
        ({("workload", "load"): {"concurrency": [4], "requestsPerSecond": 2}}, "not both"),
        ({("workload", "load"): {"concurrency": [16, 4]}}, "ascending"),
        ({("workload", "load"): {}}, "give concurrency"),
        ({("calibrate",): {"data": "c.jsonl"}}, "either similarity or calibrate"),
        ({("search", "policies"): ["exact"]}, "exact is always trial 0"),
        ({("accuracy", "tasks"): []}, "accuracy.tasks"),
        ({("accuracy", "tasks"): [{"file": "a", "metric": "regex"}]}, "needs pattern"),
        ({("search", "buckets"): [{"minTokens": 1}, {"minTokens": 9}]}, "2 buckets for 1 load levels"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, change: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words.replace("(", r"\(")) as caught:
        spec(tmp_path, change)
    assert caught.value.exit_code == 2


def test_a_missing_file_is_named_with_its_field(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"accuracy.tasks.0.file: no file at items.jsonl"):
        spec(tmp_path).check_files()
    with pytest.raises(UsageError, match="cannot read the tuning file"):
        load_spec(tmp_path / "none.yaml")


def test_no_yaml_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no YAML"):
        spec(tmp_path, text="model: [")
    with pytest.raises(UsageError, match="must be a mapping"):
        spec(tmp_path, text="- 1")


def test_every_leaf_has_a_flag_of_its_own() -> None:
    flags = [leaf.flag for leaf in leaves()]
    assert len(flags) == len(set(flags))
    assert {"--model", "--search-device-hours", "--slo-e2el-ms-p99", "--workload-load-requests-per-second"} <= set(flags)


def test_a_flag_replaces_its_rival_in_the_file(tmp_path: Path) -> None:
    found = spec(tmp_path, {("workload", "load", "concurrency"): [4, 16], ("calibrate", "data"): "c.jsonl"})
    assert found.workload.load.levels == (4, 16)
    assert found.similarity is None
