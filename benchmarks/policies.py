"""`make bench-policies`: accuracy against active experts of every kind of policy, on the small trained model. Writes JSON.

    python -m benchmarks.policies [--model DIR] [--items N] [--seed N] [--batch N ...] [--out FILE]
    python -m benchmarks.policies --engine [--model DIR]

Beside the product's kinds stand `novice` (`novices.py`) and the model with experts removed (`pruned.py`). Every cell decodes the same items in full batches of 1, 4, 16 or 64 sequences (`lanes.py`) under one policy, which the plug-in's
CPU kernel applies (`rerouted.py`); prompts are routed exactly. Drops are paired with exact routing at the same batch size: the two-sided 95 %
score interval for a difference of paired proportions (T. Tango, Statistics in Medicine 17 (1998) 891), items taken as independent.
One cell is decoded by vLLM as well, waves of requests at a time, and both must give the same answers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import novices
from benchmarks.experts import observed
from benchmarks.ground import CALIBRATION_ITEMS, RESULTS, calibrated, machine
from benchmarks.lanes import Lanes, Prompted, answers, prompted
from benchmarks.novices import Novices
from benchmarks.pruned import Pruned, Remaining, prune
from benchmarks.rerouted import Rerouted, describe, grid
from sere_ext.similarity.file import read_similarity
from tests.assets.make import models
from tests.assets.make.tasks import Item
from tests.kit import ROOT

Route = Rerouted | Novices | Remaining
FOLDER = ROOT / "build" / "bench-policies"
BATCHES = (1, 4, 16, 64)
CONFIDENCE = 0.95
Z = 1.959964  # of CONFIDENCE, two-sided
EQUAL_ACTIVE = 1.02  # policies within 2 % of active experts count as equally fast
# Where the engine must agree: one wave of requests at a time, so that both know which tokens share a step.
ENGINE_BATCH, ENGINE_ITEMS = 16, 512
ENGINE_BUCKET: dict[str, Any] = {"kind": "sere", "S": 1}
# By model: what `rerouted.grid` is asked for.
GRIDS: dict[str, dict[str, Any]] = {
    "tiny_moe": {"slots": (1, 2, 3), "rhos": (0.3,), "budgets": (2, 6, 8)},
    "rows_moe": {"slots": (1, 2, 3, 4), "rhos": (0.3,), "budgets": (8, 16, 24)},
}
NOVICES = (1, 2, 3)  # values of S
# Removed for good: share of every layer's experts that stays, at which batch size; the methods; the policies on what is left.
KEPT, PRUNED_AT = (0.75, 0.5), 16
NAMES = {"reap": "REAP", "mone": "MoNE"}
ON_PRUNED: list[dict[str, Any]] = [{"kind": "exact"}, {"kind": "oea", "S": 2}, {"kind": "oea", "S": 2, "minShare": 0.5}]
RIVALS = ("oea", "sere", "topk", "budget")  # the product's kinds that are compared with the others


@dataclass
class Cell:
    """One policy at one batch size."""

    batch: int
    bucket: dict[str, Any]
    policy: str
    right: list[bool]
    texts: list[str]
    pruned: bool = False
    row: dict[str, Any] = field(default_factory=dict)


def drop_interval(losses: int, gains: int, n: int) -> tuple[float, float]:
    """Two-sided 95 % limits of the drop, a fraction: all values that Tango's score test does not reject.

    Args:
        losses: items right under the first policy alone.
        gains: items right under the second alone.
        n: items.
    """

    def z(drop: float) -> float:
        a, b = 2.0 * n, -losses - gains + (2.0 * n - losses + gains) * drop
        share_of_gains = (math.sqrt(max(b * b + 4.0 * a * gains * drop * (1.0 - drop), 0.0)) - b) / (2.0 * a)
        variance = n * (2.0 * share_of_gains + drop * (1.0 - drop))
        return (losses - gains - n * drop) / math.sqrt(variance) if variance > 0 else 0.0

    def edge(inside: float, outside: float) -> float:
        for _ in range(50):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if abs(z(middle)) <= Z else (inside, middle)
        return inside

    drop = (losses - gains) / n
    return edge(drop, -1.0 + 1e-9), edge(drop, 1.0 - 1e-9)


def compare(first: list[bool], second: list[bool]) -> tuple[float, float, float]:
    """Points that `second` loses against `first`, with the limits."""
    losses = sum(a and not b for a, b in zip(first, second, strict=True))
    gains = sum(b and not a for a, b in zip(first, second, strict=True))
    low, high = drop_interval(losses, gains, len(first))
    return 100 * (losses - gains) / len(first), 100 * low, 100 * high


def routed(model: Lanes, similarity: Tensor, bucket: dict[str, Any], batch: int) -> Route:
    """What applies a policy to this model."""
    if bucket["kind"] == "novice":
        return Novices(model, bucket, batch)
    route = Rerouted(model, similarity, bucket, batch)
    return Remaining(route, model.removed, batch) if isinstance(model, Pruned) and model.means is not None else route


def measure(
    model: Lanes,
    asked: Prompted,
    similarity: Tensor,
    batch: int,
    buckets: list[dict[str, Any]],
    seconds: float = math.inf,
    against: Cell | None = None,
    label: dict[str, Any] | None = None,
) -> list[Cell]:
    """All policies at one batch size. None is begun after so many seconds.

    Args:
        against: what the others are paired with; the first policy when not given.
        label: what the model is where it is not the whole one: `method` and `kept`, kept in the row and in front of the policy's name.
    """
    cells: list[Cell] = []
    prefix = f"{NAMES[label['method']]} {100 * label['kept']:.0f} % " if label else ""
    until = time.monotonic() + seconds
    for bucket in buckets:
        if time.monotonic() > until:
            print(f"batch {batch:2d}: out of time before {describe(bucket)}", file=sys.stderr)
            break
        policy, began = prefix + describe(bucket), time.monotonic()
        route = routed(model, similarity, bucket, batch)
        texts = answers(model, asked, route)
        right = [text == item.answer for text, item in zip(texts, asked.items, strict=True)]
        cell = Cell(batch, bucket, policy, right, texts, pruned=label is not None)
        first = against or (cells or [cell])[0]
        drop, low, high = compare(first.right, right)
        cell.row = {
            "batch": batch, "policy": policy, **bucket, **(label or {}), "correctPercent": 100 * sum(right) / len(right),
            "dropPoints": drop, "dropLow": low, "dropHigh": high,
            "differPercent": 100 * sum(a != b for a, b in zip(texts, first.texts, strict=True)) / len(texts),
            **route.counts(), "seconds": time.monotonic() - began,
        }  # fmt: skip
        cells.append(cell)
        print(f"batch {batch:2d}  {policy:34s} {drop:7.3f} [{low:.3f}, {high:.3f}]  {cell.row['active']:.2f}", file=sys.stderr)
    return cells


def mark_front(cells: list[Cell]) -> None:
    """Set `front` on every cell of one batch size: no other needs as few experts (within 2 %) and loses less, beyond noise."""
    for cell in cells:
        cell.row["front"] = not any(
            other.row["active"] <= cell.row["active"] * EQUAL_ACTIVE and compare(other.right, cell.right)[1] > 0
            for other in cells
            if other is not cell
        )


def duels(cells: list[Cell]) -> list[dict[str, Any]]:
    """Each policy that is not one of RIVALS, and each pruned model, against every kind of RIVALS: points gained, with limits.

    The rival is the policy of its kind on the whole model with most active experts of those that need no more than the challenger
    (within 2 %). It is picked by what it costs and never by how it answers, so that the interval is as good as for two policies named
    beforehand.
    """
    found = []
    for cell in (c for c in cells if c.pruned or c.bucket["kind"] in ("novice", "hybrid")):
        for kind in RIVALS:
            rivals = [c for c in cells if c.bucket["kind"] == kind and not c.pruned]
            rivals = [c for c in rivals if c.row["active"] <= cell.row["active"] * EQUAL_ACTIVE]
            if not rivals:
                continue
            rival = max(rivals, key=lambda c: c.row["active"])
            gain, low, high = compare(cell.right, rival.right)
            found.append(
                {
                    "batch": cell.batch, "policy": cell.policy, "active": cell.row["active"], "kind": kind, "rival": rival.policy,
                    "rivalActive": rival.row["active"], "gainPoints": gain, "gainLow": low, "gainHigh": high,
                    "verdict": "wins" if low > 0 else "loses" if high < 0 else "level",
                }
            )  # fmt: skip
    return found


def in_engine(directory: Path, similarity: Path, asked: list[Item], longest: int) -> list[str]:
    """Answers of vLLM in waves of ENGINE_BATCH under ENGINE_BUCKET; a wave's prompts are outside the bucket, so exact."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # all requests of a wave are there before its first step
    from vllm import LLM, SamplingParams

    ours = {"similarity": str(similarity), "policy": {"buckets": [{"minTokens": 1, "maxTokens": ENGINE_BATCH, **ENGINE_BUCKET}]}}
    engine = LLM(
        model=str(directory), dtype="float32", enforce_eager=True, max_model_len=128, max_num_seqs=ENGINE_BATCH,
        enable_prefix_caching=False, additional_config={"sere": ours},
    )  # fmt: skip
    greedy = SamplingParams(temperature=0, max_tokens=longest)
    texts: list[str] = []
    for start in range(0, len(asked), ENGINE_BATCH):
        wave = [item.prompt for item in asked[start : start + ENGINE_BATCH]]
        texts += [output.outputs[0].text for output in engine.generate(wave, greedy, use_tqdm=False)]
    return texts


def engine_check(recipe: models.Recipe, directory: Path, similarity: Path, seed: int) -> dict[str, Any]:
    """The same waves in both; how many answers are equal."""
    asked = recipe.tasks.items("eval", ENGINE_ITEMS, seed)
    model = Lanes(directory)
    started = prompted(model, asked)
    route = Rerouted(model, load(similarity), ENGINE_BUCKET, ENGINE_BATCH)
    mine = answers(model, started, route, refill=False, batch=ENGINE_BATCH)
    theirs = in_engine(directory, similarity, asked, started.longest)
    right = [sum(t == item.answer for t, item in zip(texts, asked, strict=True)) for texts in (mine, theirs)]
    equal = sum(a == b for a, b in zip(mine, theirs, strict=True))
    return {
        "policy": describe(ENGINE_BUCKET), "batch": ENGINE_BATCH, "items": len(asked), "equal": equal,
        "right": right[0], "engineRight": right[1],
    }  # fmt: skip


def load(similarity: Path) -> Tensor:
    """Matrices of all layers, [layers, E, E]."""
    return torch.stack([torch.from_numpy(matrix) for _, matrix in sorted(read_similarity(similarity).matrices.items())])


def table(
    directory: Path, similarity: Path, count: int, seed: int, batch: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows and duels of one batch size."""
    recipe, model, matrices = models.of(directory), Lanes(directory), load(similarity)
    items = recipe.tasks.items("eval", count, seed)
    experts = observed(model, recipe.tasks.items("calibration", CALIBRATION_ITEMS, 0))
    model.means = experts.means
    buckets = grid(**GRIDS[recipe.name], most=min(model.experts, batch * model.top_k)) + novices.grid(NOVICES)
    cells = measure(model, prompted(model, items), matrices, batch, buckets)
    if batch == PRUNED_AT:
        for method, kept in itertools.product(NAMES, KEPT):
            smaller, label = prune(directory, experts, method, kept), {"method": method, "kept": kept}
            cells += measure(smaller, prompted(smaller, items), matrices, batch, ON_PRUNED, against=cells[0], label=label)
    mark_front(cells)
    return [cell.row for cell in cells], duels(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", type=Path, default=models.ROWS_MOE.directory)
    parser.add_argument("--items", type=int, default=512)
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument(
        "--batch", type=int, nargs="+", default=list(BATCHES), help="batch sizes to decode; the others stay as they were"
    )
    parser.add_argument("--out", type=Path, help="JSON; policies-MODEL.json in benchmarks/results when not given")
    parser.add_argument("--engine", action="store_true", help="the check against vLLM alone")
    args = parser.parse_args()
    torch.set_num_threads(1)  # torch's own threads gain little on tensors this small
    recipe, directory = models.of(args.model), args.model.resolve()
    out = args.out or RESULTS / f"policies-{recipe.name}.json"
    similarity = calibrated(recipe, directory, FOLDER / directory.name)
    asked = {"model": recipe.name, "items": args.items, "seed": args.seed, "experts": recipe.experts, "topK": recipe.top_k}
    result: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    if any(result.get(name) != value for name, value in asked.items()):
        result = {**asked, "engineCheck": None, "batches": {}}
    out.parent.mkdir(parents=True, exist_ok=True)

    def keep() -> None:
        out.write_text(json.dumps({**result, "machine": machine()}, indent=1) + "\n")

    if args.engine:
        result["engineCheck"] = engine_check(recipe, directory, similarity, args.seed)
        keep()
        return
    for batch in sorted(args.batch):
        began = time.process_time()
        rows, fights = table(directory, similarity, args.items, args.seed, batch)
        result["batches"][str(batch)] = {"processorSeconds": time.process_time() - began, "rows": rows, "duels": fights}
        result["batches"] = dict(sorted(result["batches"].items(), key=lambda kept: int(kept[0])))
        keep()
    print(out)


if __name__ == "__main__":
    main()
