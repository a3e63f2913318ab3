"""Every vLLM symbol that the plug-in touches still exists in the installed vLLM, in the form that it relies on."""

from __future__ import annotations

import inspect

import pytest
from sere_ext.patches import LEDGER, Touched


@pytest.mark.parametrize("entry", LEDGER, ids=lambda entry: entry.symbol.rpartition(":")[2])
def test_the_symbol_exists(entry: Touched) -> None:
    assert entry.resolve() is not None, f"{entry.symbol} is gone: {entry.why}; {entry.exit}"


def test_what_we_stand_in_for_takes_the_arguments_that_we_pass_on() -> None:
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
    from vllm.v1.worker.worker_base import WorkerBase

    routing = list(inspect.signature(BaseRouter._compute_routing).parameters)
    assert routing == ["self", "hidden_states", "router_logits", "indices_type", "input_ids"]
    apply = list(inspect.signature(CPUUnquantizedExperts.apply).parameters)
    assert apply == [
        "self", "output", "hidden_states", "w1", "w2", "topk_weights", "topk_ids", "activation", "global_num_experts",
        "expert_map", "a1q_scale", "a2_scale", "workspace13", "workspace2", "expert_tokens_meta", "apply_router_weight_on_input",
    ]  # fmt: skip
    assert list(inspect.signature(WorkerBase.__init__).parameters)[:2] == ["self", "vllm_config"]


def test_the_ledger_says_why_and_how_each_could_go_away() -> None:
    for entry in LEDGER:
        assert entry.why, entry.symbol
        assert entry.exit, entry.symbol
        assert entry.versions, entry.symbol
