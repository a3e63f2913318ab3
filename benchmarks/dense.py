"""Every kind of policy on many batches at once, as dense tensors: `sere_ext.routing.reference` fast enough for thousands of items.

A routing is a tensor of weights over all experts, [G, B, E] for G batches of B sequences, 0 where a token does not use an
expert; slots that land on one expert are one weight. Weights are positive; a row without any (an idle sequence) decides nothing
and comes back undefined. A unit test holds each kind against the reference.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def reroute(bucket: dict[str, Any], mix: Tensor, scores: Tensor, similarity: Tensor, top_k: int) -> Tensor:
    """Re-route all batches by one bucket of a policy (outside names), for a model that renormalises its weights.

    Args:
        mix: [G, B, E] weights as the router returned them.
        scores: [G, B, E] the router's scores of all experts, up to a factor per token.
        similarity: [E, E].
        top_k: slots per token.

    Returns:
        [G, B, E] the new weights.
    """
    kind, rho = bucket["kind"], bucket.get("rho", 0.0)
    if kind == "exact":
        return mix
    keep = torch.zeros_like(mix, dtype=torch.bool).scatter_(2, mix.topk(bucket.get("S", 1), -1).indices, True) & (mix > 0)
    keep &= mix >= bucket.get("minShare", 0.0) * mix.amax(-1, keepdim=True)
    if kind == "topk":
        return _scaled(mix * keep)
    active = _active(keep.any(1), mix, bucket.get("maxExperts", 0))
    inside = mix * active[:, None]
    if kind == "budget":
        return _scaled(inside)
    if kind == "oea":
        return _refilled(mix * keep, mix, scores, active, top_k - keep.sum(-1))
    target, alike = _stand_ins(active, similarity)
    replaced = alike >= rho  # [G, E]; an active expert stands in for itself
    if kind == "sere":
        own = torch.arange(mix.shape[2]).expand_as(target)
        return mix @ _one_hot(torch.where(replaced, target, own))
    held = (mix * replaced[:, None]) @ _one_hot(target)
    return _refilled(held, mix, scores, active, ((mix > 0) & ~replaced[:, None]).sum(-1))


def _one_hot(target: Tensor) -> Tensor:
    return functional.one_hot(target, target.shape[-1]).float()


def _scaled(mix: Tensor) -> Tensor:
    return mix / mix.sum(-1, keepdim=True)


def _active(primary: Tensor, mix: Tensor, most: int) -> Tensor:
    """[G, E] bool: the primaries, and the other used experts of most summed weight until `most` are active."""
    mass = mix.sum(1)
    order = mass.masked_fill(primary, torch.inf).argsort(dim=1, descending=True, stable=True)
    place = order.argsort(dim=1)
    return primary | ((place < most) & (mass > 0))


def _stand_ins(active: Tensor, similarity: Tensor) -> tuple[Tensor, Tensor]:
    """Per batch and expert the most similar active one and how alike it is, both [G, E]; an active one is its own."""
    alike, target = similarity[None].masked_fill(~active[:, None, :], -torch.inf).max(-1)
    own = torch.arange(active.shape[1]).expand_as(target)
    return torch.where(active, own, target), alike.masked_fill(active, torch.inf)


def _refilled(held: Tensor, mix: Tensor, scores: Tensor, active: Tensor, freed: Tensor) -> Tensor:
    """Add each token's `freed` [G, B] best-scored active experts that it does not hold; its weights keep their sum of 1."""
    top = mix.max(-1, keepdim=True)
    unit = top.values / scores.gather(2, top.indices)  # from scores to weights
    value, expert = scores.masked_fill(~active[:, None] | (held > 0), 0.0).sort(-1, descending=True)
    taken = torch.where(torch.arange(mix.shape[2]) < freed[..., None], value, 0.0)
    full = held + torch.zeros_like(mix).scatter(2, expert, taken) * unit
    return torch.where(freed[..., None] > 0, _scaled(full), held)
