"""`make soak-switches`: a thousand policy switches on a real server under load. Prints JSON; ends with 1 if anything broke.

    python benchmarks/soak_switches.py [--switches N] [--model DIR] [-- ARGUMENTS OF vllm serve]

Six clients ask without pause while policies of every kind follow each other, each read back from every rank; every 50th switch
is clean. Resident memory is taken after a tenth of the switches (everything was used once by then) and at the end, and is flat
if it grew by less than 16 kB a switch. At the end the engine must answer under exact routing as it did at the start.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tune import ROOT, machine

sys.path.insert(0, str(ROOT / "tests" / "kit"))
from sere_ext.calibrate import calibrate
from sere_ext.client import get_state, put_policy
from sere_ext.policy import EXACT_POLICY, Policy
from serving import Load, complete, serving

TOKEN = "soak"
CLEAN_EVERY = 50
FLAT_KIB_PER_SWITCH = 16.0


def policies(similarity_digest: str) -> list[Policy]:
    """One of each kind and one with layer groups; exact routing between them."""
    bucket = {"minTokens": 2, "maxTokens": 64}
    tables: list[dict[str, Any]] = [
        {"buckets": [{**bucket, "kind": "topk", "S": 2}]},
        {"buckets": [{**bucket, "kind": "sere", "S": 1, "rho": 0.1}], "similarityDigest": similarity_digest},
        {"buckets": [{**bucket, "kind": "oea", "S": 2}]},
        {
            "buckets": [{**bucket, "kind": "topk", "S": 3}],
            "layerGroups": [{"firstLayer": 1, "lastLayer": 2, "buckets": [{**bucket, "kind": "topk", "S": 1}]}],
        },
    ]
    return [policy for table in tables for policy in (Policy.parse(table), EXACT_POLICY)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--switches", type=int, default=1000)
    parser.add_argument("--model", type=Path, default=ROOT / "tests" / "assets" / "tiny_moe")
    parser.add_argument("serve", nargs="*", help="arguments of `vllm serve`, e.g. --tensor-parallel-size 2")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = soak(args.model.resolve(), Path(folder), args.switches, args.serve)
    print(json.dumps(result, indent=2))
    raise SystemExit(0 if result["ok"] else 1)


def soak(model: Path, folder: Path, switches: int, arguments: list[str]) -> dict[str, Any]:
    data, similarity = folder / "calibration.jsonl", folder / "similarity.safetensors"
    data.write_text("".join(json.dumps({"prompt": f"{i}+{i % 7}=", "answer": str(i + i % 7)}) + "\n" for i in range(32)))
    turns = policies(calibrate(str(model), data, similarity).digest)
    wrong: list[str] = []
    ms: dict[str, list[float]] = {"plain": [], "clean": []}
    digests: Counter[str] = Counter()
    with serving(model, folder / "serve.log", *arguments, SERE_CONTROL_TOKEN=TOKEN) as server:
        answers = [complete(server.url, model, f"prompt {n}") for n in range(4)]
        state = get_state(server.url)
        first, ranks = state["generation"], len(state["ranks"])
        began, before = time.monotonic(), {}
        with Load(server.url, model) as load:
            for turn in range(1, switches + 1):
                wanted, clean = turns[turn % len(turns)], turn % CLEAN_EVERY == 0
                at = time.perf_counter()
                state = put_policy(server.url, wanted, similarity=str(similarity), clean=clean, token=TOKEN)
                ms["clean" if clean else "plain"].append((time.perf_counter() - at) * 1e3)
                seen = {(rank["policyDigest"], rank["generation"]) for rank in state["ranks"]}
                if seen != {(wanted.digest, first + turn)} or len(state["ranks"]) != ranks:
                    wrong.append(f"switch {turn} to {wanted.digest}: {state['ranks']}")
                digests[wanted.digest] += 1
                if turn == max(switches // 10, 1):
                    before = server.resident_mib()
            after = server.resident_mib()
        seconds = time.monotonic() - began
        put_policy(server.url, EXACT_POLICY, clean=True, token=TOKEN)
        same = [complete(server.url, model, f"prompt {n}") for n in range(4)] == answers
    grown = (sum(after.values()) - sum(before.values())) * 1024 / (switches - max(switches // 10, 1))
    return {
        "ok": not wrong and not load.failures and same and grown < FLAT_KIB_PER_SWITCH,
        "machine": machine(), "model": model.name, "serve": arguments, "ranks": ranks, "seconds": round(seconds, 1),
        "switches": switches, "driftedSwitches": wrong[:5], "requests": load.done, "requestErrors": load.failures[:5],
        "answersAsBefore": same, "digests": digests,
        "switchMs": {
            kind: {"median": round(statistics.median(times), 1), "max": round(max(times), 1), "count": len(times)}
            for kind, times in ms.items() if times
        },
        "residentMib": {"before": before, "after": after, "kibPerSwitch": round(grown, 2)},
    }  # fmt: skip


if __name__ == "__main__":
    main()
