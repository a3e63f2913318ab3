"""Where re-routing enters a model: after `_compute_routing` of each MoE layer's router.

There ids are still logical, weights are final, and every architecture that vLLM knows passes through; expert load
balancing maps ids to physical experts later. Experts whose kernel routes inside itself never ask a router: those are
refused, with the way out.
"""

from __future__ import annotations

import logging
from typing import Any

from sere_ext.contract.errors import UnsupportedError
from sere_ext.engine.backends import constants_of, freed_slot, way_out
from sere_ext.routing import kernel
from sere_ext.routing.state import LayerState

logger = logging.getLogger("vllm.sere")


def install(model: Any, device: str) -> list[LayerState]:
    """Wrap the router of every MoE layer of a loaded model.

    Args:
        model: the torch module that the worker runs, weights loaded.
        device: torch device type of the worker.

    Returns:
        one state per MoE layer, in the model's order, already bound to the operators.

    Raises:
        UnsupportedError: a dense model, a device without a kernel, or a layer that cannot work (`refusal`).
    """
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    runners = [module for module in model.modules() if isinstance(module, MoERunner)]
    if not runners:
        raise UnsupportedError(
            f"{type(model).__name__} is a dense model: it has no experts to re-route; serve it without sere, or name an MoE model"
        )
    if device not in ("cpu", "cuda"):
        raise UnsupportedError(f"this release re-routes on CPUs and on CUDA, the device is {device}; serve without sere")
    kernel.load(device)
    if device == "cuda":
        logger.warning(
            "sere: the CUDA kernel passes its compiler but has not yet run on a GPU; compare answers before you trust it"
        )
    layers = []
    for runner in runners:
        freed = refusal(runner, device) or freed_slot(runner, device)
        if isinstance(freed, str):
            raise UnsupportedError(f"{type(model).__name__}, {runner.layer_name}: {freed}")
        layers.append(_layer_state(runner, freed))

    from sere_ext.routing import ops

    for slot, runner in enumerate(runners, ops.bind(layers)):
        _wrap(runner.router, slot)
        if device == "cpu":
            _wrap_experts(runner)
    return layers


def refusal(runner: Any, device: str) -> str | None:
    """Why an MoE layer (vLLM's `MoERunner`) cannot be re-routed, with the way out; None if it can."""
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
    from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter

    router = runner.router
    if runner.is_monolithic:
        return f"its kernel routes inside itself; {way_out(runner, device)}"
    if not isinstance(router, BaseRouter):
        return f"its router ({type(router).__name__}) has no seam to re-route at; report it"
    if isinstance(router, ZeroExpertRouter):
        return "its router also sends tokens to experts that compute nothing, which was never tried; serve it without sere"
    if router.top_k == 1:
        return "it takes one expert per token, which is always kept, so nothing could be re-routed; serve it without sere"
    if runner.do_naive_dispatch_combine:
        return "its kernel gathers the rows of all ranks before it routes them; start with --data-parallel-size 1"
    return None


def _layer_state(runner: Any, freed: int = kernel.REPEAT) -> LayerState:
    router = runner.router
    plain = getattr(router, "custom_routing_function", None) is None
    scoring = {"softmax": kernel.SOFTMAX, "sigmoid": kernel.SIGMOID}.get(getattr(router, "scoring_func", "softmax"))
    experts, top_k = runner.moe_config.num_logical_experts, router.top_k
    if experts > kernel.MAX_EXPERTS or top_k > kernel.MAX_TOP_K:
        raise UnsupportedError(
            f"{runner.layer_name}: {experts} experts, top-{top_k}; this release re-routes up to {kernel.MAX_EXPERTS} experts, "
            f"top-{kernel.MAX_TOP_K}; serve without sere"
        )
    return LayerState(
        number=runner.layer_id,
        experts=experts,
        top_k=top_k,
        renormalise=bool(getattr(router, "renormalize", True)),
        scoring=scoring if plain else None,
        freed=freed,
        constants=constants_of(runner),
    )


def _wrap(router: Any, slot: int) -> None:
    """Put the operator behind the router's own computation. Dynamo traces this: one operator call and nothing else."""
    import torch

    inner = router._compute_routing
    reroute = torch.ops.sere.reroute

    def routing(hidden_states: Any, router_logits: Any, indices_type: Any, *, input_ids: Any = None) -> tuple[Any, Any]:
        weights, ids = inner(hidden_states, router_logits, indices_type, input_ids=input_ids)
        reroute(weights, ids, router_logits, slot)
        return weights, ids

    router._compute_routing = routing
    # A model's own fused decode step that routes by itself (DeepSeek-V4.1's) stands back where somebody wants the router's ids.
    router.set_capture_fn(_wants_ids)


def _wants_ids(topk_ids: Any) -> None:
    """Take a router's ids and do nothing. vLLM's own capture of routed experts puts its function in this one's place."""


def _wrap_experts(runner: Any) -> None:
    """Let the CPU kernel compute only the slots that carry weight. Other kernels are left as they are."""
    import torch
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    experts = getattr(runner._quant_method.moe_kernel, "fused_experts", None)
    if not isinstance(experts, CPUUnquantizedExperts) or experts._use_zentorch:
        return
    fused_experts, stock = torch.ops.sere.fused_experts_cpu, experts.apply

    def apply(
        output: Any,
        hidden_states: Any,
        w1: Any,
        w2: Any,
        topk_weights: Any,
        topk_ids: Any,
        activation: Any,
        global_num_experts: int,
        expert_map: Any,
        a1q_scale: Any,
        a2_scale: Any,
        workspace13: Any,
        workspace2: Any,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        if expert_map is not None:  # ids of other ranks' experts among them, which is for vLLM to sort out
            return stock(
                output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts, expert_map, a1q_scale,
                a2_scale, workspace13, workspace2, expert_tokens_meta, apply_router_weight_on_input,
            )  # fmt: skip
        fused_experts(
            output,
            hidden_states,
            w1,
            w2,
            experts.w1_bias,
            experts.w2_bias,
            topk_weights,
            topk_ids,
            activation.value,
            experts.isa,
            apply_router_weight_on_input,
        )

    experts.apply = apply
