"""`make bench-speedup`: what a policy with layer groups gains on the real engine at concurrency 16, certified. Prints JSON.

    python -m benchmarks.speedup [--policy FILE] [--pairs N] [--items N]

Runs `sere certify` on the small widened model: exact and the policy alternate in paired blocks on one engine, so both sides of
the ratio, the accuracy of both and the active experts come from one run. The default policy drops slots rather than re-routing
them: on a CPU a slot costs arithmetic as well as weight traffic. Its first layer keeps three experts, since that layer loses
most accuracy when it keeps two.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.ground import machine, sere, tuner_flags
from tests.kit import ROOT

BUCKET = {"minTokens": 8, "maxTokens": 128, "kind": "topk"}
POLICY = {
    "buckets": [{**BUCKET, "S": 3}],
    "layerGroups": [{"firstLayer": 1, "lastLayer": 3, "buckets": [{**BUCKET, "S": 2}]}],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--policy", type=Path, help="a policy as JSON; else the one of this file")
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--items", type=int, default=4000)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench-tune")
    args = parser.parse_args()
    folder = args.folder.resolve()
    flags = {
        **tuner_flags(folder, "speedup", limit_points=1),
        "--search-device-hours": 1,
        "--certify-pairs": args.pairs,
        "--certify-block-seconds": 10,
        "--certify-items": args.items,
    }
    policy = args.policy or folder / "policy.json"
    if not args.policy:
        policy.write_text(json.dumps(POLICY))
    sere(["certify", policy], flags)
    profile = folder / "speedup" / "profile.json"
    evidence = json.loads(profile.read_text())["spec"]["evidence"]
    print(json.dumps({"machine": machine(), "policy": json.loads(policy.read_text()), "evidence": evidence}, indent=2))


if __name__ == "__main__":
    main()
