"""What the experts of a small model put out on its calibration texts: their means, and how much pruning methods would miss each one.

One pass over prompts and answers under exact routing. Shapes: E experts, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.lanes import LANES, Lanes
from tests.assets.make import tokenizer
from tests.assets.make.tasks import Item


@dataclass(frozen=True)
class Experts:
    """Every layer's experts over the tokens that chose them; an expert that no token chose has zeros everywhere.

    Attributes:
        means: [layers, E, H], mean output. MoNE (arXiv 2507.00390) calls this vector the novice of an expert.
        frequency: [layers, E], share of all tokens that chose the expert.
        variance: [layers, E], mean squared distance of an output from the mean output.
        saliency: [layers, E], mean of router weight times norm of the output, by which REAP (arXiv 2510.13999) prunes.
    """

    means: Tensor
    frequency: Tensor
    variance: Tensor
    saliency: Tensor

    @property
    def redundancy_order(self) -> dict[str, Tensor]:
        """By pruning method, [layers, E]: what an expert is worth; those worth least are removed first.

        MoNE removes experts that are rarely chosen and whose output varies little. Its fusion of the two is a product here.
        """
        return {"reap": self.saliency, "mone": self.frequency * self.variance}


def observed(model: Lanes, items: list[Item]) -> Experts:
    """Decode nothing: compute all tokens of ``items`` at once per length, and sum up what each chosen expert puts out."""
    size = (model.layers, model.experts)
    count, square, weighted = (torch.zeros(size, dtype=torch.float64) for _ in range(3))
    total = torch.zeros(*size, model.config["hidden_size"], dtype=torch.float64)
    tokens = 0

    def spy(layer: int, hidden: Tensor) -> None:
        nonlocal tokens
        tokens += len(hidden) if layer == 0 else 0
        weights, ids = model.top(functional.linear(hidden, model.weights[f"model.layers.{layer}.mlp.gate.weight"]))
        for expert in range(model.experts):
            rows, slots = (ids == expert).nonzero(as_tuple=True)
            if len(rows):
                made = model.expert(layer, expert, hidden[rows]).double()
                count[layer, expert] += len(rows)
                total[layer, expert] += made.sum(0)
                square[layer, expert] += made.square().sum()
                weighted[layer, expert] += (weights[rows, slots] * made.norm(dim=-1)).sum()

    texts = [[tokenizer.IDS[c] for c in item.prompt + item.answer] for item in items]
    for length in sorted({len(text) for text in texts}):
        for rows in torch.tensor([text for text in texts if len(text) == length]).split(LANES):
            cache = model.cache(len(rows), length)
            model.forward(rows, torch.arange(length).expand(len(rows), -1), cache, torch.arange(len(rows)), model.exact, spy)
    each = count.clamp(min=1)
    means = total / each[..., None]
    variance = square / each - means.square().sum(-1)
    return Experts(means.float(), (count / tokens).float(), variance.float(), (weighted / each).float())


def least(worth: Tensor, kept: float) -> Tensor:
    """Bool [layers, E]: the experts to remove so that the share ``kept`` of every layer's experts stays, those worth least."""
    layers, experts = worth.shape
    removed = worth.argsort(-1)[:, : experts - round(kept * experts)]
    return torch.zeros(layers, experts, dtype=torch.bool).scatter_(1, removed, True)
