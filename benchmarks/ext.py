"""`make bench-ext`: what the extension costs and gains on this machine's CPU. Writes JSON.

    python -m benchmarks.ext [--rounds N] [--factor F] [--only PART ...] [--out FILE]

Three parts. `ops`: time of re-routing and of the experts, stock, re-routed, merged and packed (`operators.py`). `widened`: TPOT of
decode steps of the widened model at concurrency 1, 4, 16 and 64. Stock vLLM without the plug-in runs in one engine and the plug-in
under each policy in another, both warm; they take turns on the same requests in random order, so that drift cancels; ratios with a
95 % t interval over rounds. `calibration`: running sums against plain loops over pairs (`calibration.py`). Both sides of each ratio
are from one run.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.ground import RESULTS, machine, shape, widened
from sere_autotune.trial.stats import ratio_interval
from tests.assets.make.models import ROWS_MOE
from tests.kit import ROOT

RESULT = RESULTS / "ext.json"
PARTS = ("ops", "widened", "calibration")
CONCURRENCY = (1, 4, 16, 64)
WAVES = {1: 4, 4: 2, 16: 1, 64: 1}  # per turn
STEPS = 20  # decode steps of a wave
ARMS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "off": {"kind": "exact"},
    "sere S=2": {"kind": "sere", "S": 2},
    "sere S=1": {"kind": "sere", "S": 1},
    "topk S=2": {"kind": "topk", "S": 2},
    "oea S=2": {"kind": "oea", "S": 2},
    "oea S=2 share=0.50": {"kind": "oea", "S": 2, "minShare": 0.5},
    "oea S=3": {"kind": "oea", "S": 3},
    "budget N=20": {"kind": "budget", "maxExperts": 20},
    "hybrid S=1 rho=0.50 N=20": {"kind": "hybrid", "S": 1, "rho": 0.5, "maxExperts": 20},
}


class Engine:
    """A child that runs `steps.py`."""

    def __init__(self, model: Path, similarity: Path | None, dtype: str) -> None:
        command = [sys.executable, "-m", "benchmarks.steps", str(model), str(similarity or "-"), dtype]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready = self._read()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.child.stdin is not None
        print(json.dumps(request), file=self.child.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            raise SystemExit("the engine ended; what it said is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.child.stdin is not None
        self.child.stdin.close()
        self.child.wait(60)


def decode(model: Path, similarity: Path, concurrencies: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """TPOT per concurrency and arm, and where a step's time goes at concurrency 16."""
    dtype = ROWS_MOE.widened_dtype
    engines = {False: Engine(model, None, dtype), True: Engine(model, similarity, dtype)}
    asked = [item.prompt for item in ROWS_MOE.tasks.items("eval", 2000, 3)]

    def turn(arm: str, waves: list[list[str]], **more: Any) -> dict[str, Any]:
        kind = ARMS[arm]
        bucket = kind and {"minTokens": 1, "maxTokens": len(waves[0]), **kind}
        return engines[bucket is not None].ask({"bucket": bucket, "waves": waves, "tokens": STEPS + 1, **more})

    found = []
    order = random.Random(1)
    for concurrency in concurrencies:
        taken: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
        for number in range(-1, rounds):
            picked = order.sample(asked, concurrency * WAVES[concurrency])
            waves = [picked[start : start + concurrency] for start in range(0, len(picked), concurrency)]
            for arm in order.sample(list(ARMS), len(ARMS)):
                answer = turn(arm, waves)
                if number >= 0:  # the first round warms up
                    taken[arm].append(answer)
        found += [_arm(concurrency, arm, taken) for arm in ARMS]
        print(json.dumps(found[-len(ARMS) :], indent=1), file=sys.stderr)
    wave = [order.sample(asked, 16)]
    parts = []
    for arm in ARMS:
        runs = [turn(arm, wave, parts=True) for _ in range(6)][1:]
        best = min(runs, key=lambda answer: answer["tpotMs"][0])
        parts.append({"arm": arm, "stepMs": best["tpotMs"][0], **{k: v / STEPS for k, v in best["parts"].items()}})
    for engine in engines.values():
        engine.close()
    return {"rounds": rounds, "steps": STEPS, "arms": found, "parts": parts, "partsConcurrency": 16}


def _arm(concurrency: int, arm: str, taken: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    def means(name: str) -> list[float]:
        return [sum(answer["tpotMs"]) / len(answer["tpotMs"]) for answer in taken[name]]

    mine = means(arm)
    ratio = ratio_interval(means("stock"), mine)
    row = {
        "concurrency": concurrency, "arm": arm, "tpotMs": sum(mine) / len(mine), "ratio": ratio.value,
        "ratioLow": ratio.low, "ratioHigh": ratio.high,
    }  # fmt: skip
    counters = [answer["counters"] for answer in taken[arm] if answer["counters"]]
    if counters:
        total = {key: sum(counter[key] for counter in counters) for key in counters[0]}
        row |= {
            "activeBefore": total["activeBefore"] / total["calls"],
            "active": total["activeAfter"] / total["calls"],
            "slots": (total["slots"] - total["merged"]) / total["tokens"],
        }
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--concurrency", type=int, nargs="+", default=list(CONCURRENCY), choices=CONCURRENCY)
    parser.add_argument("--factor", type=int, default=ROWS_MOE.widening, help="of the widening")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run; the others stay as they were"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench-ext")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() and set(args.only) != set(PARTS) else {}
    for part in args.only:
        began = time.monotonic()
        if part == "ops":
            from benchmarks import operators

            found: dict[str, Any] = {"rows": operators.measure()}
        elif part == "widened":
            model, similarity = widened(ROWS_MOE, args.folder.resolve(), args.factor)
            found = {**shape(ROWS_MOE, args.factor), **decode(model, similarity, tuple(args.concurrency), args.rounds)}
        else:
            from benchmarks import calibration

            found = calibration.measure()
        result[part] = {"machine": machine(), "seconds": time.monotonic() - began, **found}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(args.out)


if __name__ == "__main__":
    main()
