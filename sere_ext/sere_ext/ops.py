"""The registered operators `sere::reroute` and `sere::fused_experts_cpu`: what the wrapper around a router may call.

On the CPU vLLM's router is traced by Dynamo once and its guards are dropped, so everything that can change (policy,
padding mask, counters) is read inside the operator, at run time. `slot` names the layer's state; it is a constant of
the layer, never of the policy.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sere_ext import kernel
from sere_ext.policy import MAX_BUCKETS
from sere_ext.state import LayerState

_library = torch.library.Library("sere", "DEF")
_library.define("reroute(Tensor weights, Tensor ids, Tensor logits, int slot) -> (Tensor, Tensor)")
_library.define(
    "fused_experts_cpu(Tensor(a!) out, Tensor x, Tensor w13, Tensor w2, Tensor? b13, Tensor? b2, Tensor weights, Tensor ids, "
    "str activation, str isa, bool skip_weighted) -> ()"
)

_layers: list[LayerState] = []  # by slot; filled by `seam.install`
_NO_PADDING = np.zeros(0, np.bool_)
_NO_LOGITS = np.zeros((0, 0), np.float32)


def bind(layers: list[LayerState]) -> int:
    """Make these layers known to the operators; returns the slot of the first. Slots of another engine keep their layers."""
    _layers.extend(layers)
    return len(_layers) - len(layers)


def _padding_mask(tokens: int) -> Any:
    """[T] numpy bool, True for padding, of the step that is running; empty if every row is real or nothing is known.

    A mask of another length belongs to rows before a gather or scatter between ranks, so it says nothing about ours.
    """
    from vllm.forward_context import get_forward_context, is_forward_context_available

    if not is_forward_context_available():
        return _NO_PADDING
    mask = get_forward_context().is_padding
    if mask is None or mask.shape[0] != tokens:
        return _NO_PADDING
    return mask.numpy()


def _reroute_cpu(weights: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
    layer = _layers[slot]
    padding = _padding_mask(ids.shape[0])
    tokens = ids.shape[0] - int(padding.sum())
    bucket = layer.bucket(tokens)
    _, _, kind, S = layer.rows[bucket] if bucket < MAX_BUCKETS else (0, 0, kernel.EXACT, 1)
    rho = layer.rho[bucket] if bucket < MAX_BUCKETS else np.float32(0)
    new_weights = torch.empty(weights.shape, dtype=weights.dtype)
    new_ids = torch.empty(ids.shape, dtype=ids.dtype)
    kernel.reroute(
        ids.numpy(),
        weights.numpy(),
        padding,
        kind,
        S,
        rho,
        layer.neighbours,
        layer.similarities,
        layer.renormalise,
        logits.float().contiguous().numpy() if kind == kernel.OEA else _NO_LOGITS,
        layer.scoring or 0,
        new_ids.numpy(),
        new_weights.numpy(),
        layer.counters[bucket],
    )
    return new_weights, new_ids


def _reroute_fake(weights: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
    return weights.new_empty(weights.shape), ids.new_empty(ids.shape)


_library.impl("reroute", _reroute_cpu, "CPU")
torch.library.register_fake("sere::reroute", _reroute_fake, lib=_library)


def _fused_experts_cpu(
    out: torch.Tensor,
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    b13: torch.Tensor | None,
    b2: torch.Tensor | None,
    weights: torch.Tensor,
    ids: torch.Tensor,
    activation: str,
    isa: str,
    skip_weighted: bool,
) -> None:
    """vLLM's CPU kernel on the leading columns in use alone: it computes slots of weight 0 like any other.

    How many those are depends on data, so the cut is made in here. What is left out is a sum of zeros.
    """
    columns = kernel.columns_in_use(weights.numpy())
    if columns < weights.shape[1] and not skip_weighted:
        weights, ids = weights[:, :columns].contiguous(), ids[:, :columns].contiguous()
    torch.ops._C.cpu_fused_moe(out, x, w13, w2, b13, b2, weights, ids, skip_weighted, activation, isa)


_library.impl("fused_experts_cpu", _fused_experts_cpu, "CPU")
torch.library.register_fake("sere::fused_experts_cpu", lambda *arguments: None, lib=_library)
