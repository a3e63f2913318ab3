"""The small model in plain torch under continuous batching, with the routing of decode steps replaceable.

Many batches run side by side in one forward pass ("lanes"), each with its own union of experts, which is what makes
hundreds of items under dozens of policies take minutes on one core. Prompts are computed once, with exact routing. A lane
takes the next item as soon as it has finished one. Items that are not counted come before the counted ones, cut off at places spread
evenly over an answer, and after them: so every counted token was decoded in a full batch whose sequences were at different places
of their answers, as in a server that requests reach one by one.

Shapes: L lanes, B sequences per batch, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tests.assets.make import tokenizer
from tests.assets.make.reference import Cache, Reference
from tests.assets.make.tasks import Item

LANES = 512
GOLDEN = 0.6180339887  # multiples of it are spread evenly between 0 and 1, modulo 1

# (layer, router logits [L, E]) -> weight of every expert [L, E], 0 where a token does not use it; or [L, 2E], where the right half
# is the weight of every expert's mean output
Mix = Callable[[int, Tensor], Tensor]


class Lanes(Reference):
    """A `Reference` whose router is a `Mix`.

    Attributes:
        means: [layers, E, H], every expert's mean output, for a `Mix` that uses it.
    """

    means: Tensor | None = None

    def exact(self, _layer: int, logits: Tensor) -> Tensor:
        """The routing the model was trained with."""
        weights, ids = self.top(logits)
        return torch.zeros_like(logits).scatter_(1, ids, weights)

    def top(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and ids [L, k] as the model's router returns them."""
        weights, ids = logits.softmax(-1).topk(self.top_k, -1)
        return (weights / weights.sum(-1, keepdim=True) if self.config["norm_topk_prob"] else weights), ids

    def moe(self, layer: int, x: Tensor, route: Mix) -> Tensor:
        mix = route(layer, functional.linear(x, self.weights[f"model.layers.{layer}.mlp.gate.weight"]))
        return self.mixed(layer, x, mix)

    def mixed(self, layer: int, x: Tensor, mix: Tensor) -> Tensor:
        own = mix[:, : self.experts]
        made = super().mixed(layer, x, own) if own.any() else torch.zeros_like(x)  # all experts in use may be removed ones
        if mix.shape[1] == self.experts:
            return made
        assert self.means is not None
        return made + mix[:, self.experts :] @ self.means[layer]


@dataclass
class Prompted:
    """Items whose prompts were computed under exact routing."""

    items: list[Item]
    cache: Cache  # one row per item, with room for the longest prompt and the longest answer
    first: Tensor  # int64 [items]: first token of the answer
    position: Tensor  # int64 [items]: its place
    longest: int  # tokens after which an answer is cut off: those of the longest right one and its end


def prompted(model: Lanes, items: list[Item]) -> Prompted:
    """Compute all prompts; equal lengths together, so that nothing is padding."""
    longest = max(len(item.answer) for item in items) + 1
    cache = model.cache(len(items), max(len(item.prompt) for item in items) + longest)
    first, position = torch.zeros(len(items), dtype=torch.int64), torch.tensor([len(item.prompt) for item in items])
    for length in sorted(set(position.tolist())):
        for rows in (position == length).nonzero().flatten().split(LANES):
            ids = torch.tensor([[tokenizer.IDS[c] for c in items[row].prompt] for row in rows.tolist()])
            logits = model.forward(ids, torch.arange(length).expand(len(rows), -1), cache, rows, model.exact)
            first[rows] = logits[:, -1].argmax(-1)
    return Prompted(items, cache, first, position, longest)


def answers(model: Lanes, asked: Prompted, route: Mix, *, refill: bool = True, batch: int = LANES) -> list[str]:
    """Greedy answers of all items, decoded under `route` in full batches.

    Args:
        route: called with all lanes; batch number b owns the lanes b * B to b * B + B - 1.
        refill: False lets a batch of `batch` finish before it takes new items, as waves of requests do; idle lanes then
            give NaN logits to `route`.
    """
    lanes = min(LANES, -(-len(asked.items) // batch) * batch)
    cache = model.cache(lanes, asked.cache.keys.shape[3])
    tokens = torch.full((len(asked.items), asked.longest), tokenizer.EOS_ID)
    tokens[:, 0] = asked.first
    length = torch.ones(len(asked.items), dtype=torch.int64)
    owner = torch.full((lanes,), -1)  # item of each lane
    counted = torch.zeros(lanes, dtype=torch.bool)
    last, position = torch.zeros(lanes, dtype=torch.int64), torch.zeros(lanes, dtype=torch.int64)
    taken, open_items, began = 0, len(asked.items), False
    everywhere = torch.arange(lanes)
    most = torch.full((lanes,), asked.longest - 1)  # tokens after the first one, at which a lane is through with its item
    if refill:
        most = (1 + GOLDEN * everywhere % 1 * (asked.longest - 2)).long()

    def masked(layer: int, logits: Tensor) -> Tensor:
        idle = owner < 0
        mix = route(layer, logits.masked_fill(idle[:, None], torch.nan) if idle.any() else logits)
        return mix.masked_fill(idle[:, None], 0.0)

    while open_items:
        free = (owner < 0).nonzero().flatten()
        if not refill:
            free = free[(owner.view(-1, batch) < 0).all(1).repeat_interleave(batch)[free]]
            free = free[: len(asked.items) - taken]
        if len(free):
            first = refill and not began
            number = torch.arange(len(free)) + (0 if first else taken)
            item = number % len(asked.items)
            owner[free], counted[free] = item, (number < len(asked.items)) & (not first)
            taken += 0 if first else len(free)
            began = True
            cache.keys[:, free], cache.values[:, free] = asked.cache.keys[:, item], asked.cache.values[:, item]
            last[free], position[free] = asked.first[item], asked.position[item]
            # Items that are not counted have an answer of their own length: it is kept apart.
        logits = model.forward(last[:, None], position[:, None], cache, everywhere, masked)
        last = logits[:, 0].argmax(-1)
        position = position + 1
        live = owner >= 0
        mine = (live & counted).nonzero().flatten()
        tokens[owner[mine], length[owner[mine]]] = last[mine]
        length[owner[mine]] += 1
        over = live & ((last == tokenizer.EOS_ID) | (position - asked.position[owner.clamp(min=0)] >= most))
        open_items -= int((over & counted).sum())
        most[over] = asked.longest - 1
        owner[over] = -1
        position[over] = 0
    characters = {index: character for character, index in tokenizer.IDS.items()}
    return ["".join(characters.get(token, "?") for token in row if token != tokenizer.EOS_ID) for row in tokens.tolist()]
