"""What part of a decode step the experts take at 16 requests, and what memory an engine needs. Prints JSON.

    python -m benchmarks.share [--factor F ...] [--rounds N]

For each widening of the small model one engine runs waves of 16 requests under exact routing, whose parts are timed in place
(`steps.py`), and the same under `oea` with S = 2. Figures are of the fastest of the rounds: other work on the machine only adds.
Beside the engine's memory stands what a program holds that has imported vLLM and does nothing: no engine needs less than that and
its weights.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.ext import STEPS, Engine
from benchmarks.ground import machine, widened
from tests.assets.make.models import ROWS_MOE
from tests.kit import ROOT

CONCURRENCY = 16
EXACT: dict[str, Any] = {"minTokens": 1, "maxTokens": CONCURRENCY, "kind": "exact"}
IMPORTS = "from vllm import LLM; print(flush=True); input()"
FEWER: dict[str, Any] = {**EXACT, "kind": "oea", "S": 2}


def memory_mb(pid: int) -> dict[str, float]:
    """Proportional set size of a process and all its descendants in MB (1e6 bytes), and what of it belongs to no file."""
    total = {"Pss": 0, "Pss_Anon": 0}
    for one in (pid, *descendants(pid)):
        for line in Path(f"/proc/{one}/smaps_rollup").read_text().splitlines():
            name, _, rest = line.partition(":")
            if name in total:
                total[name] += int(rest.split()[0])
    return {"whole": total["Pss"] * 1024 / 1e6, "anonymous": total["Pss_Anon"] * 1024 / 1e6}


def descendants(pid: int) -> list[int]:
    """Every process below `pid`."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *descendants(child)]
    return found


def imports_mb() -> dict[str, float]:
    """`memory_mb` of a program that has imported vLLM and waits."""
    child = subprocess.Popen([sys.executable, "-c", IMPORTS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        if not child.stdout.readline():
            raise SystemExit("vLLM could not be imported; the cause is above")
        return memory_mb(child.pid)
    finally:
        child.communicate("\n", 60)


def measure(factor: int, rounds: int) -> dict[str, Any]:
    """One engine of the model widened `factor` times."""
    model, similarity = widened(ROWS_MOE, ROOT / "build" / "bench-tune", factor)
    asked = [item.prompt for item in ROWS_MOE.tasks.items("eval", 400, 3)]
    wave = [random.Random(1).sample(asked, CONCURRENCY)]
    engine = Engine(model, similarity, ROWS_MOE.widened_dtype)
    try:
        runs: dict[str, list[dict[str, Any]]] = {"exact": [], "oea S=2": []}
        for number in range(-1, rounds):
            for name, bucket in (("exact", EXACT), ("oea S=2", FEWER)):
                answer = engine.ask({"bucket": bucket, "waves": wave, "tokens": STEPS + 1, "parts": True})
                if number >= 0:  # the first round warms up
                    runs[name].append(answer)
        memory = memory_mb(engine.child.pid)
    finally:
        engine.close()
    best = {name: min(answers, key=lambda answer: answer["tpotMs"][0]) for name, answers in runs.items()}

    def row(answer: dict[str, Any]) -> dict[str, Any]:
        counters, step = answer["counters"], answer["tpotMs"][0]
        experts = answer["parts"]["experts"] / STEPS
        return {
            "stepMs": step,
            "expertsMs": experts,
            "expertsShare": experts / step,
            "activeExperts": counters["activeAfter"] / counters["calls"],
        }

    return {
        "factor": factor,
        "weightsMb": (model / "model.safetensors").stat().st_size / 1e6,
        "kvCacheMb": engine.ready["kvCacheMb"],
        "engineMemoryMb": memory,
        **{name: row(answer) for name, answer in best.items()},
        "stepRatio": best["exact"]["tpotMs"][0] / best["oea S=2"]["tpotMs"][0],
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument(
        "--factor", type=int, nargs="+", default=[1, ROWS_MOE.widening], help="of the widening; 1 has next to no weights"
    )
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    imports = imports_mb()
    found = []
    for factor in args.factor:
        found.append(measure(factor, args.rounds))
        print(json.dumps(found[-1]), file=sys.stderr)  # a run that is cut off has at least this
    print(json.dumps({"machine": machine(), "concurrency": CONCURRENCY, "importsMemoryMb": imports, "models": found}, indent=2))


if __name__ == "__main__":
    main()
