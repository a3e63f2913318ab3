"""The plug-in inside one running vLLM engine, used as a library (`LLM`), changed while it serves.

A process has one engine at a time, so tests that start an engine of their own are in `test_plugin_engines.py`; engines behind a
process border are in `test_plugin_serve.py`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sere_ext.calibration.run import Options, calibrate
from sere_ext.contract.errors import ConflictError, PolicyError, SereError, SimilarityError
from sere_ext.contract.policy import Kind, Policy
from sere_ext.control.switch import llm_states, switch_llm
from sere_ext.routing import ops
from sere_ext.routing.reference import reroute
from sere_ext.similarity.file import read_similarity
from tests.kit.library import PROMPTS, answers, engine, policy
from tests.kit.states import counted

pytestmark = pytest.mark.timeout(900)


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
        (row,) = [row for row in llm_states(running)[0].counters if row.digest == first.digest and row.bucket == "2-"]
        assert counts.active[index] == row.active_after / row.calls, choice


def test_steps_that_pass_every_router_by_are_an_error_of_the_state(running: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model routes by itself again, as one whose own kernels decode does; until then every step's routers were asked."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    def unwrap(model: Any) -> None:
        for module in model.modules():
            if isinstance(module, MoERunner):
                monkeypatch.delattr(module.router, "_compute_routing")

    answers(running)
    assert llm_states(running)[0].error is None
    running.apply_model(unwrap)
    answers(running)
    assert "Bypassed: all MoE layers routed some steps by themselves" in str(llm_states(running)[0].error)
    running.collective_rpc(lambda worker: worker.sere.drop_counters())  # what was bypassed is never forgotten otherwise
    assert llm_states(running)[0].error is None
