"""`make bench-speedup`: what one policy gains on the real engine at concurrency 16, certified. Writes JSON.

    python -m benchmarks.speedup [--policy FILE] [--pairs N] [--items N] [--block-seconds S] [--limit-points P] [--out FILE]

Runs `sere certify` on the widened `rows_moe`: exact and the policy alternate in paired blocks on one engine, so both sides of
the ratio, the accuracy of both and the active experts come from one run. The default policy is of the kind that docs/policies.md found to
lose the least for the experts that it touches.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.ground import RESULTS, keep, machine, sere, shape, tuner_flags
from tests.assets.make.models import ROWS_MOE
from tests.kit import ROOT

POLICY = {"buckets": [{"minTokens": 8, "maxTokens": 128, "kind": "oea", "S": 2}]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--policy", type=Path, help="a policy as JSON; else the one of this file")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--items", type=int, default=4000)
    parser.add_argument("--block-seconds", type=float, default=10)
    parser.add_argument("--limit-points", type=float, default=1, help="of accuracy")
    parser.add_argument("--out", type=Path, default=RESULTS / "speedup.json")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench-tune")
    args = parser.parse_args()
    folder = args.folder.resolve()
    flags = {
        **tuner_flags(folder, "speedup", limit_points=args.limit_points),
        "--search-device-hours": 1,
        "--certify-pairs": args.pairs,
        "--certify-block-seconds": args.block_seconds,
        "--certify-items": args.items,
    }
    policy = args.policy or folder / "policy.json"
    if not args.policy:
        policy.write_text(json.dumps(POLICY))
    sere(["certify", policy], flags)
    profile = folder / "speedup" / "profile.json"
    evidence = json.loads(profile.read_text())["spec"]["evidence"]
    keep(args.out, {"machine": machine(), **shape(ROWS_MOE), "policy": json.loads(policy.read_text()), "evidence": evidence})


if __name__ == "__main__":
    main()
