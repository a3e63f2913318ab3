"""`make soak-switches`: a thousand policy switches on a real server under load. Prints JSON; ends with 1 if anything broke.

    python -m benchmarks.soak_switches [--switches N] [--model DIR] [-- ARGUMENTS OF vllm serve]
    VLLM_CPU_OMP_THREADS_BIND="0|1" python -m benchmarks.soak_switches -- --tensor-parallel-size 2

Six clients ask without pause while policies of every kind follow each other, each read back from every rank; every 50th switch
is clean. At the end the engine must answer under exact routing as it did at the start. Serving alone makes the engine's resident
memory grow at first (the same load runs before without switches, to see by how much), so memory is flat if the last quarter of the
switches, with all its requests, adds less than 4 KiB a switch to all processes together. The KV cache is cut to a few blocks,
since each of its pages becomes resident when it is first used.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.ground import machine
from sere_ext.calibration.run import calibrate
from sere_ext.contract.policy import EXACT_POLICY, Policy
from sere_ext.control.client import get_state, put_policy
from tests.kit import ROOT
from tests.kit.serving import Load, complete, serving

TOKEN = "soak"
CLEAN_EVERY = 50
FLAT_KIB_PER_SWITCH = 4.0
WARM_UP_SWITCHES, LOAD_ONLY_SECONDS = 40, 30.0
FEW_BLOCKS = ("--num-gpu-blocks-override", "64")


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
    with serving(model, folder / "serve.log", *FEW_BLOCKS, *arguments, SERE_CONTROL_TOKEN=TOKEN) as server:
        answers = [complete(server.url, model, f"prompt {n}") for n in range(4)]
        state = get_state(server.url)
        ranks = len(state.ranks)
        with Load(server.url, model) as load:
            for turn in range(WARM_UP_SWITCHES):  # everything is used once
                put_policy(server.url, turns[turn % len(turns)], similarity=str(similarity), token=TOKEN)
            marks = [(load.done, server.resident_mib())]
            time.sleep(LOAD_ONLY_SECONDS)
            marks.append((load.done, server.resident_mib()))
            first, began = get_state(server.url).generation, time.monotonic()
            for turn in range(1, switches + 1):
                wanted, clean = turns[turn % len(turns)], turn % CLEAN_EVERY == 0
                at = time.perf_counter()
                state = put_policy(server.url, wanted, similarity=str(similarity), clean=clean, token=TOKEN)
                ms["clean" if clean else "plain"].append((time.perf_counter() - at) * 1e3)
                seen = {(rank.policy_digest, rank.generation) for rank in state.ranks}
                if seen != {(wanted.digest, first + turn)} or len(state.ranks) != ranks:
                    wrong.append(f"switch {turn} to {wanted.digest}: {state.ranks}")
                digests[wanted.digest] += 1
                if turn % max(switches // 4, 1) == 0:
                    marks.append((load.done, server.resident_mib()))
        seconds = time.monotonic() - began
        put_policy(server.url, EXACT_POLICY, clean=True, token=TOKEN)
        same = [complete(server.url, model, f"prompt {n}") for n in range(4)] == answers
    requests, memory = zip(*((done, sum(mib.values()) * 1024) for done, mib in marks), strict=True)
    per_request = (memory[1] - memory[0]) / max(requests[1] - requests[0], 1)
    added = (memory[-1] - memory[-2]) / (switches / 4)  # marks are made after each quarter of the switches
    return {
        "ok": not wrong and not load.failures and same and added < FLAT_KIB_PER_SWITCH,
        "machine": machine(), "model": model.name, "serve": arguments, "ranks": ranks, "seconds": round(seconds, 1),
        "switches": switches, "driftedSwitches": wrong[:5], "requests": load.done, "requestErrors": load.failures[:5],
        "answersAsBefore": same, "digests": digests,
        "switchMs": {
            kind: {"median": round(statistics.median(times), 1), "max": round(max(times), 1), "count": len(times)}
            for kind, times in ms.items() if times
        },
        "resident": {
            "marks": [{"requests": done, "mib": mib} for done, mib in marks],
            "kibPerRequestWithoutSwitches": round(per_request, 2), "kibAddedPerSwitchInTheLastQuarter": round(added, 2),
        },
    }  # fmt: skip


if __name__ == "__main__":
    main()
