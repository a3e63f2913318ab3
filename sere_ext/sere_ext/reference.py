"""What re-routing means, in readable torch: the specification that every fast kernel is tested against.

Shapes and names: T tokens (rows), k slots per token, E experts, `S` top slots that a token always keeps, `rho` least
similarity of a stand-in. Source of kind `sere`: arXiv 2602.07616, Algorithm 1; of `oea`: arXiv 2511.02237.

Rules that hold for every kind:
- A slot counts if its row is real (not padding), its id is in [0, E) and its weight is neither 0 nor NaN. Other slots
  keep id and weight.
- A token's slots are ranked by returned weight, ties by lower id. Routers do not return them in order.
- A freed slot repeats an expert that its token keeps, with weight 0. Never -1, which the CPU kernel would use as an index.
- In a row that counts, slots with a weight stand left of slots without one, both in their old order, so that a backend
  can compute the leading columns alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sere_ext.policy import Kind


@dataclass(frozen=True)
class Rerouted:
    """The new routing and what was done. Counts are over the rows that count."""

    ids: torch.Tensor  # [T, k], dtype of the input
    weights: torch.Tensor  # [T, k], float32
    active_before: int  # distinct experts with a weight
    active_after: int
    slots: int  # slots that count
    rerouted: int  # of those, slots that now name another expert and carry weight
    merged: int  # of those, slots freed (merged, or dropped by topk and oea)


def reroute(
    ids: torch.Tensor,
    weights: torch.Tensor,
    *,
    num_experts: int,
    kind: Kind,
    S: int = 1,
    rho: float = 0.0,
    similarity: torch.Tensor | None = None,
    real: torch.Tensor | None = None,
    renormalise: bool = False,
    logits: torch.Tensor | None = None,
    scoring: str = "softmax",
) -> Rerouted:
    """Re-route one call of a router.

    Args:
        ids: [T, k] int32 or int64 expert ids.
        weights: [T, k] float32 as the router returned them (normalised or not, scaled or not).
        num_experts: E.
        kind: how slots beyond the top S are treated.
        S: slots that a token keeps, 1..k.
        rho: least similarity of a stand-in (`sere`).
        similarity: [E, E] float32, larger is more alike; needed by `sere`. NaN never qualifies.
        real: [T] bool, False for padding rows; None if all are real.
        renormalise: whether the model renormalises its weights, for `topk` and `oea`.
        logits: [T, E] router logits; needed by `oea`.
        scoring: "softmax" or "sigmoid", for `oea`.
    """
    long = ids.long()
    counts = (long >= 0) & (long < num_experts) & (weights != 0) & ~weights.isnan()
    if real is not None:
        counts &= real[:, None]
    before = _union(long, counts, num_experts)
    if kind is Kind.EXACT:
        active = int(before.sum())
        return Rerouted(ids.clone(), weights.clone(), active, active, int(counts.sum()), 0, 0)

    keep = counts & (_rank(long, weights, counts) < S)
    primary = _union(long, keep, num_experts)
    new_ids, new_weights = long.clone(), weights.clone()
    if kind is Kind.SERE:
        if similarity is None:
            raise ValueError("kind sere needs the similarity matrix")
        target = _stand_ins(before & ~primary, primary, similarity, rho)
        new_ids[counts] = target[long[counts]]
        new_weights = _merge(new_ids, weights, counts)
    else:
        best = _best_kept(long, weights, keep)
        new_ids = torch.where(counts & ~keep, best[:, None], long)
        new_weights = torch.where(counts & ~keep, torch.zeros_like(weights), weights)
        if kind is Kind.OEA:
            if logits is None:
                raise ValueError("kind oea needs the router's logits")
            _refill(new_ids, new_weights, long, weights, counts, keep, primary, logits, scoring)
        if renormalise:
            for row in range(ids.shape[0]):
                _rescale(new_weights[row], weights[row], counts[row])

    holds = counts & (new_weights != 0)
    after = _union(new_ids, holds, num_experts)
    moved = int((holds & (new_ids != long)).sum())
    if kind is Kind.SERE:  # a slot merged away was re-routed as well: it no longer names its expert
        moved = int((counts & (new_ids != long)).sum())
    freed = int(counts.sum() - holds.sum())
    order = _pack(counts.any(1), new_weights != 0)
    return Rerouted(
        new_ids.gather(1, order).to(ids.dtype),
        new_weights.gather(1, order),
        int(before.sum()),
        int(after.sum()),
        int(counts.sum()),
        moved,
        freed,
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


def _stand_ins(secondary: torch.Tensor, primary: torch.Tensor, similarity: torch.Tensor, rho: float) -> torch.Tensor:
    """[E] int64: the expert that answers for each expert; itself unless it is secondary and a primary is alike enough."""
    num_experts = primary.shape[0]
    target = torch.arange(num_experts)
    least = torch.tensor(rho, dtype=torch.float32)
    candidates = similarity.float().masked_fill(~primary[None, :] | similarity.isnan(), -torch.inf)
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
    primary: torch.Tensor,
    logits: torch.Tensor,
    scoring: str,
) -> None:
    """Fill the freed slots, in slot order, with the token's best-scored active experts that it does not hold yet."""
    ranks = _rank(ids, weights, keep)
    for row in range(ids.shape[0]):
        if not keep[row].any():
            continue
        top = int(ranks[row].argmin())
        score = _score(logits[row].float(), scoring)
        open_to = primary.clone()
        open_to[ids[row][keep[row]]] = False
        for slot in (counts[row] & ~keep[row]).nonzero().flatten().tolist():
            if not open_to.any():
                break
            choice = int(logits[row].float().masked_fill(~open_to, -torch.inf).argmax())
            open_to[choice] = False
            new_ids[row, slot] = choice
            new_weights[row, slot] = weights[row, top] * (score[choice] / score[ids[row, top]])


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
