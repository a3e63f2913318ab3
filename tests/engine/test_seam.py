"""The seam on vLLM's own routers, without an engine: what passes first, and which layers are refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter

from sere_ext.engine import seam
from sere_ext.engine.seam import refusal
from sere_ext.routing import ops
from sere_ext.routing.state import LayerState


class UnquantizedFusedMoEMethod:
    """Named as vLLM's."""


def layer(router: Any, **changed: Any) -> Any:
    """The part of vLLM's `MoERunner` that is looked at."""
    fields = {"is_monolithic": False, "do_naive_dispatch_combine": False} | changed
    return SimpleNamespace(router=router, **fields)


def test_a_softmax_router_is_taken() -> None:
    assert refusal(layer(CPURouter(top_k=2, global_num_experts=8)), "cuda") is None


def test_layers_that_cannot_work_are_refused_with_the_way_out() -> None:
    router = CPURouter(top_k=2, global_num_experts=8)
    zero = ZeroExpertRouter(
        top_k=2, global_num_experts=8, e_score_correction_bias=torch.zeros(8), num_logical_experts=6, zero_expert_type="identity"
    )
    for refused, says in (
        (layer(router, is_monolithic=True, _quant_method=UnquantizedFusedMoEMethod()), "--moe-backend triton"),
        (layer(object()), r"router \(object\) has no seam"),
        (layer(zero), "experts that compute nothing.*serve it without sere"),
        (layer(CPURouter(top_k=1, global_num_experts=8)), "one expert per token.*serve it without sere"),
        (layer(router, do_naive_dispatch_combine=True), "--data-parallel-size 1"),
    ):
        why = refusal(refused, "cuda")
        assert why is not None
        with pytest.raises(ValueError, match=says):
            raise ValueError(why)


def test_re_routing_comes_before_capture_and_before_the_map_to_physical_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order that expert load balancing relies on: it counts and maps what re-routing answered, as logical ids."""
    seen: dict[str, torch.Tensor] = {}
    router = CPURouter(top_k=2, global_num_experts=8)
    monkeypatch.setattr(torch.ops.sere, "reroute", lambda weights, ids, logits, slot: ids.fill_(slot))
    seam._wrap(router, 5)
    router.set_capture_fn(lambda ids: seen.__setitem__("captured", ids.clone()))
    monkeypatch.setattr(router, "_apply_eplb_mapping", lambda ids: seen.__setitem__("mapped", ids.clone()) or ids + 1)
    _, ids = router.select_experts(torch.zeros(3, 4), torch.randn(3, 8), torch.int32)
    assert seen["captured"].unique().tolist() == seen["mapped"].unique().tolist() == [5]
    assert ids.unique().tolist() == [6]


def test_a_wrapped_router_asks_for_its_ids_so_that_no_fused_decode_step_routes_in_its_place() -> None:
    """DeepSeek-V4.1's fused front (vLLM 0.33) stands back where a router has a capture function; compiled routing stays one graph."""
    router = CPURouter(top_k=2, global_num_experts=8)
    state = LayerState(number=0, experts=8, top_k=2, renormalise=True, scoring=None)
    assert router.capture_fn is None
    seam._wrap(router, ops.bind([state]))
    assert router.capture_fn is not None
    hidden, logits = torch.zeros(3, 4), torch.randn(3, 8)
    plain = router.select_experts(hidden, logits, torch.int32)
    traced = torch.compile(router.select_experts, fullgraph=True, backend="eager")(hidden, logits, torch.int32)
    assert all(map(torch.equal, plain, traced))
    assert state.counters[:, 0].sum() == 2, "both passed the operator"


def test_two_engines_of_one_process_keep_their_own_layers() -> None:
    layers = [LayerState(number=n, experts=8, top_k=2, renormalise=True, scoring=None) for n in range(3)]
    first, second = ops.bind(layers[:2]), ops.bind(layers[2:])
    assert second == first + 2
    assert [ops._layers[slot] for slot in (first, first + 1, second)] == layers
