"""Which kernels may read re-routed ids, what a freed slot holds for each, and the table that documentation shows."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sere_ext.engine import backends
from sere_ext.engine.backends import DISPATCH, EXPERTS, constants_of, freed_slot, prefer_modular, renewed
from sere_ext.engine.seam import _layer_state
from sere_ext.routing.kernel import MINUS_ONE, REPEAT
from tests.kit import ROOT

PAGE = ROOT / "docs" / "compatibility.md"


def runner(experts: str, dispatch: str = "MoEPrepareAndFinalizeNoDPEPModular", method: str = "Fp8MoEMethod") -> Any:
    """A layer of vLLM whose kernel is made of classes with these names."""
    parts = {"fused_experts": type(experts, (), {})(), "prepare_finalize": type(dispatch, (), {})()}
    method_of_layer = type(method, (), {"moe_kernel": SimpleNamespace(**parts)})()
    return SimpleNamespace(_quant_method=method_of_layer, routed_experts=type("RoutedExperts", (), {})())


def with_constants(layer: Any, *ids: int) -> Any:
    """The layer of a MoNE checkpoint, as vLLM 0.33 builds it (`expert_substitution.py`)."""
    layer.routed_experts = type("SubstitutedRoutedExperts", (), {})()
    layer.routed_experts.expert_substitution = SimpleNamespace(substituted_expert_ids=ids)
    return layer


@pytest.mark.parametrize(
    ("experts", "dispatch", "freed"),
    [
        ("TritonExperts", "MoEPrepareAndFinalizeNoDPEPModular", REPEAT),
        ("TritonExperts", "DeepEPHTPrepareAndFinalize", REPEAT),
        ("OAITritonExperts", "MoEPrepareAndFinalizeNoDPEPModular", MINUS_ONE),
        ("TrtLlmBf16ExpertsModular", "MoEPrepareAndFinalizeNoDPEPModular", MINUS_ONE),
        ("BatchedDeepGemmExperts", "DeepEPLLPrepareAndFinalize", MINUS_ONE),
        ("X86CPUUnquantizedExperts", "MoEPrepareAndFinalizeNoDPEPModular", REPEAT),
    ],
)
def test_a_freed_slot_is_what_its_reader_takes_for_one(experts: str, dispatch: str, freed: int) -> None:
    assert freed_slot(runner(experts, dispatch), "cuda") == freed


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (runner("HummingIndexedExperts"), "nobody has read yet what HummingIndexedExperts makes.*`--moe-backend triton`"),
        (runner("TritonExperts", "MoriPrepareAndFinalize"), "nobody has read yet what MoriPrepareAndFinalize"),
        (runner("TritonExperts", "DeepEPLLPrepareAndFinalize"), "TritonExperts and DeepEPLL.* need different ids"),
        (runner("CutlassExpertsMxfp4", method="Mxfp4MoEMethod"), "`--moe-backend marlin`"),
        (runner("CutlassExpertsFp4", method="ModelOptNvFp4FusedMoE"), "`--moe-backend flashinfer_cutlass`"),
        (with_constants(runner("TrtLlmBf16ExpertsModular"), 3), "TrtLlmBf16ExpertsModular.* need different ids"),
        (
            SimpleNamespace(_quant_method=object(), routed_experts=None),
            "nothing is known of its kernel .object.; serve without sere",
        ),
    ],
)
def test_what_nobody_has_read_is_refused_by_name_with_a_way_out_that_fits_the_weights(layer: Any, says: str) -> None:
    why = freed_slot(layer, "cuda")
    assert isinstance(why, str)
    with pytest.raises(ValueError, match=says):
        raise ValueError(why)


def test_constants_of_a_mone_checkpoint_are_known_by_layer() -> None:
    layer = runner("TritonExperts")
    assert constants_of(layer) == ()
    layer = with_constants(layer, 3, 5)
    assert constants_of(layer) == (3, 5)
    assert freed_slot(layer, "cuda") == REPEAT
    router = {"top_k": 2, "renormalize": True}
    vars(layer).update(
        layer_name="l", layer_id=0, router=SimpleNamespace(**router), moe_config=SimpleNamespace(num_logical_experts=8)
    )
    state = _layer_state(layer)
    assert [expert for expert in range(64) if state.struct.constants[expert // 32] >> expert % 32 & 1] == [3, 5]


def test_monolithic_kernels_are_ruled_out_before_layers_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the installed vLLM, whose routers cannot say so themselves: the method that no monolithic kernel lists."""
    from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
    from vllm.model_executor.layers.fused_moe.experts.gpt_oss_triton_kernels_moe import OAITritonMxfp4ExpertsMonolithic
    from vllm.model_executor.layers.fused_moe.experts.marlin_moe import MarlinExperts
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
    from vllm.model_executor.layers.fused_moe.router.fused_moe_router import FusedMoERouter

    for router in [FusedMoERouter, *backends._below(FusedMoERouter)]:
        if "routing_method_type" in vars(router):
            monkeypatch.setattr(router, "routing_method_type", vars(router)["routing_method_type"])  # put back afterwards
    router = CPURouter(top_k=2, global_num_experts=8)
    assert OAITritonMxfp4ExpertsMonolithic._supports_routing_method(router.routing_method_type, None, None)
    prefer_modular()
    assert router.routing_method_type == RoutingMethodType.Custom
    assert not OAITritonMxfp4ExpertsMonolithic._supports_routing_method(router.routing_method_type, None, None)
    assert MarlinExperts._supports_routing_method(router.routing_method_type, None, None)


def test_every_name_is_there_once() -> None:
    names = [reader.name for reader in (*EXPERTS, *DISPATCH)]
    assert len(names) == len(set(names))


def test_the_page_shows_the_table_as_it_is() -> None:
    assert renewed(PAGE.read_text()) == PAGE.read_text(), "run python -m sere_ext.engine.backends"
