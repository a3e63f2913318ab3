"""Time of the operators alone, on the CPU: re-routing one layer's slots, and running its experts in four forms. Used by `ext.py`.

The experts' weights are 100 MB per layer whatever their number, so that no form finds them in a cache. Forms alternate within
each repetition, so drift cancels; times are medians.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

HIDDEN, LAYER_FLOATS = 128, 25_165_824
TOKENS, TOP_K, EXPERTS = (16, 64), (4, 8), (16, 128)
REROUTES = {
    "sere": {"kind": "sere", "S": 2},
    "topk": {"kind": "topk", "S": 2},
    "oea": {"kind": "oea", "S": 2},
    "budget": {"kind": "budget", "maxExperts": 8},
    "hybrid": {"kind": "hybrid", "S": 1, "rho": 0.5},
}


def medians(forms: dict[str, Callable[[], Any]], repetitions: int, calls: int = 1) -> dict[str, float]:
    """Milliseconds per call of each form; `calls` are timed together, where one is too short for the clock."""
    taken: dict[str, list[float]] = {name: [] for name in forms}
    for form in forms.values():
        form()
    for _ in range(repetitions):
        for name, form in forms.items():
            began = time.perf_counter()
            for _ in range(calls):
                form()
            taken[name].append(1e3 * (time.perf_counter() - began) / calls)
    return {name: statistics.median(times) for name, times in taken.items()}


def measure(repetitions: int = 25) -> list[dict[str, Any]]:
    """One row per number of tokens, slots and experts."""
    import vllm._custom_ops  # noqa: F401  (registers the engine's operators)
    from vllm.platforms import current_platform

    current_platform.import_kernels()
    return [_row(T, k, E, repetitions) for E, k, T in itertools.product(EXPERTS, TOP_K, TOKENS)]


def _row(T: int, k: int, E: int, repetitions: int) -> dict[str, Any]:
    from vllm._custom_ops import cpu_fused_moe, cpu_prepack_moe_weight

    from sere_ext.routing import ops  # noqa: F401  (registers the operators)

    source = torch.Generator().manual_seed(T * k * E)
    logits = torch.randn(T, E, generator=source)
    weights, ids = logits.softmax(-1).topk(k, -1)
    weights, ids = weights / weights.sum(-1, keepdim=True), ids.to(torch.int32)
    similarity = torch.rand(E, E, generator=source)
    similarity = (similarity + similarity.T) / 2

    (state, slot), reroute = _plug_in(E, k, similarity), torch.ops.sere.reroute
    reroute_ms = {}
    for name, bucket in REROUTES.items():
        _apply(state, bucket)
        reroute_ms[name] = medians({name: lambda: reroute(weights.clone(), ids.clone(), logits, slot)}, repetitions, calls=20)[
            name
        ]
    _apply(state, REROUTES["sere"])
    merged_weights, merged_ids = weights.clone(), ids.clone()
    reroute(merged_weights, merged_ids, logits, slot)
    primary = torch.zeros(E, dtype=torch.bool)
    primary[ids.gather(1, weights.topk(2, -1).indices).flatten().long()] = True
    nearest = similarity.masked_fill(~primary, -torch.inf).argmax(1)
    unmerged_ids = torch.where(primary, torch.arange(E), nearest)[ids.long()].to(ids.dtype)

    if set(unmerged_ids.unique().tolist()) != set(merged_ids[merged_weights != 0].unique().tolist()):
        raise SystemExit("the operator and SERE worked out here disagree on the active experts: no time would mean anything")

    inner = LAYER_FLOATS // (3 * HIDDEN * E)
    x, out = torch.randn(T, HIDDEN, generator=source), torch.empty(T, HIDDEN)
    w13 = cpu_prepack_moe_weight(torch.randn(E, 2 * inner, HIDDEN, generator=source) * 0.1, "vec")
    w2 = cpu_prepack_moe_weight(torch.randn(E, HIDDEN, inner, generator=source) * 0.1, "vec")

    def experts(form_weights: torch.Tensor, form_ids: torch.Tensor) -> Callable[[], None]:
        return lambda: cpu_fused_moe(out, x, w13, w2, None, None, form_weights, form_ids, "silu", "vec", False)

    def packed() -> None:
        torch.ops.sere.fused_experts_cpu(out, x, w13, w2, None, None, merged_weights, merged_ids, "silu", "vec", False)

    forms = {
        "stock": experts(weights, ids),
        "unmerged": experts(weights, unmerged_ids),
        "merged": experts(merged_weights, merged_ids),
        "packed": packed,
    }
    return {
        "tokens": T, "topK": k, "experts": E, "active": int(ids.unique().numel()),
        "activeRerouted": int(merged_ids[merged_weights != 0].unique().numel()), "slots": T * k,
        "slotsKept": int((merged_weights != 0).sum()), "rerouteMs": reroute_ms, "expertsMs": medians(forms, repetitions),
    }  # fmt: skip


def _plug_in(E: int, k: int, similarity: torch.Tensor) -> tuple[Any, int]:
    """The plug-in's state of one layer, with these matrices, and the layer's slot: every row binds one more."""
    from sere_ext.contract.policy import EXACT_POLICY
    from sere_ext.routing import kernel, ops
    from sere_ext.routing.state import LayerState, Neighbours, WorkerState
    from sere_ext.similarity.file import sorted_neighbours

    layer = LayerState(number=0, experts=E, top_k=k, renormalise=True, scoring=kernel.SOFTMAX)
    slot = ops.bind([layer])
    state = WorkerState([layer], {})
    state.apply(EXACT_POLICY, None, Neighbours(f"random-{E}", {0: sorted_neighbours(similarity.numpy())}))
    return state, slot


def _apply(state: Any, bucket: dict[str, Any]) -> None:
    from sere_ext.contract.policy import Policy

    state.apply(Policy.parse(json.dumps({"buckets": [{"minTokens": 1, **bucket}]})), None, None)
