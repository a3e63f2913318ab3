"""The registered operators `sere::reroute` and `sere::fused_experts_cpu`: what the wrapper around a router may call.

On the CPU vLLM's router is traced by Dynamo once and its guards are dropped, so everything that can change (policy,
number of real rows, counters) is read inside the operator, at run time. On CUDA the operator's Python runs once per captured
graph, so the kernel reads all of that from device memory. `slot` names the layer's state; it is a constant of the layer,
never of the policy.
"""

from __future__ import annotations

import torch

from sere_ext.routing import kernel
from sere_ext.routing.state import LayerState

_library = torch.library.Library("sere", "DEF")
_library.define("reroute(Tensor(a!) weights, Tensor(b!) ids, Tensor logits, int slot) -> ()")
_library.define(
    "fused_experts_cpu(Tensor(a!) out, Tensor x, Tensor w13, Tensor w2, Tensor? b13, Tensor? b2, Tensor weights, Tensor ids, "
    "str activation, str isa, bool skip_weighted) -> ()"
)

_layers: list[LayerState] = []  # by slot; filled by `seam.install`
_LOGITS_TYPES = {torch.float32: kernel.FLOAT32, torch.bfloat16: kernel.BFLOAT16, torch.float16: kernel.FLOAT16}


def bind(layers: list[LayerState]) -> int:
    """Make these layers known to the operators; returns the slot of the first. Slots of another engine keep their layers."""
    for layer in layers:
        layer.slot = len(_layers)
        _layers.append(layer)
    return len(_layers) - len(layers)


def next_slot() -> int:
    """The slot that the first layer bound next will have."""
    return len(_layers)


def call_of(weights: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor) -> kernel.Call:
    """The addresses of one call. The tensors must be contiguous and outlive the kernel's work."""
    tokens, top_k = ids.shape
    return kernel.Call(
        ids.data_ptr(),
        weights.data_ptr(),
        logits.data_ptr(),
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


def _reroute(weights: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor, slot: int) -> None:
    """Rewrite a router's weights [T, k] and ids [T, k] in place; exact routing touches neither."""
    logits = logits.contiguous()
    if logits.dtype not in _LOGITS_TYPES:
        logits = logits.float()
    if weights.dtype == torch.float32 and weights.is_contiguous() and ids.is_contiguous():
        _launch(slot, weights, ids, logits)
        return
    # A custom routing function may return other types; vLLM's own routers return float32.
    plain_weights, plain_ids = weights.float().contiguous(), ids.contiguous()
    _launch(slot, plain_weights, plain_ids, logits)
    weights.copy_(plain_weights)
    ids.copy_(plain_ids)


def _launch(slot: int, weights: torch.Tensor, ids: torch.Tensor, logits: torch.Tensor) -> None:
    layer = _layers[slot]
    _check(weights, ids, logits, layer)
    call = call_of(weights, ids, logits)
    if ids.is_cuda:
        if layer.sizes is not None:
            layer.sizes.add(ids.shape[0], captured=torch.cuda.is_current_stream_capturing())
        kernel.reroute_cuda(layer.struct, call, torch.cuda.current_stream().cuda_stream)
    else:
        if layer.recorder is not None:
            real = min(int(layer.real[0]), len(ids))
            layer.recorder.add(weights[:real], ids[:real], logits[:real, : layer.experts])
        kernel.reroute_cpu(layer.struct, call)


_library.impl("reroute", _reroute, "CPU")
_library.impl("reroute", _reroute, "CUDA")
torch.library.register_fake("sere::reroute", lambda *arguments: None, lib=_library)


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
