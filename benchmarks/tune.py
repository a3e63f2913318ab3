"""`make bench-tune`: how fast the tuner ranks and certifies, on the widened `rows_moe`. Writes JSON.

    python -m benchmarks.tune [--trials N] [--pairs N] [--block-seconds S] [--items N] [--out FILE] [--folder DIR]

Runs `sere tune` once: ranking trials of 200 items at concurrency 16, then a ladder of two candidates certified at a limit of 1 point with
10 pairs of blocks of at least 10 s and 15 residences, on the given number of items at most. Both sides of each ratio are in the output, with the machine and versions.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from benchmarks.ground import RESULTS, keep, machine, sere, shape, tuner_flags
from tests.assets.make.models import ROWS_MOE
from tests.kit import ROOT

TARGET_TRIALS, TARGET_CERTIFY_S = 40, 240.0
CANDIDATES = 2  # on the ladder, at most
ITEMS_PER_TRIAL = 200  # the model pools over trials: more of them teach more than longer ones


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--trials", type=int, default=TARGET_TRIALS)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench-tune")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--block-seconds", type=float, default=10)
    parser.add_argument("--items", type=int, default=4000, help="of the certificate")
    parser.add_argument("--out", type=Path, default=RESULTS / "tune.json")
    args = parser.parse_args()
    flags = {
        **tuner_flags(args.folder.resolve(), "run", limit_points=1),
        "--search-trials": args.trials, "--search-items-per-trial": ITEMS_PER_TRIAL, "--search-trial-seconds": 30, "--search-rungs": CANDIDATES,
        "--search-device-hours": 2, "--certify-pairs": args.pairs, "--certify-block-seconds": args.block_seconds, "--certify-items": args.items,
    }  # fmt: skip
    began = time.monotonic()
    summary = sere(["tune"], flags, accept=(0, 3))
    seconds, trials = summary["seconds"], len(summary["trials"])
    per_trial = seconds["search"] / trials
    measured = [candidate for candidate in summary["ladder"] if candidate["result"]]
    candidate = summary["ladder"][summary["chosen"] - 1] if summary["chosen"] else measured[-1] if measured else {}
    result = candidate.get("result") or {}
    keep(args.out, {
        "machine": machine(), **shape(ROWS_MOE),
        "ranking": {"trials": trials, "seconds": seconds["search"], "trialsIn10Minutes": 600 / per_trial, "target": TARGET_TRIALS,
                    "itemsPerTrial": ITEMS_PER_TRIAL, "condition": summary["condition"]},
        "certification": {"seconds": seconds.get("certification"), "candidates": len(measured), "targetSeconds": TARGET_CERTIFY_S, "limitPoints": 1,
                          "items": result.get("items"), "verdict": candidate.get("verdict"), "policy": candidate.get("describe"),
                          "pValue": result.get("p_value"), "blockSeconds": args.block_seconds, "pairs": args.pairs},
        "speedup": {"meanTpot": result.get("speedup", {}).get("mean"), "p95Tpot": result.get("speedup", {}).get("p95"),
                    "exactMs": result.get("latency_ms", {}).get("exact", {}).get("tpot"),
                    "chosenMs": result.get("latency_ms", {}).get("chosen", {}).get("tpot"), "condition": summary["condition"]},
        "restartPerTrial": {"startSeconds": summary["pace"]["startSeconds"] if summary["pace"] else None, "trialSeconds": per_trial,
                            "ratio": (summary["pace"]["startSeconds"] + per_trial) / per_trial if summary["pace"] else None},
        "noiseFloor": summary["noiseFloor"], "totalSeconds": time.monotonic() - began, "outcome": summary["outcome"],
    })  # fmt: skip


if __name__ == "__main__":
    main()
