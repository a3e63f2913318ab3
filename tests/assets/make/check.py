"""What SERE costs on the small model: ``python tests/assets/make/check.py --items 4000`` prints one JSON object.

A plain reference of decode-only SERE under continuous batching: every decode step runs ``batch`` live sequences, prefill is
exact, the primaries are the union over the live sequences of each one's best S experts, and every other chosen expert is
replaced by its most similar primary. Many such batches run side by side, each with its own union, which is what makes
thousands of items take seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizer
import torch
from reference import Reference, exact
from tasks import Item, items
from torch import Tensor

MODEL = Path(__file__).resolve().parent.parent / "tiny_moe"

CAPACITY = 40  # tokens of the longest item and some room for an answer that does not stop
LONGEST_ANSWER = 16  # tokens after which an answer is cut off
LANES = 256  # sequences in one forward pass: many batches side by side


def similarity(model: Reference, calibration: list[Item]) -> Tensor:
    """Frobenius similarity of the experts, [layers, E, E]: 1 - ||Ei - Ej|| / the largest such distance of the layer.

    Every expert sees the same inputs: those of the whole layer on the calibration items, prompt and answer.
    """
    layers: list[Tensor] = []
    texts = [item.prompt + item.answer for item in calibration]
    inputs: dict[int, list[Tensor]] = defaultdict(list)
    for length in sorted(set(map(len, texts))):  # equal lengths together, so that nothing is padding
        ids = torch.tensor([[tokenizer.IDS[c] for c in text] for text in texts if len(text) == length])
        positions = torch.arange(length).expand(len(ids), -1)
        cache = model.cache(len(ids), length)
        model.forward(ids, positions, cache, torch.arange(len(ids)), spy=lambda layer, x: inputs[layer].append(x))
    for layer in range(model.layers):
        x = torch.cat(inputs[layer])
        outputs = torch.stack([model.expert(layer, expert, x).flatten() for expert in range(model.experts)]).double()
        distances = torch.stack([(outputs - one).norm(dim=1) for one in outputs])
        layers.append(1 - distances / distances.max())
    return torch.stack(layers).float()


@dataclass(slots=True)
class Sere:
    """Decode-step routing of ``LANES // batch`` batches side by side; counts the experts that each one touches.

    ``S`` 0 leaves the routing exact and only counts.
    """

    S: int
    rho: float
    similarity: Tensor  # [layers, E, E]
    live: Tensor  # bool [batches, batch]
    before: list[float] = field(default_factory=list)  # mean active experts, one entry per layer and step
    after: list[float] = field(default_factory=list)

    def __call__(self, layer: int, ids: Tensor) -> Tensor:
        """Re-routed ids, [tokens, k] as given."""
        groups, batch = self.live.shape
        experts = self.similarity.shape[-1]
        grouped = ids.view(groups, batch, -1)
        active = self._active(grouped, experts)
        full = self.live.all(1)  # batches that run dry at the end would flatter the figures
        if not self.S:
            changed = grouped
        else:
            primary = self._active(grouped[..., : self.S], experts)
            closeness = self.similarity[layer][None].masked_fill(~primary[:, None, :], -torch.inf)  # [groups, from, to]
            best, target = closeness.max(-1)
            own = torch.arange(experts).expand(groups, -1)
            target = torch.where(primary | (best < self.rho), own, target)
            changed = target[:, None].expand(-1, batch, -1).gather(2, grouped)
        if full.any():
            self.before.append(active[full].sum(1).double().mean().item())
            self.after.append(self._active(changed, experts)[full].sum(1).double().mean().item())
        return changed.reshape(ids.shape)

    def _active(self, grouped: Tensor, experts: int) -> Tensor:
        """Which experts the live rows of each batch name, bool [batches, E]."""
        named = torch.zeros(*grouped.shape[:2], experts, dtype=torch.bool).scatter_(2, grouped, True)
        return (named & self.live[..., None]).any(1)


def answers(model: Reference, asked: list[Item], batch: int, route: Sere) -> list[str]:
    """Greedy answers under continuous batching: a lane takes the next item as soon as it has finished one."""
    lanes = route.live.numel()
    cache = model.cache(lanes, CAPACITY)
    owner: list[int | None] = [None] * lanes
    texts = [""] * len(asked)
    last = torch.full((lanes,), tokenizer.EOS_ID)
    position = torch.zeros(lanes, dtype=torch.int64)
    waiting = iter(range(len(asked)))
    characters = {index: character for character, index in tokenizer.IDS.items()}

    def take(lane: int, token: int) -> None:
        """Append a token to the lane's answer, or free the lane."""
        index = owner[lane]
        assert index is not None
        if token == tokenizer.EOS_ID or len(texts[index]) == LONGEST_ANSWER:
            owner[lane] = None
        else:
            texts[index] += characters.get(token, "?")
            last[lane] = token

    while True:
        for lane in [lane for lane in range(lanes) if owner[lane] is None]:
            owner[lane] = next(waiting, None)
            position[lane] = 0
        fresh = [lane for lane in range(lanes) if owner[lane] is not None and position[lane] == 0]
        if fresh:
            prompts = [[tokenizer.IDS[c] for c in asked[owner[lane]].prompt] for lane in fresh]  # type: ignore[index]
            width = max(map(len, prompts))
            ids = torch.tensor([prompt + [tokenizer.PAD_ID] * (width - len(prompt)) for prompt in prompts])
            logits = model.forward(ids, torch.arange(width).expand(len(fresh), -1), cache, torch.tensor(fresh), exact)
            for row, (lane, prompt) in enumerate(zip(fresh, prompts, strict=True)):
                position[lane] = len(prompt)  # later tokens overwrite what padding left in the cache
                take(lane, int(logits[row, len(prompt) - 1].argmax()))
        live = torch.tensor([index is not None for index in owner])
        if not live.any():
            return texts
        route.live = live.view(-1, batch)
        # Idle lanes compute along at position 0, unseen: the next prompt overwrites them.
        logits = model.forward(last[:, None], position[:, None], cache, torch.arange(lanes), route)
        chosen = logits[:, 0].argmax(-1).tolist()
        position += 1
        for lane in live.nonzero().flatten().tolist():
            take(lane, chosen[lane])


def measure(directory: Path, count: int, seed: int, settings: list[tuple[int, int, float]]) -> dict[str, Any]:
    """Accuracy, answers that differ from exact, and active experts, for each (batch, S, rho)."""
    model = Reference(directory)
    matrix = similarity(model, items("calibration", 600, 0))
    asked = items("eval", count, seed)
    baseline: dict[int, list[str]] = {}
    report = []
    for batch in sorted({batch for batch, _, _ in settings}):
        for S, rho in [(0, 0.0)] + [(S, rho) for other, S, rho in settings if other == batch]:
            route = Sere(S, rho, matrix, torch.ones(LANES // batch, batch, dtype=torch.bool))
            texts = answers(model, asked, batch, route)
            baseline.setdefault(batch, texts)
            right = [text == item.answer for text, item in zip(texts, asked, strict=True)]
            base = [text == item.answer for text, item in zip(baseline[batch], asked, strict=True)]
            families: dict[str, list[bool]] = defaultdict(list)
            for item, good in zip(asked, right, strict=True):
                families[item.task].append(good)
            report.append(
                {
                    "batch": batch,
                    "S": S or "exact",
                    "rho": rho,
                    "accuracy": _percent(sum(right), count),
                    "points_lost": round(100 * (sum(base) - sum(right)) / count, 3),
                    "differing": _percent(sum(a != b for a, b in zip(texts, baseline[batch], strict=True)), count),
                    "active_before": round(sum(route.before) / max(1, len(route.before)), 2),
                    "active_after": round(sum(route.after) / max(1, len(route.after)), 2),
                    "families": {task: _percent(sum(good), len(good)) for task, good in sorted(families.items())},
                }
            )
    return {"items": count, "seed": seed, "experts": model.experts, "top_k": model.top_k, "settings": report}


def _percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 3)


def apart(mine: dict[str, Any], other: dict[str, Any]) -> float:
    """Largest difference in accuracy between two models' reports of the same settings, in points."""
    pairs = zip(mine["settings"], other["settings"], strict=True)
    return max(abs(one["accuracy"] - two["accuracy"]) for one, two in pairs)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--items", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--S", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rho", type=float, nargs="+", default=[0.0])
    parser.add_argument("--threads", type=int, default=1, help="more only helps on an idle machine")
    parser.add_argument("--against", type=Path, metavar="MODEL", help="fail if an accuracy is over a point from this model's")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    settings = [(batch, S, rho) for batch in given.batch for S in given.S for rho in given.rho]
    report = measure(given.model, given.items, given.seed, settings)
    print(json.dumps(report, indent=1))
    if given.against:
        points = apart(report, measure(given.against, given.items, given.seed, settings))
        print(f"{given.model} and {given.against} differ by at most {points:.3f} points", file=sys.stderr)
        sys.exit(points > 1)


if __name__ == "__main__":
    main()
