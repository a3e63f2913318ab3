"""A layer that is not re-routed is found before the engine serves, and while it does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.v1.cudagraph_dispatcher import CudagraphDispatcher
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

from sere_ext.contract.errors import UnsupportedError
from sere_ext.contract.policy import Policy
from sere_ext.engine.proof import listed_sizes, missing, prove_hit
from sere_ext.routing import kernel
from sere_ext.routing.state import LayerState, Sizes, WorkerState


def sizes(captured: str, eager: str = "") -> Sizes:
    """Numbers of rows that an operator was called with, as words: `sizes("1 16", eager="8192")`."""
    return Sizes(set(map(int, captured.split())), set(map(int, eager.split())))


BOTH = sizes("1 16", eager="1 16 8192")


@pytest.mark.parametrize(
    ("calls", "seen", "due", "says"),
    [
        ([0, 0], [Sizes(), Sizes()], True, "no router was asked in the profile run"),
        ([2, 0], [Sizes(), Sizes()], False, "the routers of layers [7] were never asked"),
        ([2, 2], [sizes("1"), sizes("1 16")], True, "the CUDA graph of size 16 was captured without the routers of layers [3]"),
        ([2, 2], [BOTH, BOTH], True, None),
        ([0, 0], [Sizes(), Sizes()], False, None),
    ],
)
def test_every_layer_must_be_asked_in_the_profile_run_and_in_every_graph(
    calls: list[int], seen: list[Sizes], due: bool, says: str | None
) -> None:
    why = missing([3, 7], calls, seen, {}, due=due)
    assert why == says if says is None else says in str(why)


@pytest.mark.parametrize(
    ("listed", "seen", "says"),
    [
        ({"FULL": {1, 16}, "PIECEWISE": {1, 16}}, BOTH, None),
        ({"FULL": {1, 8, 16}}, BOTH, "the CUDA graph of size 8 was captured without any router"),
        # The warm-up before a capture is no excuse for a graph of the whole model that holds no router.
        ({"FULL": {1, 16}}, sizes("16", eager="1 16"), "the CUDA graph of size 1 was captured without any router"),
        ({"FULL": {1, 16}}, sizes("", eager="8192"), "the CUDA graph of size 1 was captured without any router"),
        ({"PIECEWISE": {1, 8, 16}}, BOTH, "the CUDA graph of size 8 was captured without any router"),
        ({"PIECEWISE": {1, 16}}, sizes("", eager="8192"), "the CUDA graph of size 1 was captured without any router"),
        # Piecewise graphs around a router that is no part of them: it is called for every step.
        ({"PIECEWISE": {1, 16}}, sizes("", eager="1 16 8192"), None),
        # A model that is not compiled: decode steps are whole graphs, and larger sizes no graphs at all.
        ({"FULL": {1, 16}, "PIECEWISE": {1, 16, 512}}, sizes("1 16", eager="1 16 512 8192"), None),
        ({"FULL": {1, 16}, "PIECEWISE": {1, 16, 512}}, BOTH, "the CUDA graph of size 512 was captured without any router"),
        # The list cannot be read, or no graph is captured (the mode NONE, --enforce-eager).
        ({}, BOTH, None),
        ({}, sizes("", eager="1 8192"), None),
        # A model that routes two rows for each token: the list says nothing of rows.
        ({"FULL": {1, 2, 4}}, sizes("2 4 8", eager="16384"), None),
    ],
)
def test_every_size_that_vllm_lists_must_hold_the_routers(listed: dict[str, set[int]], seen: Sizes, says: str | None) -> None:
    assert missing([3, 7], [2, 2], [seen, seen], listed, due=True) == says


def runner(mode: CUDAGraphMode, *, max_num_seqs: int = 16, draft_tokens: int = 0) -> Any:
    """vLLM's own dispatcher in a runner that captures sizes up to 64, for decode steps of 1 + draft_tokens tokens each."""
    compilation = SimpleNamespace(
        cudagraph_mode=CUDAGraphMode.FULL, cudagraph_capture_sizes=[3, 8, 15, 64], max_cudagraph_capture_size=64, compile_sizes=[]
    )
    config: Any = SimpleNamespace(
        compilation_config=compilation,
        lora_config=None,
        num_speculative_tokens=draft_tokens,
        scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs),
    )
    if draft_tokens:
        compilation.cudagraph_capture_sizes = [3, 9, 15, 63]
        compilation.max_cudagraph_capture_size = 63
    dispatcher = CudagraphDispatcher(config)
    dispatcher.initialize_cudagraph_keys(mode, 1 + draft_tokens)
    return SimpleNamespace(cudagraph_dispatcher=dispatcher)


def worker(model_runner: Any, *, mode: str = "FULL", enforce_eager: bool = False) -> Any:
    config = SimpleNamespace(
        model_config=SimpleNamespace(enforce_eager=enforce_eager),
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode[mode]),
    )
    return SimpleNamespace(vllm_config=config, model_runner=model_runner)


def test_the_sizes_are_those_that_vllms_first_runner_captures_in_each_mode() -> None:
    every = {3, 8, 15, 64}
    assert listed_sizes(worker(runner(CUDAGraphMode.NONE))) == {}
    assert listed_sizes(worker(runner(CUDAGraphMode.FULL))) == {"FULL": every}
    assert listed_sizes(worker(runner(CUDAGraphMode.PIECEWISE))) == {"PIECEWISE": every}
    assert listed_sizes(worker(runner(CUDAGraphMode.FULL_DECODE_ONLY))) == {"FULL": every - {64}}
    assert listed_sizes(worker(runner(CUDAGraphMode.FULL_AND_PIECEWISE))) == {"FULL": every - {64}, "PIECEWISE": every}
    drafts = runner(CUDAGraphMode.FULL_DECODE_ONLY, max_num_seqs=4, draft_tokens=2)
    assert listed_sizes(worker(drafts)) == {"FULL": {3, 9}}, "4 requests of 3 tokens each"


def test_the_sizes_are_those_that_vllms_second_runner_captures() -> None:
    graphs = [BatchExecutionDescriptor(CUDAGraphMode.FULL, tokens, tokens) for tokens in (8, 3)]
    manager = SimpleNamespace(_capture_descs={CUDAGraphMode.FULL: graphs})
    assert listed_sizes(worker(SimpleNamespace(cudagraph_manager=manager))) == {"FULL": {3, 8}}


def test_no_size_is_listed_where_none_is_captured_or_none_can_be_read() -> None:
    full = runner(CUDAGraphMode.FULL)
    assert listed_sizes(worker(full, enforce_eager=True)) == {}
    assert listed_sizes(worker(full, mode="NONE")) == {}
    assert listed_sizes(worker(SimpleNamespace())) == {}
    assert listed_sizes(worker(SimpleNamespace(cudagraph_manager=None))) == {}


def test_a_gpu_whose_graph_of_a_listed_size_holds_no_router_does_not_serve() -> None:
    state = WorkerState([LayerState(number, 8, 2, True, None) for number in (3, 7)], {})
    gpu = worker(runner(CUDAGraphMode.FULL))
    gpu.vllm_config.compilation_config.mode = CompilationMode.VLLM_COMPILE
    gpu.sere = state
    for layer in state.layers:
        layer.counters[-1, kernel.CALLS] = 5
        layer.sizes = sizes("3 8 15", eager="8192")
    with pytest.raises(UnsupportedError, match="the CUDA graph of size 64 was captured without any router; start with"):
        prove_hit(gpu, "cuda")
    for layer in state.layers:
        assert layer.sizes is not None
        layer.sizes.add(64, captured=True)
    prove_hit(gpu, "cuda")
    assert all(layer.sizes is None for layer in state.layers), "nothing is noted once it is proven"


def test_a_layer_that_is_passed_by_while_the_engine_serves_is_an_error_of_its_state() -> None:
    layers = [LayerState(number, 8, 2, True, None) for number in (3, 7)]
    state = WorkerState(layers, {})
    for layer in layers:
        layer.counters[-1, kernel.CALLS] = 5
    state.counters()
    assert state.bypassed() is None
    state.apply(Policy.parse({"buckets": [{"minTokens": 1, "kind": "topk", "S": 1}]}), None, None)
    layers[0].counters[0, kernel.CALLS] = 1
    state.counters()
    assert "Bypassed: layers [7]" in str(state.bypassed())


def test_runs_of_the_model_before_the_proof_are_no_steps() -> None:
    """Profile runs, warm-up and captures: vLLM's second model runner warms up through the worker's own `execute_model`."""
    layers = [LayerState(number, 8, 2, True, None) for number in (3, 7)]
    state = WorkerState(layers, {})
    for _ in range(9):
        state.count_step()
    state.drop_counters()
    state.counters()
    assert state.bypassed() is None


def test_a_rank_without_moe_layers_passes_none_by() -> None:
    state = WorkerState([], {})
    state.count_step()
    state.counters()
    assert state.bypassed() is None
