"""`python -m benchmarks.calibration`: similarity of 64 experts by running sums against plain loops over pairs, on the CPU. Prints JSON.

Both sides get the same expert outputs, made beforehand, so the model's own time is in neither; the loops hold all outputs at
once (which no real model allows) in float32, the running sums get them in chunks. Each side is the best of its repeats.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.ground import machine
from sere_ext.calibration.moments import make_moments
from tests.kit import pairwise

EXPERTS, CHUNK = 64, 256
WIDE, NARROW = (1024, 512), (1024, 64)  # tokens, hidden size; CKA needs E^2 H^2 sums
SHAPES = {"frobenius": WIDE, "cosine": WIDE, "cka": NARROW, "cka, kernel matrices": NARROW}  # two plain forms of linear CKA


def measure(repeats: int = 3) -> dict[str, Any]:
    """Per metric: seconds of both sides, their ratio, and the largest difference of a similarity from float64 loops."""
    found: dict[str, Any] = {"experts": EXPERTS, "threads": torch.get_num_threads(), "metrics": {}}
    for loops, (tokens, hidden) in SHAPES.items():
        metric = loops.split(",")[0]
        outputs = torch.randn(EXPERTS, tokens, hidden, generator=torch.Generator().manual_seed(0))
        outputs[1::2] = 0.5 * outputs[1::2] + 0.5 * outputs[::2]  # pairs that are alike, as in a real layer

        def ours(metric: str = metric, outputs: torch.Tensor = outputs) -> torch.Tensor:
            total = make_moments(metric, EXPERTS, "cpu")  # type: ignore[arg-type]
            for start in range(0, outputs.shape[1], CHUNK):
                total.add(outputs[:, start : start + CHUNK], (start // CHUNK) % 2)
            return torch.from_numpy(total.matrix())

        plain_s, _ = best_s(partial(pairwise.LOOPS[loops], outputs), repeats)
        running_s, matrix = best_s(ours, repeats)
        exact = pairwise.METRICS[metric](outputs.double())
        found["metrics"][loops] = {
            "tokens": tokens,
            "hiddenSize": hidden,
            "pairwiseSeconds": round(plain_s, 4),
            "runningSumsSeconds": round(running_s, 4),
            "ratio": round(plain_s / running_s, 1),
            "largestDifference": float((matrix - exact).abs().max()),
        }
    return found


def best_s(call: Callable[[], torch.Tensor], repeats: int) -> tuple[float, torch.Tensor]:
    """Seconds of the fastest run, and its answer."""
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        answer = call()
        best = min(best, time.perf_counter() - began)
    return best, answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(json.dumps({"machine": machine(), **measure(args.repeats)}, indent=2))


if __name__ == "__main__":
    main()
