"""Kind `novice`, which no engine has: what a dropped slot would have put out is guessed by its expert's mean output.

The guess is that of MoNE (arXiv 2507.00390), which makes it for experts that it removes; here it is made per step, for the slots that a
policy drops. It is compared with the product's kinds in docs/policies.md. Shapes: L lanes (sequences side by side), B sequences per
batch, E experts, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.lanes import Lanes
from benchmarks.rerouted import SHARES, Rerouted


class Novices:
    """One policy of kind `novice` as a `lanes.Mix`: a dropped slot is its expert's mean output, with the slot's own weight.

    Which experts a token keeps is what kind `topk` decides. Counts as `Rerouted` does; a mean output counts for nothing.

    Args:
        model: with its `means`.
        bucket: {"kind": "novice", "S": ..., "minShare": ..., "keepActive": ...}; with keepActive a dropped slot whose expert some token
            of the batch keeps is computed as it is, since its weights are read anyway.
        batch: B.
    """

    def __init__(self, model: Lanes, bucket: dict[str, Any], batch: int) -> None:
        self.model, self.batch, self.keep_active = model, batch, bool(bucket.get("keepActive"))
        kept = {name: value for name, value in bucket.items() if name in ("S", "minShare")}
        self.kept = Rerouted(model, torch.empty(0), {"kind": "topk", **kept}, batch)
        self.slots = self.tokens = 0

    def __call__(self, layer: int, logits: Tensor) -> Tensor:
        """Router logits [L, E] in; [L, 2E] out: the weight of every expert, then that of every expert's mean output."""
        own, kept = self.model.exact(layer, logits), self.kept(layer, logits) > 0
        if self.keep_active:
            groups = kept.split(self.batch)
            kept = torch.cat([group.any(0).expand_as(group) for group in groups])
        kept = kept & (own > 0)
        self.slots += int(kept.sum())
        self.tokens += len(logits)
        return torch.cat([own * kept, own * ~kept], 1)

    def counts(self) -> dict[str, float]:
        """Means over layers and steps, as `Rerouted.counts` gives them."""
        return self.kept.counts() | {"slots": self.slots / self.tokens}


def grid(slots: Sequence[int]) -> list[dict[str, Any]]:
    """Policies of the kind as buckets without edges, for these numbers of top experts that a token keeps (S)."""
    kept: list[dict[str, Any]] = [{"S": S} for S in slots] + [{"S": 2, "minShare": SHARES[0]}]
    return [{"kind": "novice", **one, **more} for more in ({}, {"keepActive": True}) for one in kept]
