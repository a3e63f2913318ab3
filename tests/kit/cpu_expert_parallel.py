"""Lets vLLM's CPU engine serve expert-parallel models, which 0.32 cannot: its CPU experts leave the expert map unread.

Named by `worker_extension_cls="tests.kit.cpu_expert_parallel.Experts"`, so that every worker imports this file. Only for tests of what
re-routing does where a rank holds some of the experts. A slot of another rank's expert gets weight 0 here, and the ranks'
outputs are summed as under tensor parallelism.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

_apply = CPUUnquantizedExperts.apply
held: set[int] = set()  # experts that this rank holds
asked: set[int] = set()  # experts that routed slots named before ids were mapped to ranks


def apply(self: Any, output: Any, hidden_states: Any, w1: Any, w2: Any, weights: Any, ids: Any, *rest: Any, **named: Any) -> None:
    expert_map = named.get("expert_map", rest[2] if len(rest) > 2 else None)  # after activation and the number of experts
    if expert_map is not None:
        held.update((expert_map >= 0).nonzero().flatten().tolist())
        asked.update(ids[weights != 0].unique().tolist())
        local = expert_map[ids.long()]
        weights = torch.where(local >= 0, weights, 0.0)
        ids = local.clamp(min=0).to(ids.dtype)
    _apply(self, output, hidden_states, w1, w2, weights, ids, *rest, **named)


CPUUnquantizedExperts.apply = apply


class Experts:
    """Lets a test question the workers; naming it makes every worker import this file."""

    def experts_here(self) -> tuple[list[int], list[int]]:
        """The experts that this rank holds, and those that its slots have asked for."""
        return sorted(held), sorted(asked)
