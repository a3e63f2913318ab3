"""How evenly a model routes and how alike its experts are: `python -m benchmarks.skew [MODEL]`. Prints JSON.

The skew is the exponent s of Zipf weights i^-s under which tokens that draw their experts without replacement (Plackett-Luce) touch
as many distinct experts in a batch of 16 as the model's decode steps do. Fitted in the same way, the numbers of active experts that were
published of Qwen3-30B-A3B (OEA, arXiv 2511.02237) give 1.1; evenly spread routing gives 0.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.ground import calibrated, machine
from benchmarks.lanes import Lanes, answers, prompted
from benchmarks.policies import load
from benchmarks.rerouted import Rerouted
from sere_ext.routing import kernel
from tests.assets.make import models
from tests.kit import ROOT

BATCH, ITEMS, BATCHES = 16, 256, 400
SHARES = (0.1, 0.5, 0.9)


def active(s: float, experts: int, top_k: int) -> float:
    """Mean distinct experts of BATCH tokens that draw `top_k` of `experts` experts with weights i^-s; simulated, seeded."""
    source = torch.Generator().manual_seed(1)
    uniform = torch.rand(BATCHES * BATCH, experts, generator=source)
    logits = -s * torch.arange(1, experts + 1).log() - (-uniform.log()).log()  # weights plus Gumbel noise
    chosen = logits.topk(top_k, -1).indices.view(BATCHES, -1)
    return float(torch.zeros(BATCHES, experts).scatter_(1, chosen, 1.0).sum(1).mean())


def fitted(measured: float, experts: int, top_k: int) -> float:
    """The exponent that gives so many active experts; 0 where even routing gives fewer."""
    low, high = 0.0, 5.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if active(middle, experts, top_k) > measured else (low, middle)
    return low


def quantiles(matrix: Tensor) -> dict[str, list[float]]:
    """Similarity of all pairs of experts, and of each expert to its nearest, at SHARES."""
    others = matrix[~torch.eye(len(matrix), dtype=torch.bool)].view(len(matrix), -1)
    at = torch.tensor(SHARES)
    return {"pairs": others.flatten().quantile(at).tolist(), "nearest": others.max(1).values.quantile(at).tolist()}


def measure(directory: Path) -> dict[str, Any]:
    recipe, model = models.of(directory), Lanes(directory)
    similarity = load(calibrated(recipe, directory, ROOT / "build" / "bench-policies" / directory.name))
    route = Rerouted(model, similarity, {"kind": "exact"}, BATCH)
    answers(model, prompted(model, recipe.tasks.items("eval", ITEMS, 2)), route)
    per_layer = [layer.counters.sum(0) for layer in route.layers]
    touched = [float(counters[kernel.ACTIVE_BEFORE] / counters[kernel.CALLS]) for counters in per_layer]
    return {
        "model": recipe.name,
        "batch": BATCH,
        "activeByLayer": touched,
        "skewByLayer": [fitted(one, recipe.experts, recipe.top_k) for one in touched],
        "skew": fitted(sum(touched) / len(touched), recipe.experts, recipe.top_k),
        "similarity": {"shares": SHARES, "layers": [quantiles(matrix) for matrix in similarity]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", type=Path, nargs="?", default=models.ROWS_MOE.directory)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps({"machine": machine(), **measure(args.model.resolve())}, indent=2))


if __name__ == "__main__":
    main()
