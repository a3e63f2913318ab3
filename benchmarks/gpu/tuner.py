"""Stage 4: `sere tune` end to end on the GPU's engine, with a latency limit between exact routing and the best policy.

    python3 -m benchmarks.gpu.tuner [--tiny] [--factor 1024] [--trials 14] [--out FILE]

The model is the small trained one, widened so that expert weights rule a step; it keeps its accuracy. A first, short run under a
limit that binds nobody finds what exact routing and the best policy that keeps the accuracy take; the second has the geometric mean
of the two as its limit, so exact routing breaks it and the tuner must find a policy that does not. Needs vLLM, Ray and Optuna.
Each run is told how long it may take and keeps what its certificate needs; after `--time-limit` seconds one that is still running is
stopped, and the table is made of what there is (`"timedOut": true` in the JSON).
`--tiny` runs all of it on a CPU, in minutes; its figures say nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import RESULTS, Check, Report, at_least, at_most
from tests.kit import ROOT

TUNE = (sys.executable, "-m", "sere_ext.cli.main", "tune", "--json")
TIME_LIMIT_S = 480.0  # a machine that is lent for ten minutes at a time
TINY_LIMIT_S = 400.0  # with --tiny, of which half must pay for an engine's start on busy cores
STOP_S = 60.0  # for an engine to end, and the table
LEAST_S = 30.0  # a shorter run would not even start its engine
PROBE_SHARE = 0.5  # of the time, at most
TIMED_OUT, SPENT = "TimedOut", "BudgetExhausted"
HEAD = ("trial", "policy", "TPOT p95 ms", "points lost", "feasible")
CONCURRENCY, ITEMS_PER_TRIAL, PROBE_TRIALS, UNBOUND_MS = 16, 300, 8, 10_000.0
ON_GPU = ("--dtype", "bfloat16", "--max-num-seqs", "32", "--max-num-batched-tokens", "1024")
ON_CPU = ("--dtype", "float32", "--max-num-seqs", "32", "--enforce-eager")


def flags(
    folder: Path, model: Path, similarity: Path, name: str, limit_ms: float, trials: int, pairs: int, gpu: bool, wall_s: float
) -> list[str]:
    """Arguments of one `sere tune` that is to end by itself within `wall_s` seconds."""
    block_s = 10 if pairs > 2 else 2
    found = {
        "--model": model, "--similarity": similarity, "--out": folder / name, "--engine-max-model-len": 128,
        "--engine-extra-args": json.dumps(ON_GPU if gpu else ON_CPU), "--workload-load-concurrency": f"[{CONCURRENCY}]",
        "--slo-tpot-ms-p95": f"{limit_ms:.4f}", "--accuracy-tasks": f"[{{file: '{folder / 'items.jsonl'}', maxTokens: 24}}]",
        "--accuracy-max-drop-points": 1, "--search-trials": trials, "--search-items-per-trial": ITEMS_PER_TRIAL,
        "--search-trial-seconds": 30, "--search-rungs": 1, "--search-device-hours": 0.25, "--certify-pairs": pairs,
        "--certify-block-seconds": block_s, "--search-wall-minutes": f"{wall_s / 60:.4f}",
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


def tune(folder: Path, name: str, arguments: list[str], report: Report, until_s: float) -> dict[str, Any]:
    """One run; its summary, or what its study holds where the time ended first.

    Args:
        until_s: when it is stopped, on the report's clock.

    Raises:
        SystemExit: it failed.
    """
    from sere_autotune.study.study import forget

    forget(folder / name)  # here, so that what is found after the time has ended is this run's
    shutil.rmtree(folder / "state", ignore_errors=True)  # a benchmark's items are not evidence for anybody
    env = os.environ | {"XDG_STATE_HOME": str(folder / "state")}
    report.say("sere tune " + " ".join(arguments))
    with subprocess.Popen([*TUNE, *arguments], stdout=subprocess.PIPE, text=True, env=env) as process:
        try:
            said, _ = process.communicate(timeout=max(until_s - report.seconds(), 0))
        except subprocess.TimeoutExpired:
            process.terminate()  # it stops its engine and leaves its study whole
            try:
                process.communicate(timeout=STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
            return out_of_time(folder / name, report)
    if not said.strip():
        raise SystemExit(f"sere tune ended with {process.returncode} and no summary; what it said is above")
    found: dict[str, Any] = json.loads(said)
    report.say(f"{found['outcome']}: {found['message']}")
    return found


def out_of_time(out: Path | None, report: Report) -> dict[str, Any]:
    """In place of a summary: the complete trials of the study in a folder; None where no run was begun."""
    from sere_autotune.result.results import tried
    from sere_autotune.study.study import TuningStudy

    trials = []
    if out is not None:
        study = TuningStudy(out, None)
        trials = tried(study)
        study.close()
    message = f"the time ended after {report.seconds():.0f} s, with {len(trials)} trials of this run"
    report.say(message)
    return {"outcome": TIMED_OUT, "message": message, "trials": trials, "ladder": []}


def rows(trials: list[dict[str, Any]]) -> list[list[str]]:
    return [
        [
            str(trial["number"]),
            trial["policy"],
            f"{p95(trial):.3f}",
            f"{trial['dropPoints']:+.2f}",
            "yes" if trial["feasible"] else "",
        ]
        for trial in trials
    ]


def checks(summary: dict[str, Any] | None, exact: float | None, limit: float | None) -> list[Check]:
    rung = next(iter(summary["ladder"]), None) if summary else None
    result = (rung or {}).get("result") or {}
    chosen = result.get("latency_ms", {}).get("chosen", {}).get("tpot", {}).get("p95")
    ratio = result.get("speedup", {}).get("p95", {}).get("value")
    outcome = summary["outcome"] if summary else ""
    certified = None if outcome in ("", TIMED_OUT, SPENT) else outcome == "Chosen"
    return [
        at_least("exact routing breaks the limit: its TPOT p95 over the limit", exact and limit and exact / limit, 1, "x"),
        at_most(f"the chosen policy keeps it ({limit or 0:.3f} ms)", chosen, limit or 0, " ms"),
        at_least("speed-up of p95 TPOT in the certification's paired blocks", ratio, 1, "x"),
        Check("certified", outcome, certified),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--factor", type=int, default=1024, help="of the widening")
    parser.add_argument("--trials", type=int, default=14)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT_S, help="seconds after which it stops with what there is")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench-gpu" / "tuner")
    parser.add_argument("--out", type=Path, default=RESULTS / "tuner.json")
    parser.add_argument("--tiny", action="store_true", help="few trials on a model that is hardly widened, for a CPU")
    args = parser.parse_args()
    if args.tiny:
        args.factor, args.trials, args.pairs, args.time_limit = 4, 3, 2, TINY_LIMIT_S
    report = Report("tuner", args.out)
    import torch

    from benchmarks.ground import make_items, widened
    from tests.assets.make.models import TINY

    gpu, folder = torch.cuda.is_available(), args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    model, similarity = widened(TINY, folder, args.factor)
    if not (folder / "items.jsonl").exists():
        make_items(TINY, folder / "items.jsonl", "eval", 10_000, seed=7)
    report.keep(factor=args.factor, trained=True, concurrency=CONCURRENCY)
    given, until_s = (folder, model, similarity), args.time_limit

    def one(name: str, limit_ms: float, trials: int, pairs: int, share: float) -> dict[str, Any]:
        wall_s = share * (until_s - report.seconds())
        if wall_s < LEAST_S:
            return out_of_time(None, report)
        return tune(folder, name, flags(*given, name, limit_ms, trials, pairs, gpu, wall_s), report, until_s)

    probe = one("probe", UNBOUND_MS, min(PROBE_TRIALS, args.trials), 2, PROBE_SHARE)
    report.keep(
        probe={key: probe[key] for key in ("outcome", "message", "trials")}, timedOut=probe["outcome"] in (TIMED_OUT, SPENT)
    )
    try:
        exact, best, limit = between(probe)
    except ValueError as error:
        report.say(str(error))
        report.keep(problem=str(error))
        return report.finish(HEAD, rows(probe["trials"]), checks(None, None, None))
    report.keep(exactMs=exact, bestMs=best, limitMs=limit)
    summary = one("run", limit, args.trials, args.pairs, 0.95)
    report.keep(
        summary={
            k: summary[k]
            for k in ("outcome", "message", "trials", "ladder", "noiseFloor", "searchEnded", "seconds", "spent")
            if k in summary
        },
        timedOut=summary["outcome"] in (TIMED_OUT, SPENT),
    )
    report.finish(HEAD, rows(summary["trials"] or probe["trials"]), checks(summary, exact, limit))


if __name__ == "__main__":
    main()
