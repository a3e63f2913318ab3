"""The tuner through its command line on the real engine and the trained model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sere_autotune.planner import LOAD_PAIRS
from sere_ext.contract.profile import Profile
from tests.kit import ROOT

TRIALS = 5
COMMAND_S = 900  # that one command may take: minutes on quiet cores, and an engine alone may start for five on busy ones


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The widened model, items, calibration text, and a tuning file that calibrates by itself."""
    folder = tmp_path_factory.mktemp("tune")
    make(folder, "widen", str(ROOT / "tests" / "assets" / "tiny_moe"), str(folder / "model"))
    make(folder, "items", "--split", "eval", "--count", "2400", "--seed", "5", "--out", str(folder / "items.jsonl"))
    make(folder, "items", "--split", "calibration", "--count", "48", "--seed", "5", "--out", str(folder / "calib.jsonl"))
    (folder / "tuning.yaml").write_text(json.dumps({
        "model": str(folder / "model"),
        "engine": {"maxModelLen": 128, "extraArgs": ["--dtype", "float32", "--enforce-eager", "--max-num-seqs", "32"]},
        "calibrate": {"data": str(folder / "calib.jsonl")},
        "workload": {"load": {"concurrency": [16]}},
        "slo": {"tpotMs": {"p95": 2000}, "ttftMs": {"p99": 60000}},
        "accuracy": {"maxDropPoints": 2.0, "tasks": [{"file": str(folder / "items.jsonl"), "maxTokens": 24}], "searchItems": 400},
        "search": {"trials": TRIALS, "rungs": 1, "deviceHours": 0.5, "itemsPerTrial": 200, "trialSeconds": 60},
        "certify": {"pairs": 5, "blockSeconds": 4, "mostLoad": False},
        "out": str(folder / "run"),
    }))  # fmt: skip
    return folder


def make(folder: Path, script: str, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", f"tests.assets.make.{script}", *arguments], check=True, capture_output=True, cwd=ROOT)


def command(ground: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "sere_ext.cli.main", "tune", "-f", str(ground / "tuning.yaml"), *arguments]


def tune(ground: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(ground, *arguments), capture_output=True, text=True, timeout=COMMAND_S, check=False)


def marked(mark: str) -> list[int]:
    """Living processes that carry a mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            state = (path.parent / "stat").read_text().rsplit(")", 1)[1].split()[0]
            # Ray's own agents look for their parent every few minutes only; they hold no engine.
            agent = b"Agent" in (path.parent / "cmdline").read_bytes()
            if mark.encode() in path.read_bytes() and state != "Z" and not agent:
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.timeout(3 * COMMAND_S)
def test_killed_with_minus_9_and_started_again_it_ends_with_a_certificate(ground: Path) -> None:
    mark = f"SERE_TEST_MARK={os.getpid()}-{time.time_ns()}"
    victim = subprocess.Popen(
        command(ground), stderr=subprocess.PIPE, text=True, env={**os.environ, mark.split("=")[0]: mark.split("=")[1]}
    )
    assert victim.stderr is not None
    seen = []
    for line in victim.stderr:
        seen.append(line)
        if line.startswith("  trial 2:"):  # in flight
            break
    assert victim.poll() is None, "".join(seen)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    victim.stderr.close()
    deadline = time.monotonic() + 60
    while (left := marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left, [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left]

    done = tune(ground, "--json")
    # Five short trials on a busy machine may find nothing that is surely faster: that ends with 3, and says so.
    assert done.returncode in (0, 3), done.stderr
    summary = json.loads(done.stdout)
    assert len(summary["trials"]) == TRIALS
    assert summary["trials"][0]["digest"] == "exact"
    assert "(2 of 5 done before)" in done.stderr
    assert ("Chosen   " if done.returncode == 0 else "nothing is feasible") in done.stderr
    assert (ground / "run" / "profile.json").exists() == (done.returncode == 0)

    again = tune(ground)  # a finished study answers at once
    assert again.returncode == done.returncode
    assert "starting the engine" not in again.stderr


@pytest.mark.timeout(COMMAND_S + 60)
def test_the_accuracy_of_a_mild_policy_is_shown_and_its_profile_is_that_of_a_faster_one(ground: Path) -> None:
    """Three experts of four cost this model next to nothing; whether they gain anything is the machine's mood, and the verdict's."""
    policy = ground / "policy.json"
    policy.write_text(json.dumps({"buckets": [{"minTokens": 2, "maxTokens": 128, "kind": "topk", "S": 3}]}))
    arguments = [
        sys.executable, "-m", "sere_ext.cli.main", "certify", str(policy), "-f", str(ground / "tuning.yaml"),
        "--search-policies", "[topk]", "--out", str(ground / "certify"), "--json", "--certify-most-load", "true",
    ]  # fmt: skip
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=COMMAND_S, check=False)
    summary = json.loads(done.stdout)
    (row,) = summary["ladder"]
    result = row["result"]
    assert result["p_value"] <= result["alpha"] == 0.0375
    assert result["active_after"] < result["active_before"] <= 16
    faster = result["speed"]["low"] > 1
    assert row["verdict"] == ("passed" if faster else "slower" if result["speed"]["high"] < 1 else "undecided"), result["reason"]
    assert done.returncode == (0 if faster else 3), done.stderr
    assert (ground / "certify" / "profile.json").exists() == faster
    if faster:
        profile = Profile.read(ground / "certify" / "profile.json").spec
        assert profile.evidence.certified and profile.evidence.speed_verdict == "faster"
        assert profile.key.device == "cpu"
        assert_most_load(summary)


def assert_most_load(summary: dict[str, Any]) -> None:
    """Whether a greater load is shown depends on the machine; that loads up to the engine's own limit were measured does not."""
    found = summary["mostLoad"]
    assert found["load"] is not None, found["sentence"]
    assert found["tuned"] == 16
    assert found["probes"][0]["load"] == 32, "--max-num-seqs of the engine, read from the engine"
    if found["ratio"] is None:
        assert found["load"] == 16 and found["reason"], "no greater load was shown, and the reason is given"
    else:
        assert 16 < found["load"] <= 32
        assert found["ratio"]["low"] >= 1, "the policy was shown to be as fast as exact routing at the tuned load"
        assert found["ratio"]["pairs"] in (LOAD_PAIRS, 2 * LOAD_PAIRS), "as many pairs again where the first do not show it"


def engine_core(mark: str) -> int:
    """The process id of the running engine core of a marked tuner."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for pid in marked(mark):
            if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        time.sleep(0.2)
    raise AssertionError("no engine core")


@pytest.mark.timeout(COMMAND_S + 60)
def test_an_engine_killed_in_the_search_and_in_certification_is_replaced_within_its_budget(ground: Path) -> None:
    policy = ground / "killed.json"
    policy.write_text(json.dumps({"buckets": [{"minTokens": 2, "maxTokens": 128, "kind": "topk", "S": 3}]}))
    mark = f"SERE_TEST_MARK={os.getpid()}-{time.time_ns()}"
    tuner = subprocess.Popen(
        [
            sys.executable, "-m", "sere_ext.cli.main", "certify", str(policy), "-f", str(ground / "tuning.yaml"),
            "--search-policies", "[topk]", "--out", str(ground / "killed"), "--certify-pairs", "2", "--accuracy-max-drop-points", "3",
        ],
        stderr=subprocess.PIPE, text=True, env={**os.environ, mark.split("=")[0]: mark.split("=")[1]},
    )  # fmt: skip
    assert tuner.stderr is not None
    lines, kills, waits, began = [], [], [], time.monotonic()
    for line in tuner.stderr:
        lines.append(line)
        if not kills and line.startswith("  trial 0:"):
            started_s = time.monotonic() - began  # the program, its engine's start, and one block
        if kills and len(waits) < len(kills):
            waits.append(time.monotonic() - kills[-1])  # until the next line, which follows the repeated block
        if (len(kills) == 0 and line.startswith("  trial 0:")) or (len(kills) == 1 and line.startswith("  block 1 of")):
            time.sleep(1.0)
            os.kill(engine_core(mark), signal.SIGKILL)
            kills.append(time.monotonic())
    tuner.stderr.close()
    assert tuner.wait(timeout=60) in (0, 3), "".join(lines)
    assert len(kills) == 2, "".join(lines)
    assert max(waits) < 60 + 3 * started_s, "a new engine's start and one block, not the patience of a hung one"
    assert any(line.startswith("  block 4 of 4") for line in lines), "".join(lines)
    assert not any("crashed" in line for line in lines), "".join(lines)


@pytest.mark.timeout(COMMAND_S + 60)
def test_an_impossible_latency_limit_ends_with_3_and_the_nearest_miss(ground: Path) -> None:
    similarity = ground / "run" / "similarity.safetensors"
    extra = ["--similarity", str(similarity)] if similarity.exists() else ["--search-policies", "[topk]"]
    done = tune(ground, "--slo-tpot-ms-p95", "0.01", "--search-trials", "2", "--out", str(ground / "slo"), *extra)
    assert done.returncode == 3, done.stderr
    assert "over the limit of 0.01 ms" in done.stderr
    assert "what would have to give: slo.tpotMs.p95" in done.stderr
    assert "exact routing stays" in done.stderr
    assert not (ground / "slo" / "profile.json").exists()
    assert (ground / "slo" / "report.html").exists()


def test_an_accuracy_budget_of_nothing_ends_with_5_before_anything_is_spent(ground: Path) -> None:
    done = tune(ground, "--accuracy-max-drop-points", "0", "--out", str(ground / "zero"))
    assert done.returncode == 5, done.stderr
    assert "cannot be certified by any number of items" in done.stderr
    assert not (ground / "zero").exists()


def test_the_dry_run_starts_nothing_and_prints_the_plan_or_a_whole_file(ground: Path) -> None:
    done = tune(ground, "--dry-run", "--out", str(ground / "dry"))
    assert done.returncode == 0, done.stderr
    assert "this limit can be certified" in done.stdout
    assert "blockSeconds: 4" in tune(ground, "--dry-run", "--yaml", "--out", str(ground / "dry")).stdout
    assert not (ground / "dry").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--calibrate-data", "none.jsonl"], "calibrate.data: no file at none.jsonl"),
        (["--engine-extra-args", "[--additional-config, '{}']"], "--additional-config may not stand here"),
        (["--similarity", "{items}"], "no safetensors file"),
        (["--model", "{dense}"], "dense model"),
        (["--search-trials", "none"], "search.trials"),
        (["--publish", "secret/a/b"], "give configmap/<namespace>/<name>"),
    ],
)
def test_bad_input_ends_with_2_and_says_what_to_do(ground: Path, tmp_path: Path, arguments: list[str], words: str) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    filled = [a.replace("{items}", str(ground / "items.jsonl")).replace("{dense}", str(tmp_path)) for a in arguments]
    done = tune(ground, *filled)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
