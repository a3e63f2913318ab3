"""Whether a model that was trained anew is the committed one again: `python -m benchmarks.retrained MODEL`. Prints JSON.

Both models answer the same items under every policy of POLICIES, sixteen sequences at a time. Ends with 1 where their accuracies
under exact routing are more than LIMIT_POINTS apart. On the same kind of processor a training run repeats itself to the bit; on
another one rounding takes it elsewhere, and what a policy loses may differ by more.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import policies
from benchmarks.ground import calibrated, machine
from benchmarks.lanes import Lanes, prompted
from benchmarks.rerouted import describe
from tests.assets.make import models
from tests.kit import ROOT

BATCH = 16
POLICIES: list[dict[str, Any]] = [
    {"kind": "exact"},
    {"kind": "sere", "S": 2},
    {"kind": "oea", "S": 2},
    {"kind": "topk", "S": 2},
]
LIMIT_POINTS = 1.0  # of accuracy under exact routing


def accuracies(directory: Path, folder: Path, count: int, seed: int) -> dict[str, float]:
    """Percent of items answered right by the model in ``directory``, by policy."""
    recipe, model = models.of(directory), Lanes(directory)
    asked = prompted(model, recipe.tasks.items("eval", count, seed))
    similarity = policies.load(calibrated(recipe, directory, folder))
    cells = policies.measure(model, asked, similarity, BATCH, POLICIES)
    return {cell.policy: cell.row["correctPercent"] for cell in cells}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--items", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    committed, folder = models.of(args.model).directory, ROOT / "build" / "retrained"
    found = {
        name: accuracies(directory, folder / f"similarity-{name}", args.items, args.seed)
        for name, directory in (("committed", committed), ("retrained", args.model))
    }
    exact = describe(POLICIES[0])
    apart = abs(found["committed"][exact] - found["retrained"][exact])
    print(json.dumps({"machine": machine(), "items": args.items, "correctPercent": found, "exactApartPoints": apart}, indent=2))
    sys.exit(apart > LIMIT_POINTS)


if __name__ == "__main__":
    main()
