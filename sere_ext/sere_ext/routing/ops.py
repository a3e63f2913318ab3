"""The registered operators `sere::reroute` and `sere::fused_experts_cpu`: what the wrapper around a router may call.

On the CPU vLLM's router is traced by Dynamo once and its guards are dropped, so everything that can change (policy,
padding mask, counters) is read inside the operator, at run time. On CUDA the operator's Python runs once per captured
graph, so the kernel reads all of that from device memory. `slot` names the layer's state; it is a constant of the layer,
never of the policy.
"""

from __future__ import annotations

import torch

from sere_ext.routing import kernel
from sere_ext.routing.state import LayerState

_library = torch.library.Library("sere", "DEF")
_library.define("reroute(Tensor weights, Tensor ids, Tensor logits, int slot) -> (Tensor, Tensor)")
_library.define(
    "fused_experts_cpu(Tensor(a!) out, Tensor x, Tensor w13, Tensor w2, Tensor? b13, Tensor? b2, Tensor weights, Tensor ids, "
    "str activation, str isa, bool skip_weighted) -> ()"
)

_layers: list[LayerState] = []  # by slot; filled by `seam.install`
_LOGITS_TYPES = {torch.float32: kernel.FLOAT32, torch.bfloat16: kernel.BFLOAT16}


def bind(layers: list[LayerState]) -> int:
    """Make these layers known to the operators; returns the slot of the first. Slots of another engine keep their layers."""
    _layers.extend(layers)
    return len(_layers) - len(layers)


def _padding_mask(tokens: int) -> torch.Tensor | None:
    """[T] bool, True for padding, of the step that is running; None if every row is real or nothing is known.

    A mask of another length belongs to rows before a gather or scatter between ranks, so it says nothing about ours.
    """
    from vllm.forward_context import get_forward_context, is_forward_context_available

    if not is_forward_context_available():
        return None
    mask = get_forward_context().is_padding
    if mask is None or mask.shape[0] != tokens:
        return None
    return mask


def call_of(
    weights: torch.Tensor,
    ids: torch.Tensor,
    logits: torch.Tensor,
    padding: torch.Tensor | None,
    new_weights: torch.Tensor,
    new_ids: torch.Tensor,
) -> kernel.Call:
    """The addresses of one call. The tensors must be contiguous and outlive the kernel's work."""
    tokens, top_k = ids.shape
    return kernel.Call(
        ids.data_ptr(),
        weights.data_ptr(),
        None if padding is None else padding.data_ptr(),
        logits.data_ptr(),
        new_ids.data_ptr(),
        new_weights.data_ptr(),
        tokens,
        top_k,
        ids.dtype == torch.int64,
        _LOGITS_TYPES[logits.dtype],
        logits.shape[-1],
    )


def _check(weights: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor, layer: LayerState) -> None:
    """Raise TypeError for tensors that the kernel would misread. Routers keep to one form, so the profile run meets it."""
    (tokens, top_k), experts = ids.shape, layer.experts
    if ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"sere::reroute takes int32 or int64 ids, not {ids.dtype}")
    if weights.shape != ids.shape or top_k > kernel.MAX_TOP_K:
        raise TypeError(
            f"sere::reroute takes up to {kernel.MAX_TOP_K} slots a token, not {tuple(weights.shape)}, {tuple(ids.shape)}"
        )
    if layer.scoring is not None and (logits.shape[0] != tokens or logits.shape[1] < experts):
        raise TypeError(f"sere::reroute takes logits of {tokens} tokens and {experts} experts, not {tuple(logits.shape)}")


def _reroute(weights: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
    layer = _layers[slot]
    returned = weights.dtype  # float32 of vLLM's own routers; a custom function may return another
    weights, ids, logits = weights.float().contiguous(), ids.contiguous(), logits.contiguous()
    if logits.dtype not in _LOGITS_TYPES:
        logits = logits.float()
    _check(weights, ids, logits, layer)
    padding = _padding_mask(ids.shape[0])
    new_weights, new_ids = torch.empty_like(weights), torch.empty_like(ids)
    call = call_of(weights, ids, logits, padding, new_weights, new_ids)
    if ids.is_cuda:
        kernel.reroute_cuda(layer.struct, call, torch.cuda.current_stream().cuda_stream)
    else:
        kernel.reroute_cpu(layer.struct, call)
    return new_weights.to(returned), new_ids


def _reroute_fake(weights: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor, slot: int) -> tuple[torch.Tensor, torch.Tensor]:
    return weights.new_empty(weights.shape), ids.new_empty(ids.shape)


_library.impl("reroute", _reroute, "CPU")
_library.impl("reroute", _reroute, "CUDA")
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
    tokens, top_k = weights.shape
    if top_k > 1 and not skip_weighted and weights.dtype == torch.float32 and weights.is_contiguous():
        columns = kernel.columns_in_use(weights.data_ptr(), tokens, top_k)
        if columns < top_k:
            weights, ids = weights[:, :columns].contiguous(), ids[:, :columns].contiguous()
    torch.ops._C.cpu_fused_moe(out, x, w13, w2, b13, b2, weights, ids, skip_weighted, activation, isa)


_library.impl("fused_experts_cpu", _fused_experts_cpu, "CPU")
torch.library.register_fake("sere::fused_experts_cpu", lambda *arguments: None, lib=_library)
