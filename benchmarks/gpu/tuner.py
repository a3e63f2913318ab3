"""Stage 4: `sere tune` end to end on the GPU's engine, with a latency limit between exact routing and the best policy.

    python benchmarks/gpu/tuner.py [--factor 1024] [--trials 14] [--out FILE]

The model is the small trained one, widened so that expert weights rule a step; it keeps its accuracy. A first, short run under a
limit that binds nobody finds what exact routing and the best policy that keeps the accuracy take; the second has the geometric mean
of the two as its limit, so exact routing breaks it and the tuner must find a policy that does not. Needs vLLM, Ray and Optuna.
Try it on a CPU with `--factor 64 --trials 4 --pairs 2`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from report import RESULTS, ROOT, Check, Report, at_least, at_most, engine_env

CONCURRENCY, ITEMS_PER_TRIAL, PROBE_TRIALS, UNBOUND_MS = 16, 300, 8, 10_000.0
ON_GPU = ("--dtype", "bfloat16", "--max-num-seqs", "32", "--max-num-batched-tokens", "1024")
ON_CPU = ("--dtype", "float32", "--max-num-seqs", "32", "--enforce-eager")


def flags(
    folder: Path, model: Path, similarity: Path, name: str, limit_ms: float, trials: int, pairs: int, gpu: bool
) -> list[str]:
    """Arguments of one `sere tune`."""
    block_s = 10 if pairs > 2 else 2
    found = {
        "--model": model, "--similarity": similarity, "--out": folder / name, "--engine-max-model-len": 128,
        "--engine-extra-args": json.dumps(ON_GPU if gpu else ON_CPU), "--workload-load-concurrency": f"[{CONCURRENCY}]",
        "--slo-tpot-ms-p95": f"{limit_ms:.4f}", "--accuracy-tasks": f"[{{file: '{folder / 'items.jsonl'}', maxTokens: 24}}]",
        "--accuracy-max-drop-points": 1, "--search-trials": trials, "--search-items-per-trial": ITEMS_PER_TRIAL,
        "--search-trial-seconds": 30, "--search-rungs": 1, "--search-device-hours": 0.25, "--certify-pairs": pairs,
        "--certify-block-seconds": block_s,
    }  # fmt: skip
    return [part for flag, value in found.items() for part in (flag, str(value))]


def p95(trial: dict[str, Any]) -> float:
    """TPOT in ms at the one load level; NaN where the trial did not get that far (`tpotMs` is the mean that the search ranks by)."""
    return float(trial["levels"][0]["latency_ms"]["tpot"]["p95"]) if trial["levels"] else math.nan


def between(summary: dict[str, Any]) -> tuple[float, float, float]:
    """TPOT p95 in ms under exact routing and under the best feasible policy of a run, and the limit between them.

    Raises:
        ValueError: no policy was faster than exact routing, so there is no limit between them.
    """
    exact = next((p95(trial) for trial in summary["trials"] if trial["policy"] == "exact"), None)
    if exact is None:
        raise ValueError("the budget ended before exact routing had been measured")
    best = min((p95(trial) for trial in summary["trials"] if trial["feasible"]), default=exact)
    if best >= exact:
        raise ValueError(f"no policy kept the accuracy and was faster than exact routing ({exact:.3f} ms)")
    return exact, best, math.sqrt(exact * best)


def tune(folder: Path, arguments: list[str], report: Report) -> dict[str, Any]:
    """One run; its summary."""
    (folder / "sere-ledger.json").unlink(missing_ok=True)  # a benchmark's items are not evidence for anybody
    machine = report.result["machine"]
    env = engine_env("gpu" in machine, machine.get("vllm", "0.32")) | os.environ
    command = [sys.executable, "-m", "sere_ext.cli", "tune", "--fresh", "--json", *arguments]
    report.say("sere tune " + " ".join(arguments))
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=env)
    if not done.stdout.strip():
        raise SystemExit(f"sere tune ended with {done.returncode} and no summary; what it said is above")
    found: dict[str, Any] = json.loads(done.stdout)
    report.say(f"{found['outcome']}: {found['message']}")
    return found


def checks(summary: dict[str, Any] | None, exact: float | None, limit: float | None) -> list[Check]:
    rung = next(iter(summary["ladder"]), None) if summary else None
    result = (rung or {}).get("result") or {}
    chosen = result.get("latency_ms", {}).get("chosen", {}).get("tpot", {}).get("p95")
    ratio = result.get("speedup", {}).get("p95", {}).get("value")
    return [
        at_least("exact routing breaks the limit: its TPOT p95 over the limit", exact and limit and exact / limit, 1, "x"),
        at_most(f"the chosen policy keeps it ({limit or 0:.3f} ms)", chosen, limit or 0, " ms"),
        at_least("speed-up of p95 TPOT in the certification's paired blocks", ratio, 1, "x"),
        Check("certified", summary["outcome"] if summary else "", summary and summary["outcome"] == "Chosen"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--factor", type=int, default=1024, help="of the widening")
    parser.add_argument("--trials", type=int, default=14)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench-gpu" / "tuner")
    parser.add_argument("--out", type=Path, default=RESULTS / "tuner.json")
    args = parser.parse_args()
    report = Report("tuner", args.out)
    import torch
    from ext import widened
    from tune import make_items

    gpu, folder = torch.cuda.is_available(), args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    model, similarity = widened(folder, args.factor)
    if not (folder / "items.jsonl").exists():
        make_items(folder / "items.jsonl", "eval", 10_000, seed=7)
    report.keep(factor=args.factor, trained=True, concurrency=CONCURRENCY)
    given = (folder, model, similarity)
    probe = tune(folder, flags(*given, "probe", UNBOUND_MS, min(PROBE_TRIALS, args.trials), 2, gpu), report)
    report.keep(probe={key: probe[key] for key in ("outcome", "message", "trials")})
    try:
        exact, best, limit = between(probe)
    except ValueError as error:
        report.say(str(error))
        return report.finish(["outcome"], [[str(error)]], checks(None, None, None))
    report.keep(exactMs=exact, bestMs=best, limitMs=limit)
    summary = tune(folder, flags(*given, "run", limit, args.trials, args.pairs, gpu), report)
    report.keep(
        summary={key: summary[key] for key in ("outcome", "message", "trials", "ladder", "noiseFloor", "seconds", "spent")}
    )
    rows = [
        [
            str(trial["number"]), trial["policy"], f"{p95(trial):.3f}",
            f"{trial['dropPoints']:+.2f}", "yes" if trial["feasible"] else "",
        ]
        for trial in summary["trials"]
    ]  # fmt: skip
    report.finish(["trial", "policy", "TPOT p95 ms", "points lost", "feasible"], rows, checks(summary, exact, limit))


if __name__ == "__main__":
    main()
