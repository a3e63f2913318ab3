"""Proof that every layer is re-routed: before the engine serves, and again whenever its state is read.

A layer whose model computes the routing somewhere else would serve exact routing, in silence. Four things are compared:
- after the profile run every layer's operator was called;
- every number of rows with which one layer's operator was captured in a CUDA graph was captured with every other's;
- every size in vLLM's own list of CUDA graphs was captured with our operators in it;
- while the engine serves, every layer was called in every step that ran the model (`WorkerState.bypassed`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sere_ext.contract.errors import UnsupportedError
from sere_ext.routing.state import Sizes


def missing(
    numbers: Sequence[int], calls: Sequence[int], sizes: Sequence[Sizes], listed: Mapping[str, Collection[int]], *, due: bool
) -> str | None:
    """What speaks against every layer being re-routed; None if nothing does.

    Args:
        numbers: model layer number of every MoE layer.
        calls: calls of each layer's operator so far.
        sizes: numbers of rows that each layer's operator was called with.
        listed: sizes in tokens for which vLLM captures CUDA graphs, by the name of the graphs' mode (`listed_sizes`).
        due: whether a profile run took place, so that no call at all is one too few.
    """
    if due and not any(calls):
        return "no router was asked in the profile run, so re-routing would have no effect"
    if any(calls) and not all(calls):
        return f"the routers of layers {[n for n, asked in zip(numbers, calls, strict=True) if not asked]} were never asked"
    captured = set[int]().union(*(layer.captured for layer in sizes))
    for rows in sorted(captured):
        if absent := [number for number, layer in zip(numbers, sizes, strict=True) if rows not in layer.captured]:
            return f"the CUDA graph of size {rows} was captured without the routers of layers {absent}"
    return _uncaptured(captured, set[int]().union(*(layer.eager for layer in sizes)), listed)


def _uncaptured(captured: set[int], eager: set[int], listed: Mapping[str, Collection[int]]) -> str | None:
    """What speaks against a router in every graph of vLLM's list; None if nothing does, or if the list says nothing of routers.

    A size of the mode FULL is the whole model, so a router that is not in the graph is not asked when the graph is replayed.
    Graphs of the mode PIECEWISE leave out what splits them, and all of a model that is not compiled: a router out there is
    called for every step. So such a size counts as missed only where no router was called with so many rows at all.
    """
    full = set(listed.get("FULL", ()))
    every = full.union(*listed.values())
    if not captured <= every:
        return None  # the model's routers see other numbers of rows than the step has tokens
    for size in sorted(every - captured):
        if size in full or size not in eager:
            return f"the CUDA graph of size {size} was captured without any router"
    return None


def listed_sizes(worker: Any) -> dict[str, set[int]]:
    """Sizes in tokens for which vLLM captures CUDA graphs of the model, by the name of their mode, FULL or PIECEWISE.

    This is what is left of `cudagraph_capture_sizes` once vLLM has fitted that list to the attention kernels, to decode
    steps of one size, to draft tokens and to the limits of its batches. Each of vLLM's two model runners keeps it.

    Args:
        worker: vLLM's worker of a GPU, after its warm-up.

    Returns:
        the sizes; empty where no graph is captured, or where the list cannot be read.
    """
    config = worker.vllm_config
    if config.model_config.enforce_eager or config.compilation_config.cudagraph_mode.name == "NONE":
        return {}
    runner = worker.model_runner
    dispatcher, manager = getattr(runner, "cudagraph_dispatcher", None), getattr(runner, "cudagraph_manager", None)
    graphs = dispatcher.get_capture_descs() if dispatcher is not None else getattr(manager, "_capture_descs", {}).items()
    return {mode.name: {graph.num_tokens for graph in group} for mode, group in graphs}


def prove_hit(worker: Any, device: str) -> None:
    """Run after warm-up.

    Args:
        worker: vLLM's worker, whose `sere` is the `WorkerState`.
        device: torch device type.

    Raises:
        UnsupportedError: a layer is not re-routed; says which, and what to do.
    """
    from vllm.config import CompilationMode

    state = worker.sere
    compiled = worker.vllm_config.compilation_config.mode != CompilationMode.NONE
    # A GPU's worker always runs its profile; the CPU's says whether it did, and warms up compiled models alone.
    due = device == "cuda" or (compiled and worker._should_warm_up_model())
    sizes = [layer.sizes or Sizes() for layer in state.layers]
    listed = listed_sizes(worker) if device == "cuda" else {}
    if why := missing([layer.number for layer in state.layers], state.calls(), sizes, listed, due=due):
        raise UnsupportedError(f"{why}; start with `--enforce-eager`, or serve without sere")
    state.drop_counters()
    for layer in state.layers:
        layer.sizes = None
