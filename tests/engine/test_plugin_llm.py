"""The plug-in inside a real vLLM engine, used as a library (`LLM`), on two architectures.

One process, one engine after another: stock first, then with the plug-in, so that both sides of a comparison come from
the same machine and mode. Engines behind a process border are in `test_plugin_serve.py`.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sere_ext.calibration.run import Options, calibrate
from sere_ext.contract.errors import ConflictError, PolicyError, SereError, SimilarityError, UnsupportedError
from sere_ext.contract.policy import Kind, Policy
from sere_ext.contract.state import ModelShape
from sere_ext.control.switch import llm_states, switch_llm
from sere_ext.routing import ops
from sere_ext.routing.reference import reroute
from sere_ext.similarity.file import read_similarity
from tests.kit.inside import in_process
from tests.kit.states import counted

pytestmark = pytest.mark.timeout(900)
PROMPTS = [f"item {i}: what is {i} plus {i * 7 % 13}?" for i in range(12)]


@contextmanager
def engine(model: Path, **options: Any) -> Iterator[Any]:
    """The trained model's engine: eager unless a test says otherwise."""
    options = {"enforce_eager": True, "max_model_len": 128, "max_num_seqs": 16, "dtype": "float32"} | options
    with in_process(model, **options) as llm:
        yield llm


def answers(llm: Any) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """Tokens and their log-probabilities, greedy, from an empty prefix cache."""
    from vllm import SamplingParams

    llm.reset_prefix_cache()
    sampling = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=1)
    found = []
    for output in llm.generate(PROMPTS, sampling, use_tqdm=False):
        tokens = tuple(output.outputs[0].token_ids)
        found.append((tokens, tuple(step[t].logprob for step, t in zip(output.outputs[0].logprobs, tokens, strict=True))))
    return found


def policy(kind: str, **fields: Any) -> Policy:
    return Policy.parse({"buckets": [{"minTokens": 1, "kind": kind, **fields}]})


@pytest.fixture(scope="module")
def similarity(qwen3: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("similarity") / "qwen3.safetensors"
    calibrate(str(qwen3), calibration, path)
    return path


@pytest.fixture(scope="module")
def stock(qwen3: Path) -> Any:
    with engine(qwen3) as llm:
        return answers(llm)


@pytest.fixture(scope="module")
def running(qwen3: Path, similarity: Path, stock: Any) -> Iterator[Any]:
    """One engine with the plug-in for all tests of this file that do not start their own."""
    with engine(qwen3, additional_config={"sere": {"similarity": str(similarity)}}) as llm:
        yield llm


@pytest.fixture(autouse=True)
def _exact_again(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "running" in request.fixturenames:
        switch_llm(request.getfixturevalue("running"), Policy())


def test_exact_routing_is_bit_identical_to_stock(running: Any, stock: Any) -> None:
    assert answers(running) == stock
    for same in (policy("exact"), policy("topk", S=4), policy("sere", S=4), policy("sere", S=1, rho=1.0)):
        switch_llm(running, same)
        assert answers(running) == stock, same.describe()


def test_every_kind_changes_routing_and_wakes_fewer_experts(running: Any, stock: Any) -> None:
    for changed in (
        policy("sere", S=2), policy("topk", S=2), policy("oea", S=2), policy("budget", maxExperts=8), policy("hybrid", S=2, rho=0.5),
    ):  # fmt: skip
        switch_llm(running, changed)
        assert answers(running) != stock, changed.describe()
        counters = counted(llm_states(running)[0], changed)
        assert counters.calls > 0
        assert counters.tokens * 4 == counters.slots
        assert counters.active_after < counters.active_before
    switch_llm(running, Policy())
    assert answers(running) == stock, "the way back leaves nothing behind"


def test_buckets_count_real_tokens(running: Any, stock: Any) -> None:
    """A bucket above every batch changes nothing; one that only decode steps reach changes only those."""
    switch_llm(running, Policy.parse({"buckets": [{"minTokens": 5000, "kind": "topk", "S": 1}]}))
    assert answers(running) == stock
    decode = Policy.parse({"buckets": [{"minTokens": 2, "maxTokens": 16, "kind": "topk", "S": 1}]})
    switch_llm(running, decode)
    changed = answers(running)
    assert [tokens[0] for tokens, _ in changed] == [tokens[0] for tokens, _ in stock], "the prefill was exact"
    assert changed != stock
    assert counted(llm_states(running)[0], decode).tokens == 4 * 11 * len(PROMPTS), "4 layers, 11 decode steps"


def test_the_operator_in_the_engine_equals_the_reference(running: Any, similarity: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call of the operator during real generation, compared with the reference on the same inputs."""
    seen = []
    original = ops.kernel.reroute_cpu

    def array(address: int, pointer: Any, *shape: int) -> torch.Tensor:
        return torch.from_numpy(np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(pointer)), shape).copy())

    def spy(layer: Any, call: Any) -> None:
        shape = call.tokens, call.top_k
        ids = array(call.ids, ctypes.c_int64 if call.wide_ids else ctypes.c_int32, *shape)
        weights = array(call.weights, ctypes.c_float, *shape)
        real = int(array(layer.real, ctypes.c_int32, 1)[0])
        original(layer, call)
        new_ids = array(call.ids, ctypes.c_int64 if call.wide_ids else ctypes.c_int32, *shape)
        seen.append((ids, weights, real, new_ids, array(call.weights, ctypes.c_float, *shape)))

    monkeypatch.setattr(ops.kernel, "reroute_cpu", spy)
    switch_llm(running, policy("sere", S=2, rho=0.2))
    answers(running)
    matrices = [torch.from_numpy(m) for _, m in sorted(read_similarity(similarity).matrices.items())]
    assert len(seen) >= 4 * 12
    for call, (ids, weights, real, new_ids, new_weights) in enumerate(seen):
        want = reroute(
            ids, weights, num_experts=16, kind=Kind.SERE, S=2, rho=0.2, similarity=matrices[call % 4], real_tokens=real,
        )  # fmt: skip
        assert torch.equal(new_ids, want.ids), f"call {call}"
        assert torch.equal(new_weights, want.weights), f"call {call}"


def test_computing_fewer_columns_changes_nothing(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    switch_llm(running, policy("topk", S=1))
    packed = answers(running)
    widths = []
    monkeypatch.setattr(ops.kernel, "columns_in_use", lambda address, tokens, top_k: widths.append(1) or top_k)
    assert answers(running) == packed
    assert widths, "the experts' operator was never asked"


def test_bad_changes_are_refused_and_change_nothing(running: Any, stock: Any, similarity: Path, tmp_path: Path) -> None:
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(similarity.read_bytes()[:-100])
    cases: list[tuple[dict[str, Any], type[SereError], str]] = [
        ({"policy": policy("topk", S=5)}, PolicyError, "S = 5 .* above the model's top-k of 4; use S between 1 and 4"),
        ({"policy": policy("sere", S=2), "similarity": str(truncated)}, SimilarityError, "truncated"),
        ({"policy": policy("sere", S=2), "similarity": str(tmp_path / "none")}, SimilarityError, "no similarity file"),
        (
            {"policy": policy("sere", S=2).model_copy(update={"similarity_digest": "sha256:other"})},
            PolicyError,
            "made with similarity sha256:other",
        ),
        ({"policy": policy("topk", S=2), "generation": 0}, ConflictError, "generation 0 is stale"),
    ]
    for change, error, says in cases:
        with pytest.raises(error, match=says):
            switch_llm(running, **change)
    (refused,) = running.collective_rpc("sere_apply", args=('{"buckets": [{"minTokens": 1, "kind": "sere", "S": 1, "rho": 7}]}',))
    assert refused["refused"]["type"] == "PolicyError"
    assert "(got 7)" in refused["refused"]["message"]
    assert answers(running) == stock


def test_a_similarity_file_of_another_model_is_refused(running: Any, deepseek: Path, calibration: Path, tmp_path: Path) -> None:
    other = tmp_path / "deepseek.safetensors"
    calibrate(str(deepseek), calibration, other, Options(sequences=2))
    with pytest.raises(SimilarityError, match=r"made for another model: deepseek_v2 .* run `sere calibrate`"):
        switch_llm(running, policy("sere", S=2), similarity=str(other))


def test_a_compiled_graph_of_another_slot_is_never_taken_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key of the compile cache follows the number that the graph's calls carry."""
    from sere_ext.engine import worker
    from sere_ext.engine.settings import resolve

    keys = []
    for slot in (0, 4):
        monkeypatch.setattr(ops, "next_slot", lambda slot=slot: slot)
        config = SimpleNamespace(
            additional_config={"sere": {}}, device_config=SimpleNamespace(device_type="cpu"), kernel_config=None, lora_config=None,
            parallel_config=SimpleNamespace(pipeline_parallel_size=1), model_config=SimpleNamespace(),
        )  # fmt: skip
        engine_worker = SimpleNamespace(
            load_model=None, compile_or_warm_up_model=None, execute_model=None, execute_dummy_batch=None
        )
        worker._attach(engine_worker, config, resolve(config.additional_config))
        keys.append(config.additional_config["sere"]["graph"])
    assert keys[0] != keys[1]


def test_compiled_is_bit_identical_too_and_follows_live_changes(qwen3: Path, similarity: Path) -> None:
    """The CPU traces the router once; a policy read at trace time would be frozen.

    The first compilation that a process makes of a model may round otherwise than the next ones, of stock vLLM too (a difference
    of 5e-7 in log-probabilities between two stock engines was seen), so an engine that nobody looks at comes first.
    """
    with engine(qwen3, enforce_eager=False) as llm:
        answers(llm)
    with engine(qwen3, enforce_eager=False) as llm:
        stock = answers(llm)
    with engine(qwen3, enforce_eager=False, additional_config={"sere": {"similarity": str(similarity)}}) as llm:
        assert answers(llm) == stock
        rerouted = policy("sere", S=1)
        switch_llm(llm, rerouted)
        assert answers(llm) != stock
        counters = counted(llm_states(llm)[0], rerouted)
        assert counters.rerouted > 0
        switch_llm(llm, Policy())
        assert answers(llm) == stock


def test_deepseek_with_shared_experts_and_grouped_top_k(deepseek: Path, calibration: Path, tmp_path: Path) -> None:
    path = tmp_path / "deepseek.safetensors"
    meta = calibrate(str(deepseek), calibration, path)
    assert meta.layers == (1, 2), "the first layer is dense"
    with engine(deepseek) as llm:
        stock = answers(llm)
    profile_policy = {"buckets": [{"minTokens": 1, "maxTokens": 64, "kind": "sere", "S": 2}], "similarityDigest": meta.digest}
    config = {"sere": {"similarity": str(path), "policy": profile_policy}}
    with engine(deepseek, additional_config=config) as llm:
        state = llm_states(llm)[0]
        assert state.model == ModelShape(num_experts=16, top_k=4, moe_layers=(1, 2))
        assert state.policy_digest == Policy.parse(profile_policy).digest
        assert answers(llm) != stock
        counters = counted(llm_states(llm)[0], Policy.parse(profile_policy))
        assert 0 < counters.active_after < counters.active_before
        switch_llm(llm, Policy())
        assert answers(llm) == stock
        switch_llm(llm, policy("topk", S=4))
        assert answers(llm) == stock, "routed_scaling_factor must survive"


def test_a_dense_model_is_refused_with_the_way_out(dense: Path) -> None:
    with (
        pytest.raises(UnsupportedError, match=r"Qwen3ForCausalLM is a dense model.*serve it without sere"),
        engine(dense, additional_config={"sere": {}}),
    ):
        pass


def test_calibrating_a_dense_model_is_refused(dense: Path, calibration: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="is a dense model: it has no experts to compare"):
        calibrate(str(dense), calibration, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_profile_of_another_engine_means_exact_routing(qwen3: Path, stock: Any, tmp_path: Path, monkeypatch: Any) -> None:
    once = {"exact": 1.0, "chosen": 1.0}
    accuracy = {"exact": 1, "chosen": 1, "items": 1, "maxDropPoints": 1, "confidence": 0.95, "dropPoints": 0,
                "discordantShare": 0, "noiseFloor": 0}  # fmt: skip
    spec = {
        "policy": policy("topk", S=1).to_json_dict(),
        "key": {
            "modelName": "m",
            "configDigest": "c",
            "engineVersion": "0.31.0",
            "pluginVersion": "0.1.0",
            "device": "cpu",
            "weightFormat": "float32",
        },
        "evidence": {"certified": True, "tpotMs": once, "speedup": {"value": 1, "condition": "x"}, "accuracy": accuracy},
    }
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"kind": "SereProfile", "spec": spec}))
    monkeypatch.setenv("SERE_PROFILE", str(path))
    with engine(qwen3) as llm:
        state = llm_states(llm)[0]
        assert state.policy_digest == "exact"
        assert "PolicyStale: profile was made for engine 0.31.0, this pod runs 0.32.0" in (state.error or "")
        assert answers(llm) == stock


def test_without_settings_the_plugin_is_inert(qwen3: Path, stock: Any) -> None:
    with engine(qwen3) as llm:
        assert answers(llm) == stock
        with pytest.raises(UnsupportedError, match="started without sere; start it with `sere serve`"):
            llm.collective_rpc("sere_state")


def test_recorded_calls_replayed_count_what_the_engine_counts_under_a_policy(running: Any, similarity: Path) -> None:
    """The first layer's router sees the prompts' tokens whatever the policy, so replay and engine must agree there to the last expert."""
    from vllm import SamplingParams

    from sere_autotune.search import replay
    from sere_autotune.trial.routing import Routing
    from sere_autotune.tuning.space import EXACT, Choice

    def ask() -> None:
        running.reset_prefix_cache()
        running.generate(PROMPTS[:6], SamplingParams(max_tokens=1, temperature=0), use_tqdm=False)

    switch_llm(running, Policy())
    running.collective_rpc("sere_record", args=(True,))
    ask()
    (kept,) = running.collective_rpc("sere_record", args=(False,))
    assert all(not layer["calls"] for layer in running.collective_rpc("sere_record", args=(False,))[0]), "it has ended"
    routing = Routing.of(kept)
    assert routing is not None and len(routing.calls) == 4
    matrices = read_similarity(similarity).matrices
    tried = [Choice(Kind.TOPK, 1), Choice(Kind.OEA, 1), Choice(Kind.SERE, 1), Choice(Kind.SERE, 2, 0.5)]
    counts = replay.count(replace(routing, calls=routing.calls[:1]), [matrices[min(matrices)]], [EXACT, *tried])
    assert counts.active[0] > counts.active[1]
    for index, choice in enumerate(tried, 1):
        bucket = {"minTokens": 2, "kind": choice.kind.value, "S": int(choice.S), **({"rho": choice.rho} if choice.rho else {})}
        first = Policy.parse({"layerGroups": [{"firstLayer": 0, "lastLayer": 0, "buckets": [bucket]}]})
        switch_llm(running, first)
        ask()
        counters = running.collective_rpc("sere_state")[0]["counters"]
        (row,) = [row for name, row in counters.items() if name.startswith(first.digest) and name.endswith("|2-")]
        assert counts.active[index] == row["activeAfter"] / row["calls"], choice
