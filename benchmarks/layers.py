"""Which layers should keep the larger S where a policy's S lies between two whole numbers: the small models. Writes JSON.

    python -m benchmarks.layers [--model DIR] [--items N] [--out FILE]

Each layer in turn is the one that keeps S + 1 experts while all others keep S, under every kind, from S = 1 and from S = 2. All cells
decode the same items in full batches of 16 (`recorded.py`), so each is paired with exact routing. Intervals are those of `policies.py`.

What an order of the layers gains is shown without the luck of the winner: layers are put in order on the even items, those with fewest
losses first, and on the odd items the first one, two and three of that order are compared with the first one, two and three layers.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.ground import RESULTS, calibrated, machine
from benchmarks.lanes import Lanes, prompted
from benchmarks.policies import FOLDER, compare, load
from benchmarks.recorded import BATCH, SEED, buckets, decoded, name
from benchmarks.rerouted import Rerouted
from sere_autotune.tuning.space import EXACT, Choice
from sere_ext.contract.policy import Kind
from tests.assets.make import models

KINDS = (Kind.OEA, Kind.SERE, Kind.TOPK)
BASES = (1, 2)
Right = list[bool]


def points(first: Right, second: Right) -> dict[str, float]:
    """Points that `second` loses against `first`, with the limits."""
    return dict(zip(("points", "low", "high"), (round(value, 3) for value in compare(first, second)), strict=True))


Cell = tuple[Right, dict[str, Any]]  # answers by item, and the counts of `recorded.decoded`
Decode = Callable[[Choice, tuple[int, ...]], Cell]  # a choice with whole S, and the layers that keep one expert more


def ordered(positions: Sequence[Right]) -> list[int]:
    """Layers by right answers on the even items where that layer alone has the larger S, best first."""
    return sorted(range(len(positions)), key=lambda layer: (-sum(positions[layer][::2]), layer))


def family(choice: Choice, exact: Right, decode: Decode, layers: int) -> dict[str, Any]:
    """What one kind shows between S and S + 1: each layer alone, and the layers in order against the first layers."""

    def row(larger: tuple[int, ...]) -> dict[str, Any]:
        right, counts = decode(choice, larger)
        return {"larger": list(larger), "active": counts["active"], "slots": counts["slots"], "lost": points(exact, right)}

    order = ordered([decode(choice, (layer,))[0] for layer in range(layers)])
    against = []
    for count in range(1, layers):
        mine, first = tuple(sorted(order[:count])), tuple(range(count))
        gained = points(decode(choice, mine)[0][1::2], decode(choice, first)[0][1::2])
        against.append({"first": row(first), "chosen": row(mine), "gained": gained})
    return {
        "kind": choice.kind.value, "S": choice.S, "none": row(()), "each": [row((layer,)) for layer in range(layers)],
        "all": row(tuple(range(layers))), "order": order, "against": against,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", type=Path, default=models.ROWS_MOE.directory)
    parser.add_argument("--items", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=RESULTS / "layers.json", help="other models in it stay as they were")
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.process_time()
    recipe, directory = models.of(args.model), args.model.resolve()
    model, similarity = Lanes(directory), load(calibrated(recipe, directory, FOLDER / directory.name))
    asked, order = prompted(model, recipe.tasks.items("eval", args.items, SEED)), list(range(args.items))

    @functools.cache
    def decode(choice: Choice, larger: tuple[int, ...]) -> Cell:
        if len(larger) == model.layers:
            return decode(replace(choice, S=choice.S + 1), ())
        found = decoded(model, asked, order, Rerouted(model, similarity, buckets(choice, model.layers, larger), BATCH))
        print(f"{name(choice)} {larger}: {sum(found[0])} right, {found[1]['active']} active", file=sys.stderr, flush=True)
        return found

    exact, _ = decode(EXACT, ())
    families = [family(Choice(kind, S), exact, decode, model.layers) for S in BASES for kind in KINDS]
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    result[recipe.name] = {
        "items": args.items, "seed": SEED, "batch": BATCH, "layers": model.layers, "right": sum(exact), "families": families,
        "processorSeconds": round(time.process_time() - began), "machine": machine(),
    }  # fmt: skip
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
