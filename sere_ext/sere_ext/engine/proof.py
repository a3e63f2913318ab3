"""Proof that every layer is re-routed: before the engine serves, and again whenever its state is read.

A layer whose model computes the routing somewhere else would serve exact routing, in silence. Three things are compared:
- after the profile run every layer's operator was called;
- while CUDA graphs were captured every layer's operator was called once for every captured number of rows;
- while the engine serves, all layers were called equally often (`WorkerState.bypassed`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sere_ext.contract.errors import UnsupportedError


def missing(numbers: Sequence[int], calls: Sequence[int], captured: Mapping[int, Sequence[int]], *, due: bool) -> str | None:
    """What speaks against every layer being re-routed; None if nothing does.

    Args:
        numbers: model layer number of every MoE layer.
        calls: calls of each layer's operator so far.
        captured: calls of each layer's operator while CUDA graphs were captured, by number of rows.
        due: whether a profile run took place, so that no call at all is one too few.
    """
    if due and not any(calls):
        return "no router was asked in the profile run, so re-routing would have no effect"
    if any(calls) and not all(calls):
        return f"the routers of layers {[n for n, asked in zip(numbers, calls, strict=True) if not asked]} were never asked"
    for rows, by_layer in sorted(captured.items()):
        if absent := [number for number, asked in zip(numbers, by_layer, strict=True) if not asked]:
            return f"the graph for {rows} rows was captured without the routers of layers {absent}"
    return None


def prove_hit(worker: Any, device: str) -> None:
    """Run after warm-up.

    Args:
        worker: vLLM's worker, whose `sere` is the `WorkerState`.
        device: torch device type.

    Raises:
        UnsupportedError: a layer is not re-routed; says which, and what to do.
    """
    from vllm.config import CompilationMode

    from sere_ext.routing import ops

    state = worker.sere
    compiled = worker.vllm_config.compilation_config.mode != CompilationMode.NONE
    # A GPU's worker always runs its profile; the CPU's says whether it did, and warms up compiled models alone.
    due = device == "cuda" or (compiled and worker._should_warm_up_model())
    if why := missing([layer.number for layer in state.layers], state.calls(), ops.captured(state.layers), due=due):
        raise UnsupportedError(f"{why}; start with `--enforce-eager`, or serve without sere")
    state.drop_counters()
