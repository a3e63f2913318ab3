"""`make bench-speedup`: what a policy with layer groups gains on the real engine at concurrency 16, certified. Prints JSON.

    python benchmarks/speedup.py [--policy FILE] [--pairs N] [--items N]

Runs `sere certify` on the small widened model: exact and the policy alternate in paired blocks on one engine, so both sides of
the ratio, the accuracy of both and the active experts come from one run. The default policy drops slots rather than re-routing
them: on a CPU a slot costs arithmetic as well as weight traffic. Its first layer keeps three experts, since that layer loses
most accuracy when it keeps two.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from tune import ROOT, machine, prepare

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
    prepare(folder, None)
    policy = args.policy or folder / "policy.json"
    if not args.policy:
        policy.write_text(json.dumps(POLICY))
    flags = {
        "--model": folder / "model", "--similarity": folder / "similarity.safetensors", "--out": folder / "speedup",
        "--engine-max-model-len": 128, "--engine-extra-args": '["--dtype","float32","--enforce-eager","--max-num-seqs","16"]',
        "--workload-load-concurrency": "[16]", "--slo-tpot-ms-p95": 1000,
        "--accuracy-tasks": f"[{{file: '{folder / 'items.jsonl'}', maxTokens: 24}}]", "--accuracy-max-drop-points": 1,
        "--search-device-hours": 1, "--certify-pairs": args.pairs, "--certify-block-seconds": 10, "--certify-items": args.items,
    }  # fmt: skip
    command = [sys.executable, "-m", "sere_ext.cli.main", "certify", policy, "--fresh", "--json"]
    for flag, value in flags.items():
        command += [flag, value]
    (folder / "sere-ledger.json").unlink(missing_ok=True)  # a benchmark's items are not evidence for anybody
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, text=True, check=False)
    profile = folder / "speedup" / "profile.json"
    if done.returncode:
        raise SystemExit(done.returncode)
    evidence = json.loads(profile.read_text())["spec"]["evidence"]
    print(json.dumps({"machine": machine(), "policy": json.loads(policy.read_text()), "evidence": evidence}, indent=2))


if __name__ == "__main__":
    main()
