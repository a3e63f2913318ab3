"""The tuning file: what is accepted, what is refused, and with which words."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from sere_autotune import commands
from sere_autotune.tuning.file import load_spec, to_yaml
from sere_autotune.tuning.options import leaves, overrides
from sere_autotune.tuning.spec import TuningSpec
from sere_ext.contract.errors import ExitCode, UsageError
from sere_ext.contract.policy import Kind
from tests.kit.planted import spec_for, write_items

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


@pytest.mark.parametrize("command", ["tune", "certify"])
def test_a_tuning_file_that_is_not_there_is_told_before_anything_that_is_missing(command: str, tmp_path: Path) -> None:
    app = typer.Typer()
    commands.register(app)
    refused = CliRunner().invoke(app, [command, "-f", str(tmp_path / "nope.yaml")]).exception
    assert isinstance(refused, UsageError) and "nope.yaml: No such file" in str(refused)


def test_certify_without_a_policy_asks_for_one(tmp_path: Path) -> None:
    (tmp_path / "tuning.yaml").write_text(WHOLE)
    app = typer.Typer()
    commands.register(app)
    asked = CliRunner().invoke(app, ["certify", "-f", str(tmp_path / "tuning.yaml")])
    assert asked.exit_code == ExitCode.BAD_INPUT and "Missing argument" in asked.output


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
        ({("serch",): {}}, "serch: unknown field; did you mean search?"),
        ({("search", "trails"): 3}, "search.trails: unknown field; did you mean trials?"),
        ({("search", "device_hours_"): 3}, "search.device_hours_: unknown field; did you mean deviceHours?"),
        ({("accuracy", "tasks"): [{"fiel": "a"}]}, "accuracy.tasks.0.fiel: unknown field; did you mean fields?"),
        ({("slo", "tpotMs", "p96"): 3}, "slo.tpotMs.p96: unknown field; did you mean p90 or p95 or p99?"),
        ({("calibrate", "zzz"): 3}, "calibrate.zzz: unknown field; remove it, or use one of data"),
        ({("search", "policies"): ["seer"]}, "search.policies.0: .*; did you mean sere?"),
        ({("search", "sampler"): "tpee"}, "search.sampler: .*; did you mean tpe?"),
        ({("engine", "extraArgs"): ["--max-model-len=4096"]}, "--max-model-len may not stand here: set engine.maxModelLen"),
        (
            {("engine", "extraArgs"): ["--additional-config", "{}"]},
            "--additional-config may not stand here: the routing policy is put there",
        ),
        (
            {("engine", "extraArgs"): ["--additional_config.sere={}"]},
            "--additional_config.sere (--additional-config) may not stand here",
        ),
        ({("slo",): {}}, "slo: give at least one of tpotMs, ttftMs and e2elMs"),
        ({("slo", "tpotMs", "p95"): -1}, "slo.tpotMs.p95"),
        (
            {("workload", "load"): {"concurrency": [4], "requestsPerSecond": 2}},
            "give exactly one of requestsPerSecond and concurrency",
        ),
        ({("workload", "load"): {"concurrency": [16, 4]}}, "ascending"),
        ({("workload", "load"): {}}, "give exactly one of requestsPerSecond and concurrency"),
        ({("calibrate",): {"data": "c.jsonl"}}, "give similarity or calibrate, not both"),
        ({("search", "minShare"): [0, 1.5]}, "search.minShare.1: Input should be less than or equal to 1"),
        ({("search", "minShare"): []}, "search.minShare: the list should have at least 1 item"),
        (
            {("search", "policies"): ["exact"]},
            "search.policies.0: Input should be 'sere', 'topk', 'oea' or 'hybrid' (got 'exact')",
        ),
        ({("slo", "tpotMs"): 20}, "slo.tpotMs: must be an object with fields of p50, p90, p95, p99 (got 20)"),
        ({("search", "trials"): "many"}, "search.trials: Input should be a whole number (got 'many')"),
        ({("accuracy", "tasks"): []}, "accuracy.tasks"),
        ({("accuracy", "tasks"): [{"file": "a", "metric": "regex"}]}, "needs pattern"),
        ({("search", "buckets"): [{"minTokens": 1}, {"minTokens": 9}]}, "2 buckets for 1 load levels"),
    ],
)
def test_bad_input_is_named(tmp_path: Path, change: dict, words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words).replace(r"\.\*", ".*")) as caught:
        spec(tmp_path, change)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("tasks", [[{"file": "a", "metric": "exat"}], [{"file": "a"}, {"file": "b", "metric": "exat"}]])
def test_a_bad_task_is_told_once(tmp_path: Path, tasks: list[dict]) -> None:
    with pytest.raises(UsageError) as caught:
        spec(tmp_path, {("accuracy", "tasks"): tasks})
    assert str(caught.value).endswith(
        f"accuracy.tasks.{len(tasks) - 1}.metric: Input should be 'exact', 'numeric', 'regex' or 'contains' (got 'exat'); "
        "did you mean exact?"
    )
    assert str(caught.value).count("accuracy.tasks") == 1


def test_a_flag_that_cannot_be_read_is_one_sentence() -> None:
    with pytest.raises(UsageError, match=r"^--search-policies \[sere: cannot be read as YAML \(line 1, [^\n]*$"):
        overrides({"search_policies": "[sere"})
    assert overrides({"out": "7", "search_trials": "7"}) == {("out",): "7", ("search", "trials"): 7}


def test_what_is_wrong_is_not_said_of_the_file_alone_where_a_flag_may_be_wrong(tmp_path: Path) -> None:
    path = tmp_path / "tuning.yaml"
    path.write_text("model: m\n")
    with pytest.raises(UsageError, match=r"^\S+tuning.yaml: "):
        load_spec(path)
    with pytest.raises(UsageError, match=r"^\S+tuning.yaml and flags: .*search.trials"):
        load_spec(path, {("search", "trials"): "many"})
    with pytest.raises(UsageError, match=r"^flags alone, without -f tuning.yaml: "):
        load_spec(None)


def test_a_missing_file_is_named_with_its_field(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"accuracy.tasks.0.file: no file at items.jsonl"):
        spec(tmp_path).check_files()
    with pytest.raises(UsageError, match="cannot read the tuning file"):
        load_spec(tmp_path / "none.yaml")


def test_one_value_stands_for_a_list_of_it(tmp_path: Path) -> None:
    search = spec(tmp_path, {("search", "policies"): "oea", ("search", "minShare"): 0.5, ("search", "sValues"): 2}).search
    assert (search.policies, search.min_share, search.s_values) == ((Kind.OEA,), (0.5,), (2.0,))


def test_no_yaml_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be read as YAML \(line 2, column 1: .*\); correct that place$") as caught:
        spec(tmp_path, text="model: [\n")
    assert "\n" not in str(caught.value)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="it is no text"):
        load_spec(tmp_path / "binary.yaml")
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


def test_what_is_missing_is_told_with_what_to_give(tmp_path: Path) -> None:
    lacking = re.sub(r"slo:\n.*\n.*\n", "", WHOLE)
    with pytest.raises(
        UsageError, match=r"tuning.yaml: slo: is missing; give a latency limit, such as {tpotMs: {p95: 50}} \(--slo-"
    ):
        spec(tmp_path, text=lacking)
    with pytest.raises(UsageError) as refused:
        load_spec(None, {})
    told = str(refused.value)
    assert "model: is missing; give model name or folder" in told
    assert "accuracy: is missing; give labelled items, such as {tasks: [items.jsonl]} (--accuracy-tasks items.jsonl)" in told
    assert "Field required" not in told


def test_the_dry_run_is_plain_and_whole_in_a_pipe(tmp_path: Path) -> None:
    """No colours, no line broken at the width of some screen: each line can be searched for, and the file of --yaml can be read back."""
    items = write_items(tmp_path / f"{'long ' * 40}items.jsonl", 1200)
    file = tmp_path / "tuning.yaml"
    file.write_text(to_yaml(spec_for(tmp_path / "out", items)))
    command = [sys.executable, "-m", "sere_ext.cli.main", "tune", "-f", str(file), "--dry-run"]
    narrow = {**os.environ, "COLUMNS": "40", "TERM": "xterm-256color", "FORCE_COLOR": "1", "XDG_STATE_HOME": str(tmp_path)}
    plan, whole = (
        subprocess.run([*command, *more], capture_output=True, text=True, env=narrow, check=False) for more in ([], ["--yaml"])
    )
    assert (plan.returncode, plan.stderr, whole.returncode, whole.stderr) == (0, "", 0, "")
    assert "\x1b" not in plan.stdout + whole.stdout
    words = [line.split()[0] for line in plan.stdout.splitlines() if line[0] != " "]
    assert words == ["Plan", "Time", "Budget", "Accuracy", "Similarity", "Note", "File"], "what is decided on comes first"
    assert any(len(line) > 80 for line in plan.stdout.splitlines())
    assert plan.stdout.endswith("--yaml prints the whole tuning file, with every default\n")
    assert str(items) in whole.stdout and whole.stdout == file.read_text()


@pytest.mark.parametrize("others", [[], ["--dry-run", "--json"], ["--dry-run", "--with-engine"]])
def test_the_whole_file_is_printed_by_a_dry_run_alone(others: list[str]) -> None:
    app = typer.Typer()
    commands.register(app)
    flags = ["--model", "m", "--slo-tpot-ms-p95", "40", "--accuracy-tasks", "i"]
    done = CliRunner().invoke(app, ["tune", *flags, "--yaml", *others])
    assert isinstance(done.exception, UsageError) and "--yaml belongs to --dry-run, without" in str(done.exception)
