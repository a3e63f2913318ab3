"""What re-routing means, in readable torch: the specification that every fast kernel is tested against.

Shapes and names: T tokens (rows), k slots per token, E experts, `S` top slots that a token always keeps, `rho` least
similarity of a stand-in. Source of kind `sere`: arXiv 2602.07616, Algorithm 1; of `oea`: arXiv 2511.02237; of `budget`:
arXiv 2602.07265 (top experts of every token, then greedily by summed weight); `hybrid` is ours.

Rules that hold for every kind:
- A slot counts if its row is real (not padding, which stands behind the real rows), its id is in [0, E), its expert computes
  something (an expert that a MoNE checkpoint replaced by a constant costs nothing), and its weight is neither 0 nor NaN. Other
  slots keep id and weight.
- A token's slots are ranked by returned weight, ties by lower id. Routers do not return them in order. Its top S are the first
  S of them, less those of under `min_share` of its largest weight: a token that is sure of its best expert needs no second.
- Active are the experts that are some token's top S; `max_experts` adds those of most summed weight (ties: lower id) until
  so many are. Weights are summed in steps of 2^-30, so that no order of summation shows.
- A freed slot has weight 0. Its id is one that its token keeps, or -1, as the reader needs: the CPU's experts would use -1 as
  an index, while some kernels on GPUs lose or misplace a slot whose expert the token names twice (`engine/backends.py`).
- In a row that counts, slots with a weight stand left of slots without one, both in their old order, so that a backend
  can compute the leading columns alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sere_ext.contract.policy import Kind

MASS_STEPS = 2**30  # of a weight of 1, where weights are summed over the batch
MASS_MOST = 2**10  # a larger weight counts as this: 2^23 slots of it still fit in 64 bits


@dataclass(frozen=True)
class Rerouted:
    """The new routing and what was done. Counts are over the rows that count."""

    ids: torch.Tensor  # [T, k], dtype of the input
    weights: torch.Tensor  # [T, k], float32
    active_before: int  # distinct experts with a weight
    active_after: int
    slots: int  # slots that count
    rerouted: int  # of those, slots whose weight went to another expert, merged there or not
    merged: int  # of those, slots freed (merged or dropped)


def reroute(
    ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    num_experts: int,
    kind: Kind,
    S: int = 1,
    min_share: float = 0.0,
    rho: float = 0.0,
    max_experts: int = 0,
    similarity: torch.Tensor | None = None,
    real_tokens: int | None = None,
    renormalise: bool = False,
    logits: torch.Tensor | None = None,
    scoring: str = "softmax",
    freed_minus_one: bool = False,
    constants: tuple[int, ...] = (),
) -> Rerouted:
    """Re-route one call of a router.

    Args:
        ids: [T, k] int32 or int64 expert ids.
        weights: [T, k] float32 as the router returned them (normalised or not, scaled or not).
        num_experts: E.
        kind: how slots beyond the top S are treated.
        S: slots that a token keeps, 1..k.
        min_share: of those it keeps the ones with at least this share of its largest weight.
        rho: least similarity of a stand-in (`sere`, `hybrid`).
        max_experts: experts are made active by summed weight until so many are; 0 for none beside the top S.
        similarity: [E, E] float32, larger is more alike; needed by `sere` and `hybrid`. NaN never qualifies.
        real_tokens: rows that are real, counted from the first; None if all are.
        renormalise: whether the model renormalises its weights: a row with freed or refilled slots keeps its sum.
        logits: [T, E] router logits; needed by `oea` and `hybrid`. NaN counts as -infinity.
        scoring: "softmax" or "sigmoid", of the model's router.
        freed_minus_one: whether the id of a freed slot becomes -1.
        constants: ids of experts that answer with a constant.
    """
    long = ids.long()
    counts = (long >= 0) & (long < num_experts) & (weights != 0) & ~weights.isnan()
    counts &= ~torch.isin(long, torch.tensor(constants, dtype=torch.int64))
    if real_tokens is not None:
        counts[real_tokens:] = False
    before = _union(long, counts, num_experts)
    if kind is Kind.EXACT:
        used = int(before.sum())
        return Rerouted(ids.clone(), weights.clone(), used, used, int(counts.sum()), 0, 0)

    largest = weights.masked_fill(~counts, -torch.inf).max(dim=1, keepdim=True).values if ids.numel() else weights
    enough = weights >= torch.tensor(min_share, dtype=torch.float32) * largest
    rank = _rank(long, weights, counts)
    keep = counts & (rank < S) & ((rank == 0) | enough if min_share else True)
    active = _activate(_union(long, keep, num_experts), before, long, weights, counts, max_experts)
    target = torch.arange(num_experts)
    if kind.needs_similarity:
        if similarity is None:
            raise ValueError(f"kind {kind.value} needs the similarity matrix")
        target = _stand_ins(before & ~active, active, similarity, rho)
    new_ids, new_weights = long.clone(), weights.clone()
    new_ids[counts] = target[long[counts]]

    inside = torch.zeros_like(counts)  # the slot's expert, or its stand-in, is active
    inside[counts] = active[new_ids[counts]]
    freed = counts & ~(keep if kind in (Kind.TOPK, Kind.OEA) else inside)
    if kind is Kind.SERE:
        freed &= False  # an expert that nothing resembles stays
    if kind.needs_similarity:
        new_weights = _merge(new_ids, weights, counts & ~freed)
    best = _best_kept(long, weights, keep)
    new_ids = torch.where(freed, best[:, None], new_ids)
    new_weights = torch.where(freed, torch.zeros_like(weights), new_weights)
    dropped = freed.clone()
    if kind.needs_scores:
        if logits is None:
            raise ValueError(f"kind {kind.value} needs the router's logits")
        dropped = _refill(new_ids, new_weights, long, weights, counts, keep, freed, active, logits, scoring)
    if renormalise:
        for row in freed.any(1).nonzero().flatten().tolist():
            _rescale(new_weights[row], weights[row], counts[row])

    holds = counts & (new_weights != 0)
    after = _union(new_ids, holds, num_experts)
    moved = int((counts & ~dropped & (new_ids != long)).sum())
    if freed_minus_one:
        new_ids[counts & ~holds] = -1
    order = _pack(counts.any(1), new_weights != 0)
    return Rerouted(
        new_ids.gather(1, order).to(ids.dtype),
        new_weights.gather(1, order),
        int(before.sum()),
        int(after.sum()),
        int(counts.sum()),
        moved,
        int(counts.sum() - holds.sum()),
    )


def _union(ids: torch.Tensor, mask: torch.Tensor, num_experts: int) -> torch.Tensor:
    """[E] bool: experts named by some slot of the mask."""
    present = torch.zeros(num_experts, dtype=torch.bool)
    present[ids[mask]] = True
    return present


def _rank(ids: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """[T, k] place of each slot in its row: by weight, largest first, ties by lower id; slots that do not count last."""
    by_id = ids.argsort(dim=1, stable=True)
    negated = (-weights).masked_fill(~counts, torch.inf).gather(1, by_id)
    order = by_id.gather(1, negated.argsort(dim=1, stable=True))
    return order.argsort(dim=1, stable=True)


def _activate(
    primary: torch.Tensor, before: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor, limit: int
) -> torch.Tensor:
    """[E] bool: the primaries, and the other used experts of most summed weight while there are fewer than `limit`."""
    active = primary.clone()
    mass = torch.zeros(primary.shape[0], dtype=torch.int64)
    mass.index_add_(0, ids[counts], (weights[counts].double().clamp(-MASS_MOST, MASS_MOST) * MASS_STEPS).long())
    for _ in range(limit - int(primary.sum())):
        rest = (before & ~active).nonzero().flatten()
        if not len(rest):
            break
        active[rest[mass[rest].argmax()]] = True
    return active


def _stand_ins(secondary: torch.Tensor, active: torch.Tensor, similarity: torch.Tensor, rho: float) -> torch.Tensor:
    """[E] int64: the expert that answers for each; itself unless it is secondary and an active one is alike enough."""
    num_experts = active.shape[0]
    target = torch.arange(num_experts)
    least = torch.tensor(rho, dtype=torch.float32)
    candidates = similarity.float().masked_fill(~active[None, :] | similarity.isnan(), -torch.inf)
    for expert in secondary.nonzero().flatten().tolist():
        best = int(candidates[expert].argmax())  # the first of equals, so ties go to the lower id
        if candidates[expert, best] >= least:
            target[expert] = best
    return target


def _merge(ids: torch.Tensor, weights: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Sum the weights of a token's slots on one expert into the first of them; the others get 0."""
    merged = torch.where(counts, torch.zeros_like(weights), weights)
    same = (ids[:, :, None] == ids[:, None, :]) & counts[:, None, :] & counts[:, :, None]
    first = same.int().argmax(dim=2)  # [T, k] first slot of the row that names the same expert
    for slot in range(ids.shape[1]):  # in slot order, so that rounding is the same everywhere
        rows = counts[:, slot].nonzero().flatten()
        merged[rows, first[rows, slot]] += weights[rows, slot]
    return merged


def _best_kept(ids: torch.Tensor, weights: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """[T] int64: the kept expert of largest weight (ties: lower id); 0 where a row keeps none."""
    first = _rank(ids, weights, keep).argmin(dim=1, keepdim=True)
    return ids.gather(1, first).squeeze(1).where(keep.any(1), torch.zeros((), dtype=ids.dtype))


def _score(logits: torch.Tensor, scoring: str) -> torch.Tensor:
    """Scores up to a factor per token (softmax's denominator cancels in ratios)."""
    return (logits - logits.max()).exp() if scoring == "softmax" else logits.sigmoid()


def _refill(
    new_ids: torch.Tensor,
    new_weights: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    counts: torch.Tensor,
    keep: torch.Tensor,
    freed: torch.Tensor,
    active: torch.Tensor,
    logits: torch.Tensor,
    scoring: str,
) -> torch.Tensor:
    """Fill the freed slots, in slot order, with the token's best-scored active experts that it does not hold yet.

    Returns:
        [T, k] bool: the slots that nothing was left for.
    """
    ranks = _rank(ids, weights, keep)
    dropped = freed.clone()
    for row in freed.any(1).nonzero().flatten().tolist():
        top = int(ranks[row].argmin())
        score = _score(logits[row].float(), scoring)
        comparable = logits[row].float().nan_to_num(-torch.inf, torch.inf, -torch.inf)
        open_to = active.clone()
        open_to[new_ids[row][counts[row] & ~freed[row]]] = False
        for slot in freed[row].nonzero().flatten().tolist():
            rest = open_to.nonzero().flatten()
            if not len(rest):
                break
            choice = int(rest[comparable[rest].argmax()])
            open_to[choice] = False
            new_ids[row, slot] = choice
            new_weights[row, slot] = weights[row, top] * (score[choice] / score[ids[row, top]])
            dropped[row, slot] = False
    return dropped


def _rescale(new: torch.Tensor, old: torch.Tensor, counts: torch.Tensor) -> None:
    """Scale a row's weights in place so that their sum is what it was (1, or the model's scaling factor)."""
    total = new[counts].sum()
    if total != 0:
        new[counts] *= old[counts].sum() / total


def _pack(rows: torch.Tensor, holds: torch.Tensor) -> torch.Tensor:
    """[T, k] order that moves slots with a weight to the left in rows that count."""
    packed = (~holds).int().argsort(dim=1, stable=True)
    same = torch.arange(holds.shape[1]).expand_as(packed)
    return torch.where(rows[:, None], packed, same)
