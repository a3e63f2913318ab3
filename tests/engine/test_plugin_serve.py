"""The plug-in behind a real HTTP server: `sere serve` in processes of its own, clients and all.

Two servers: Qwen3-MoE with live control by HTTP, and a DeepSeek-V2-like model that follows a policy directory.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sere_ext.calibration.run import calibrate
from sere_ext.contract.errors import ConflictError, PolicyError, UnauthorizedError
from sere_ext.contract.policy import EXACT_POLICY, Policy
from sere_ext.contract.shards import split
from sere_ext.contract.state import EngineState, ModelShape
from sere_ext.contract.volume import key_file, piece_name, policy_files, similarity_file
from sere_ext.control.client import get_state, put_policy
from sere_ext.similarity.file import packed_meta, read_similarity, write_similarity
from tests.kit.serving import Load, Server, complete, metrics_of, serving
from tests.kit.states import counted

TOKEN = "correct horse"
pytestmark = pytest.mark.timeout(900)
TOPK = Policy.parse({"buckets": [{"minTokens": 2, "maxTokens": 64, "kind": "topk", "S": 2}]})


@pytest.fixture(scope="module")
def server(qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "live.log"
    with serving(qwen3, log, SERE_CONTROL_TOKEN=TOKEN) as running:
        yield running


@pytest.fixture
def live(server: Server) -> str:
    return server.url


def test_the_state_of_a_fresh_server(live: str, qwen3: Path) -> None:
    state = get_state(live)
    assert (state.ready, state.source, state.policy_digest, state.error) == (True, "static", "exact", None)
    assert state.model == ModelShape(num_experts=16, top_k=4, moe_layers=(0, 1, 2, 3))
    assert state.key.device == "cpu"
    assert state.key.model_name == str(qwen3)


def test_a_hundred_switches_under_load_fail_no_request_and_leave_nothing_behind(server: Server, qwen3: Path) -> None:
    """The short form of `make soak-switches`."""
    live = server.url
    quiet = [complete(live, qwen3, f"prompt {n}") for n in range(3)]
    generation, switches = get_state(live).generation, get_state(live).switches
    with Load(live, qwen3) as load:
        for turn in range(1, 101):
            wanted = TOPK if turn % 2 else EXACT_POLICY
            state = put_policy(live, wanted, clean=turn % 25 == 0, token=TOKEN)
            assert {(rank.policy_digest, rank.generation) for rank in state.ranks} == {(wanted.digest, generation + turn)}
            if turn == 20:
                resident = sum(server.resident_mib().values())
        grown = sum(server.resident_mib().values()) - resident
    assert load.failures == []
    assert load.done > 10
    assert grown < 0.4 * 80, "MiB: 80 switches may not cost 0.4 MiB each"
    state = put_policy(live, EXACT_POLICY, clean=True, token=TOKEN)
    assert (state.source, state.switches, state.error) == ("http", switches + 100, None)
    assert counted(state, TOPK).merged > 0
    assert [complete(live, qwen3, f"prompt {n}") for n in range(3)] == quiet, "exact again answers as before"


def test_metrics_tell_policy_experts_and_latency(live: str, qwen3: Path) -> None:
    put_policy(live, TOPK, token=TOKEN)
    with Load(live, qwen3):
        time.sleep(4)
    time.sleep(1.5)  # the workers are polled once a second
    found = metrics_of(live)
    assert found[f'sere_policy_info{{digest="{TOPK.digest}",source="http"}}'] == 1
    before = found['sere_active_experts{bucket="2-64",layers="all",stage="before"}']
    after = found['sere_active_experts{bucket="2-64",layers="all",stage="after"}']
    assert 0 < after < before <= 16
    slots = found['sere_slots_total{bucket="2-64",layers="all"}']
    assert 0 < found['sere_merged_slots_total{bucket="2-64",layers="all"}'] < slots
    assert found["sere_policy_error"] == 0
    assert found["sere_policy_switches_total"] >= 1
    assert found["sere_policy_generation"] == get_state(live).generation
    labels = f'{{bucket="4-7",policy="{TOPK.digest}"}}'  # six clients
    assert found[f"sere_tpot_seconds_count{labels}"] > 0
    assert found[f"sere_ttft_seconds_count{labels}"] > 0
    mean = found[f"sere_tpot_seconds_sum{labels}"] / found[f"sere_tpot_seconds_count{labels}"]
    assert 0.0001 < mean < 5
    put_policy(live, EXACT_POLICY, token=TOKEN)


def test_refusals_over_http(live: str) -> None:
    for token, says in (("", "no token was sent"), ("wrong", "that is not the token")):
        with pytest.raises(UnauthorizedError, match=says):
            put_policy(live, TOPK, token=token)
    with pytest.raises(PolicyError, match="top-k of 4"):
        put_policy(live, Policy.parse({"buckets": [{"minTokens": 1, "kind": "topk", "S": 9}]}), token=TOKEN)
    with pytest.raises(PolicyError, match="sere calibrate"):
        put_policy(live, Policy.parse({"buckets": [{"minTokens": 1, "kind": "sere", "S": 2}]}), token=TOKEN)
    assert get_state(live).policy_digest == "exact"


def test_a_port_in_use_ends_at_once_with_exit_code_2(live: str, qwen3: Path) -> None:
    port = live.rpartition(":")[2]
    command = [sys.executable, "-m", "sere_ext.cli.main", "serve", str(qwen3), "--host", "127.0.0.1", "--port", port]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 2
    assert f"port {port} cannot be used" in ended.stderr


def wait_for(url: str, what: str, check: Any, seconds: float = 60.0) -> EngineState:
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
    calibrate(str(deepseek), calibration, tmp_path / "plain.safetensors")
    plain = read_similarity(tmp_path / "plain.safetensors")
    # In one byte per pair, as tuning in a cluster packs it.
    meta = write_similarity(tmp_path / "packed.safetensors", packed_meta(plain), plain.matrices)
    sere = Policy.parse({"buckets": [{"minTokens": 2, "kind": "sere", "S": 1}], "similarityDigest": meta.digest})
    environ = {"SERE_POLICY_DIR": str(volume), "SERE_CONTROL_TOKEN": TOKEN, "VLLM_LOGGING_LEVEL": "INFO"}
    with serving(deepseek, tmp_path / "serve.log", **environ) as server:
        url = server.url
        state = get_state(url)
        assert (state.ready, state.source) == (False, "file")
        with pytest.raises(ConflictError, match="SERE_POLICY_DIR"):
            put_policy(url, TOPK, token=TOKEN)
        with Load(url, deepseek, clients=4) as load:
            (volume / "stable").write_text("exact")
            wait_for(url, "the first application", lambda s: s.ready and s.policy_digest == "exact")

            (volume / "pod.policy").write_text(sere.digest)
            state = wait_for(url, "an error", lambda s: s.error)
            assert f"policy {sere.digest} is missing" in state.error
            assert state.policy_digest == "exact"

            for name, text in policy_files(sere, state.key).items():
                (volume / name).write_text(text)
            # In shards, as the operator gives it: until all are there nothing is wrong, and nothing changes.
            artefact = (tmp_path / "packed.safetensors").read_bytes()
            shards = split(artefact, len(artefact) // 2 + 600)
            for index, shard in enumerate(shards, 1):
                state = wait_for(url, "patience", lambda s: s.error is None)
                assert state.policy_digest == "exact"
                (tmp_path / "shard").write_bytes(shard)  # whole at once, as in a projected volume
                (tmp_path / "shard").rename(volume / piece_name(similarity_file(meta.digest), index, len(shards)))
            assert len(shards) == 2
            state = wait_for(url, "the policy", lambda s: s.policy_digest == sere.digest)
            assert (state.error, state.similarity_digest) == (None, meta.digest)
            time.sleep(1)

            (volume / "pod.override").write_text("exact")
            state = wait_for(url, "the override", lambda s: s.override)
            assert state.policy_digest == "exact"
            (volume / "pod.override").write_text("")
            wait_for(url, "the policy again", lambda s: s.policy_digest == sere.digest and not s.override)

            (volume / "slo").write_text('{"tpotMs": {"p95": 12.3}}')
            deadline = time.monotonic() + 60
            while not any('le="0.0123"' in name for name in metrics_of(url)):
                assert time.monotonic() < deadline, "a limit of the SLO must become a bound of the running engine's histograms"
                time.sleep(0.3)

            stale = state.key.model_copy(update={"engine_version": "0.31.0"})
            (volume / key_file(sere.digest)).write_text(stale.to_json())
            state = wait_for(url, "PolicyStale", lambda s: "PolicyStale" in (s.error or ""))
            assert state.policy_digest == "exact"
        assert load.failures == []
        assert load.done > 0
        assert counted(state, sere).rerouted > 0
    lines = [line.partition("sere audit: ")[2] for line in server.log.read_text().splitlines() if "sere audit: " in line]
    trail = [(line["outcome"], line["source"], line["who"].rpartition("/")[2], line["to"]) for line in map(json.loads, lines)]
    assert trail[0][:2] == ("refused", "http")
    assert trail[1:] == [
        ("applied", "file", "stable", "exact"),
        ("applied", "file", "pod.policy", sere.digest),
        ("applied", "file", "pod.override", "exact"),
        ("applied", "file", "pod.policy", sere.digest),
        ("applied", "file", "pod.policy", "exact"),
    ]
