"""One policy on the decode steps of many batches at once, by the plug-in's own CPU kernel: the routing that `lanes.py` asks for.

Shapes: L lanes (sequences side by side), B sequences per batch, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.lanes import Lanes
from sere_ext.contract.policy import Policy
from sere_ext.routing import kernel, ops
from sere_ext.routing.state import LayerState
from sere_ext.similarity.file import sorted_neighbours

SHARES = (0.5, 0.7)  # values of minShare, at S = 2


class Rerouted:
    """A policy's bucket as a `lanes.Mix` for batches of `batch` sequences; counts active experts and slots.

    Batch number b owns the lanes b * B to b * B + B - 1. Tensors of a GPU are brought to the CPU and back.

    Args:
        similarity: [layers, E, E] float32.
        bucket: as in a policy's JSON, without edges; one for all layers, or a list with one per layer.
        batch: B.

    Raises:
        PolicyError: the bucket is not one that this model can have.
    """

    def __init__(self, model: Lanes, similarity: Tensor, bucket: dict[str, Any] | Sequence[dict[str, Any]], batch: int) -> None:
        self.model, self.batch = model, batch
        policies = [self._policy(bucket)] * model.layers if isinstance(bucket, dict) else [self._policy(own) for own in bucket]
        renormalise = bool(model.config["norm_topk_prob"])
        self.layers = [LayerState(n, model.experts, model.top_k, renormalise, kernel.SOFTMAX) for n in range(model.layers)]
        for layer, policy in zip(self.layers, policies, strict=True):
            layer.load_table(policy.table_for(layer.number))
            if policy.needs_similarity():
                layer.load_similarity(*sorted_neighbours(similarity[layer.number].float().cpu().numpy()))

    def _policy(self, bucket: dict[str, Any]) -> Policy:
        """The policy of one bucket for steps of up to B sequences, checked against the model."""
        policy = Policy.parse({"buckets": [{"minTokens": 1, "maxTokens": self.batch, **bucket}]})
        policy.check_model(self.model.top_k)
        return policy

    def __call__(self, layer: int, logits: Tensor) -> Tensor:
        """Router logits [L, E] in, weight of every expert [L, E] out; rows of NaN (idle lanes) come back undefined."""
        weights, ids = (part.cpu().clone().contiguous() for part in self.model.top(logits))
        scores = logits.cpu().contiguous()
        for start in range(0, len(ids), self.batch):
            mine = slice(start, start + self.batch)
            call = ops.call_of(weights[mine], ids[mine], scores[mine])
            kernel.reroute_cpu(self.layers[layer].struct, call)
        mix = torch.zeros_like(scores).scatter_add_(1, ids, weights)
        return mix.to(logits.device)

    def counts(self) -> dict[str, float]:
        """Means over layers and steps: active experts before and after, and experts per token that have a weight."""
        total = dict(zip(kernel.COUNTERS, map(int, sum(layer.counters.sum(0) for layer in self.layers)), strict=True))
        return {
            "activeBefore": total["activeBefore"] / total["calls"],
            "active": total["activeAfter"] / total["calls"],
            "slots": (total["slots"] - total["merged"]) / total["tokens"],
        }


def describe(bucket: dict[str, Any]) -> str:
    """As people read it."""
    named = {"S": "S={}", "minShare": "share={:.2f}", "rho": "rho={:.2f}", "maxExperts": "N={}", "keepActive": "active"}
    return " ".join([bucket["kind"], *(named[key].format(value) for key, value in bucket.items() if key in named)])


def grid(slots: Sequence[int], rhos: Iterable[float], budgets: Sequence[int], most: int) -> list[dict[str, Any]]:
    """Policies of every kind as buckets without edges, exact first.

    Args:
        slots: numbers of top experts that a token keeps (S).
        rhos: least similarities of a stand-in, beside 0.
        budgets: numbers of active experts that a policy of kind budget fills up to; a hybrid one takes the second of them.
        most: experts that a batch can use; a budget of so many limits nothing and is left out.
    """
    found: list[dict[str, Any]] = [{"kind": "exact"}]
    found += [{"kind": kind, "S": S} for kind in ("topk", "sere", "oea") for S in slots]
    found += [{"kind": "sere", "S": 2, "rho": rho} for rho in rhos]
    found += [{"kind": kind, "S": 2, "minShare": SHARES[0]} for kind in ("topk", "sere", "oea")]
    found += [{"kind": "oea", "S": 2, "minShare": share} for share in SHARES[1:]]
    found += [{"kind": "budget", "maxExperts": N} for N in budgets]
    found += [{"kind": "hybrid", "S": slots[0], "rho": 0.5, "maxExperts": budgets[1]}]
    found += [{"kind": "hybrid", "S": 2, "minShare": SHARES[0], "rho": 0.5}]
    return [bucket for bucket in found if bucket.get("maxExperts", 0) < most]
