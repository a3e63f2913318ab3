"""What the small trained model answers under a grid of policies, item by item: what `make bench-tuner` replays. Writes JSON.

    python -m benchmarks.recorded [--model DIR] [--items N] [--minutes N] [--runs N] [--out FILE]

Every cell decodes the same items in full batches of 16 (`lanes.py`, `rerouted.py`); prompts are routed exactly. A further run of a cell
has the items in another order, so that other sequences share a batch: that changes which experts are active, and so what a policy
does to an item. Cells that the file has already are not decoded again.

Of every run the file holds one bit per item (whether its answer was right) and the mean active experts and experts per token of its
decode steps; beside the runs it holds the similarity of the experts and the router logits of a few steps under exact routing.
Shapes: L layers, E experts, B sequences of a batch.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.ground import RESULTS, calibrated, machine
from benchmarks.lanes import Lanes, Prompted, answers, prompted
from benchmarks.policies import FOLDER, load
from benchmarks.rerouted import Rerouted
from sere_autotune.tuning.space import EXACT, Choice, spared_layers
from sere_ext.contract.policy import Kind
from tests.assets.make import models

BATCH = 16
SEED = 3  # of the items
S_VALUES = (1.0, 1.25, 1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.5, 4.0)
RHOS = (0.0, 0.4, 0.5, 0.6)  # of kind sere
EXACT_RUNS = 4  # of exact routing, at least: how often it disagrees with itself is the noise floor
CALLS, AT_STEP = 8, 30  # batches whose router logits are kept, and the step of which


def choices() -> list[Choice]:
    """The grid, exact routing first; whole values of S come first, since they say most should the time be short."""
    found = [EXACT]
    for S in sorted(S_VALUES, key=lambda S: (S % 1 != 0, S)):
        found += [Choice(Kind.TOPK, S), Choice(Kind.OEA, S), *(Choice(Kind.SERE, S, rho) for rho in RHOS)]
    return found


def name(choice: Choice) -> str:
    """A cell's name in the file."""
    return f"{choice.kind.value} {choice.S:g} {choice.rho:g}"


def buckets(choice: Choice, layers: int, larger: tuple[int, ...] | None = None) -> list[dict[str, Any]]:
    """The bucket of every layer, without edges.

    Args:
        larger: layers that keep one expert more where S is a fraction; None takes the first ones, as a search does that has measured no other order.
    """
    if choice.kind is Kind.EXACT:
        return [{"kind": "exact"}] * layers
    whole = int(choice.S)
    spared = spared_layers(choice, range(layers)) if larger is None else larger
    found = []
    for layer in range(layers):
        S = whole + (layer in spared)
        own: dict[str, Any] = {"kind": choice.kind.value, "S": S}
        found.append(own | ({"rho": choice.rho} if choice.rho else {}))
    return found


def shuffled(asked: Prompted, run: int) -> tuple[Prompted, list[int]]:
    """The items in the order of a run, and the number that each had."""
    count = len(asked.items)
    order = np.random.default_rng(run).permutation(count) if run else np.arange(count)
    rows = torch.from_numpy(order)
    cache = replace(asked.cache, keys=asked.cache.keys[:, rows], values=asked.cache.values[:, rows])
    items = [asked.items[number] for number in order]
    return replace(asked, items=items, cache=cache, first=asked.first[rows], position=asked.position[rows]), order.tolist()


def decoded(
    model: Lanes, asked: Prompted, order: list[int], route: Rerouted, watch: Watch | None = None
) -> tuple[list[bool], dict[str, Any]]:
    """Whether each item, by its own number, was right under a policy, and the run as the file holds it."""
    began = time.process_time()
    texts = answers(model, asked, watch or route)
    right = np.zeros(len(order), bool)
    right[order] = [text == item.answer for text, item in zip(texts, asked.items, strict=True)]
    counts = {key: round(value, 3) for key, value in route.counts().items() if key != "activeBefore"}
    return right.tolist(), {"right": packed(right), **counts, "seconds": round(time.process_time() - began, 1)}


class Watch:
    """Keeps the router logits of the first CALLS batches at step AT_STEP on their way to `route`."""

    def __init__(self, route: Rerouted) -> None:
        self.route, self.step, self.kept = route, 0, []  # type: ignore[var-annotated]

    def __call__(self, layer: int, logits: Tensor) -> Tensor:
        self.step += layer == 0
        if self.step == AT_STEP:
            self.kept.append(logits[: CALLS * BATCH].numpy().reshape(-1, BATCH, logits.shape[1]))
        return self.route(layer, logits)

    @property
    def logits(self) -> NDArray[np.float16]:
        """[L, CALLS, B, E]."""
        return np.asarray(self.kept, np.float16)


def packed(values: NDArray[Any]) -> str:
    """Bits, or 16-bit floats, as text."""
    raw = np.packbits(values) if values.dtype == bool else np.ascontiguousarray(values, "<f2")
    return base64.b64encode(raw.tobytes()).decode()


def work(runs: int, done: dict[str, list[Any]]) -> Iterator[tuple[Choice, int]]:
    """The cells that are missing: a first run of all, then exact routing's, then one more run of all before the next of any."""
    wanted = [(choice, 0) for choice in choices()] + [(EXACT, run) for run in range(1, max(runs, EXACT_RUNS))]
    wanted += [(choice, run) for run in range(1, runs) for choice in choices() if choice != EXACT]
    for choice, run in wanted:
        if len(done.get(name(choice), ())) <= run:
            yield choice, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", type=Path, default=models.ROWS_MOE.directory)
    parser.add_argument("--items", type=int, default=2048)
    parser.add_argument("--minutes", type=float, default=math.inf, help="of processor time, after which no cell is begun")
    parser.add_argument("--runs", type=int, default=1, help="of every cell; exact routing has more")
    parser.add_argument("--out", type=Path, help="JSON; recorded-MODEL.json in benchmarks/results when not given")
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe, directory = models.of(args.model), args.model.resolve()
    out = args.out or RESULTS / f"recorded-{recipe.name}.json"
    model, similarity = Lanes(directory), load(calibrated(recipe, directory, FOLDER / directory.name))
    asked = prompted(model, recipe.tasks.items("eval", args.items, SEED))
    result: dict[str, Any] = {
        "model": recipe.name, "items": args.items, "seed": SEED, "batch": BATCH, "layers": model.layers, "experts": recipe.experts,
        "topK": recipe.top_k, "similarity": packed(similarity.numpy()), "calls": CALLS, "logits": "", "cells": {},
    }  # fmt: skip
    if out.exists():
        before = json.loads(out.read_text())
        if all(before[key] == result[key] for key in ("model", "items", "seed", "batch")):
            result |= {key: before[key] for key in ("logits", "cells")}
    last, mixed, order = -1, asked, list(range(args.items))
    for choice, run in work(args.runs, result["cells"]):
        if time.process_time() > 60 * args.minutes:
            print("out of time", file=sys.stderr)
            break
        if run != last:
            (mixed, order), last = shuffled(asked, run), run
        route = Rerouted(model, similarity, buckets(choice, model.layers), BATCH)
        watch = Watch(route) if choice == EXACT and not result["logits"] else None
        right, row = decoded(model, mixed, order, route, watch)
        result["cells"].setdefault(name(choice), []).append(row)
        result |= {"logits": packed(watch.logits)} if watch else {}
        out.write_text(json.dumps({**result, "machine": machine()}, indent=1) + "\n")
        print(f"{name(choice):16s} run {run}: {sum(right)} of {len(right)} right, {row}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
