"""The plug-in behind a real HTTP server: `sere serve` in processes of its own, clients and all.

Two servers: Qwen3-MoE with live control by HTTP, and a DeepSeek-V2-like model that follows a policy directory.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sere_ext.calibrate import calibrate
from sere_ext.client import get_state, put_policy
from sere_ext.errors import ConflictError, PolicyError, SereError
from sere_ext.policy import EXACT_POLICY, Policy
from sere_ext.profile import ProfileKey
from sere_ext.watch import policy_files

TOKEN = "correct horse"
START_SECONDS = 540.0  # a slow start is no failure; beside other engines on the same two cores more than 300
pytestmark = pytest.mark.timeout(900)
TOPK = Policy.parse({"buckets": [{"minTokens": 2, "maxTokens": 64, "kind": "topk", "S": 2}]})


@contextmanager
def serving(model: Path, log: Path, *arguments: str, **environ: str) -> Iterator[str]:
    """`sere serve` on a free port of the loopback; yields its URL and ends it and all its children."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "sere_ext.cli", "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "16", "--dtype", "float32", *arguments]
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **environ}, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2).read()
                break
            except (OSError, urllib.error.URLError):
                if process.poll() is not None or time.monotonic() > deadline:
                    pytest.fail(f"the server did not start:\n{log.read_text()[-4000:]}")
                time.sleep(0.5)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def complete(url: str, model: Path, prompt: str, tokens: int = 16) -> str:
    body = {"model": str(model), "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        decoded = json.load(answer)
    if decoded["usage"]["completion_tokens"] != tokens:  # not the text's length: special tokens leave no text
        raise ValueError(f"{decoded['usage']['completion_tokens']} of {tokens} tokens")
    text: str = decoded["choices"][0]["text"]
    return text


class Load:
    """Clients that ask without pause; every answer is counted and every failure kept."""

    def __init__(self, url: str, model: Path, clients: int = 6) -> None:
        self.done = 0
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(url, model, n)) for n in range(clients)]

    def _run(self, url: str, model: Path, number: int) -> None:
        turn = 0
        while not self._stop.is_set():
            turn += 1
            try:
                complete(url, model, f"client {number} turn {turn}:")
                self.done += 1
            except Exception as error:
                self.failures.append(repr(error))

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def metrics_of(url: str) -> dict[str, float]:
    """`sere_` samples of /metrics by name and labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line.startswith("sere_")}


@pytest.fixture(scope="module")
def live(qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("log") / "live.log"
    with serving(qwen3, log, SERE_CONTROL_TOKEN=TOKEN, SERE_SLO_TPOT_MS="12.3") as url:
        yield url


def test_the_state_of_a_fresh_server(live: str, qwen3: Path) -> None:
    state = get_state(live)
    assert (state["ready"], state["source"], state["policyDigest"], state["error"]) == (True, "static", "exact", None)
    assert state["model"] == {"numExperts": 16, "topK": 4, "moeLayers": [0, 1, 2, 3]}
    assert state["key"]["device"] == "cpu"
    assert state["key"]["modelName"] == str(qwen3)


def test_switches_under_load_fail_no_request(live: str, qwen3: Path) -> None:
    quiet = [complete(live, qwen3, f"prompt {n}") for n in range(3)]
    with Load(live, qwen3) as load:
        for turn in range(10):
            wanted = TOPK if turn % 2 == 0 else EXACT_POLICY
            state = put_policy(live, wanted, clean=turn % 5 == 4, token=TOKEN)
            assert state["policyDigest"] == wanted.digest
            assert {rank["policyDigest"] for rank in state["ranks"]} == {wanted.digest}
            time.sleep(0.3)
    assert load.failures == []
    assert load.done > 10
    state = put_policy(live, EXACT_POLICY, clean=True, token=TOKEN)
    assert state["source"] == "http"
    rows = {name: row for name, row in state["counters"].items() if name.startswith(TOPK.digest)}
    assert rows[f"{TOPK.digest}|2-64"]["merged"] > 0
    assert [complete(live, qwen3, f"prompt {n}") for n in range(3)] == quiet, "exact again answers as before"


def test_metrics_tell_policy_experts_and_latency(live: str, qwen3: Path) -> None:
    put_policy(live, TOPK, token=TOKEN)
    with Load(live, qwen3):
        time.sleep(4)
    time.sleep(1.5)  # the workers are polled once a second
    found = metrics_of(live)
    assert found[f'sere_policy_info{{digest="{TOPK.digest}",source="http"}}'] == 1
    before = found['sere_active_experts{bucket="2-64",stage="before"}']
    after = found['sere_active_experts{bucket="2-64",stage="after"}']
    assert 0 < after < before <= 16
    assert found['sere_slots_total{bucket="2-64"}'] > 0
    assert found["sere_policy_switches_total"] >= 1
    assert found["sere_policy_generation"] == get_state(live)["generation"]
    labels = f'{{bucket="4-7",policy="{TOPK.digest}"}}'  # six clients
    assert found[f"sere_tpot_seconds_count{labels}"] > 0
    assert found[f"sere_ttft_seconds_count{labels}"] > 0
    assert any('le="0.0123"' in name for name in found), "an SLO limit must be a bound"
    mean = found[f"sere_tpot_seconds_sum{labels}"] / found[f"sere_tpot_seconds_count{labels}"]
    assert 0.0001 < mean < 5
    put_policy(live, EXACT_POLICY, token=TOKEN)


def test_refusals_over_http(live: str) -> None:
    for token in ("", "wrong"):
        with pytest.raises(SereError, match="Authorization: Bearer"):
            put_policy(live, TOPK, token=token)
    with pytest.raises(PolicyError, match="top-k of 4"):
        put_policy(live, Policy.parse({"buckets": [{"minTokens": 1, "kind": "topk", "S": 9}]}), token=TOKEN)
    with pytest.raises(PolicyError, match="sere calibrate"):
        put_policy(live, Policy.parse({"buckets": [{"minTokens": 1, "kind": "sere", "S": 2}]}), token=TOKEN)
    assert get_state(live)["policyDigest"] == "exact"


def test_a_port_in_use_ends_at_once_with_exit_code_2(live: str, qwen3: Path) -> None:
    port = live.rpartition(":")[2]
    command = [sys.executable, "-m", "sere_ext.cli", "serve", str(qwen3), "--host", "127.0.0.1", "--port", port]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert f"port {port} cannot be used" in ended.stderr


def wait_for(url: str, what: str, check: Any, seconds: float = 15.0) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while True:
        state = get_state(url)
        if check(state):
            return state
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:.0f} s for {what}: {state}")
        time.sleep(0.1)


def test_a_policy_directory_is_followed_without_a_failed_request(deepseek: Path, calibration: Path, tmp_path: Path) -> None:
    volume = tmp_path / "volume"
    volume.mkdir()
    meta = calibrate(str(deepseek), calibration, tmp_path / "deepseek.safetensors")
    sere = Policy.parse({"buckets": [{"minTokens": 2, "kind": "sere", "S": 1}], "similarityDigest": meta.digest})
    with serving(deepseek, tmp_path / "serve.log", SERE_POLICY_DIR=str(volume), SERE_CONTROL_TOKEN=TOKEN) as url:
        state = get_state(url)
        assert (state["ready"], state["source"]) == (False, "file")
        with pytest.raises(ConflictError, match="SERE_POLICY_DIR"):
            put_policy(url, TOPK, token=TOKEN)
        with Load(url, deepseek, clients=4) as load:
            (volume / "stable").write_text("exact")
            wait_for(url, "the first application", lambda s: s["ready"] and s["policyDigest"] == "exact")

            (volume / "pod.policy").write_text(sere.digest)
            state = wait_for(url, "an error", lambda s: s["error"])
            assert f"policy {sere.digest} is missing" in state["error"]
            assert state["policyDigest"] == "exact"

            for name, text in policy_files(sere, ProfileKey.model_validate(state["key"])).items():
                (volume / name).write_text(text)
            state = wait_for(url, "the missing artefact", lambda s: "similarity-" in (s["error"] or ""))
            digest = meta.digest.removeprefix("sha256:")[:12]
            artefact = (tmp_path / "deepseek.safetensors").read_bytes()
            (volume / f"similarity-{digest}.safetensors").write_bytes(artefact)
            state = wait_for(url, "the policy", lambda s: s["policyDigest"] == sere.digest)
            assert (state["error"], state["similarityDigest"]) == (None, meta.digest)
            time.sleep(1)

            (volume / "pod.override").write_text("exact")
            state = wait_for(url, "the override", lambda s: s["override"])
            assert state["policyDigest"] == "exact"
            (volume / "pod.override").write_text("")
            wait_for(url, "the policy again", lambda s: s["policyDigest"] == sere.digest and not s["override"])

            stale = ProfileKey.model_validate({**state["key"], "engineVersion": "0.31.0"})
            (volume / f"{sere.digest}.key.json").write_text(json.dumps(stale.to_json_dict()))
            state = wait_for(url, "PolicyStale", lambda s: "PolicyStale" in (s["error"] or ""))
            assert state["policyDigest"] == "exact"
        assert load.failures == []
        assert load.done > 0
        assert state["counters"][f"{sere.digest}|2-"]["rerouted"] > 0
