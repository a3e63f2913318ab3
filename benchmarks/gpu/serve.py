"""Stage 2: vLLM with random weights at a published model's dimensions; decode steps by live switching in one engine.

    python -m benchmarks.gpu.serve [--shape qwen3-30b] [--batch N ...] [--minutes 9] [--stock] [--out FILE]

Each batch is filled once per kind of routing, and the policy changes under it: arms follow each other in random order, `--rounds`
times, `--steps` timed decode steps each, so that drift and growing context fall on all alike. Beside each cell stands the bound:
everything a step must read, with the active experts that were counted, at the bandwidth that a copy reached. T = a + b * (active
experts) is fitted through the exact cells alone, and its speed-up for an arm's active experts is what the arm is held against.
`--stock` runs the same without the plug-in: what switched-off re-routing costs. `--tiny` runs all of it on a CPU.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu import bound
from benchmarks.gpu.engine import DISCARDED, STOCK, Engine, Segment
from benchmarks.gpu.report import RESULTS, Check, Report, at_least, at_most
from benchmarks.gpu.routing import ROUTINGS
from benchmarks.gpu.shapes import SHAPES, Shape
from tests.kit import ROOT

BATCHES = tuple(2**n for n in range(9))
ARMS: dict[str, dict[str, Any]] = {
    "exact": {"kind": "exact"},
    "sere S=1": {"kind": "sere", "S": 1},
    "sere S=2": {"kind": "sere", "S": 2},
    "sere S=4": {"kind": "sere", "S": 4},
    "topk 2": {"kind": "topk", "S": 2},
    "oea k0=2": {"kind": "oea", "S": 2},
}
PROMPT, MOST_ROUNDS_TOKENS = 16, 1024  # tokens of a prompt, and of the longest sequence
FIT_BATCHES = 64  # above it arithmetic counts as well, and a straight line through the weights' traffic no longer holds
TARGETS = {"sere S=1": 2.0, "sere S=2": 1.6}
TARGET_BATCH, TARGET_SHARE, TARGET_SWITCH_MS, NO_LOSS = 16, 0.85, 20.0, 0.99
SAME_BATCH, SAME_TOKENS = 16, 16


def copied_bytes_per_s(device: str, mib: int) -> float:
    """Bandwidth of a device-to-device copy, bytes read and written, the best of ten."""
    import torch

    source = torch.zeros(mib << 20, dtype=torch.uint8, device=device)
    into, best = torch.empty_like(source), math.inf
    for _ in range(10):
        began = time.perf_counter()
        into.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    del source, into
    if device == "cuda":
        torch.cuda.empty_cache()
    return 2 * (mib << 20) / best


def random_similarity(shape: Shape, folder: Path) -> Path:
    """A similarity file of random matrices; how alike experts are does not matter at rho 0, only that each has a nearest."""
    import torch

    from sere_ext.contract.model_config import model_config_digest
    from sere_ext.contract.similarity import SimilarityMeta
    from sere_ext.similarity.file import write_similarity
    from sere_ext.similarity.hub import model_config_dict

    config = model_config_dict(str(folder / "model"))
    first = shape.layers - shape.moe_layers
    source, matrices = torch.Generator().manual_seed(3), {}
    for layer in range(first, shape.layers):
        alike = torch.rand(shape.experts, shape.experts, generator=source)
        matrices[layer] = ((alike + alike.T) / 2).fill_diagonal_(1).numpy()
    meta = SimilarityMeta(
        model_type=str(config["model_type"]), model_name=shape.name, config_digest=model_config_digest(config), data_digest="",
        tokens=0, layers=tuple(matrices), num_experts=shape.experts,
    )  # fmt: skip
    write_similarity(folder / "similarity.safetensors", meta, matrices)
    return folder / "similarity.safetensors"


def rounds_that_fit(asked: int, arms: int, steps: int, batch: int, room: int, positions: int) -> int:
    """So many rounds that no sequence outgrows the cache or the longest length; at least 1."""
    spare = arms * (DISCARDED + 1) + 18  # warming up, a block that is not full, steps in flight
    longest = min(room // batch, positions) - PROMPT - spare
    return max(1, min(asked, longest // (arms * (steps + DISCARDED))))


def measure(
    engine: Engine, kind: str, batch: int, arms: list[str], rounds: int, steps: int, dice: random.Random
) -> list[dict[str, Any]]:
    """All arms on one batch; one cell each."""
    wave = engine.begin(kind, batch, PROMPT, engine.positions - PROMPT)  # ended before that
    taken: dict[str, list[Segment]] = {arm: [] for arm in arms}
    try:
        for arm in arms:  # warm-up: kernels that this batch meets for the first time
            engine.segment(wave, arm, 1)
        for _ in range(rounds):
            for arm in dice.sample(arms, len(arms)):
                taken[arm].append(engine.segment(wave, arm, steps))
    finally:
        engine.end(wave)
    return [cell(engine.shape, kind, batch, arm, taken[arm], taken[arms[0]]) for arm in arms]


def cell(shape: Shape, kind: str, batch: int, arm: str, mine: list[Segment], exact: list[Segment]) -> dict[str, Any]:
    """One arm's means, and its speed-up against `exact` with a 95 % t interval over rounds where there are two or more."""
    from sere_autotune.trial.stats import ratio_interval

    times, theirs = [s.tpot_ms for s in mine], [s.tpot_ms for s in exact]
    found: dict[str, Any] = {
        "shape": shape.name, "routing": kind, "batch": batch, "arm": arm, "tpotMs": statistics.mean(times), "rounds": len(times),
        "context": statistics.mean(s.context for s in mine), "switchMs": [s.switch_ms for s in mine],
        "activeDrawn": bound.drawn_active(kind, shape.experts, shape.top_k, batch),
        "speedup": statistics.mean(theirs) / statistics.mean(times), "speedupLow": None, "speedupHigh": None,
    }  # fmt: skip
    if len(times) > 1:
        ratio = ratio_interval(theirs, times)
        found |= {"speedup": ratio.value, "speedupLow": ratio.low, "speedupHigh": ratio.high}
    if arm != STOCK:
        total = {key: sum((s.counters or {})[key] for s in mine) for key in mine[0].counters or {}}
        found |= {
            "activeBefore": total["activeBefore"] / total["calls"],
            "active": total["activeAfter"] / total["calls"],
            "slots": (total["slots"] - total["merged"]) / total["tokens"],
        }
    return found


def judged(cells: list[dict[str, Any]], shape: Shape, bytes_per_s: float) -> tuple[list[dict[str, Any]], bound.Line | None]:
    """Cells with their bound, and the share of the fitted line's speed-up that each reached; and that line."""
    exact = {(c["routing"], c["batch"]): c for c in cells if c["arm"] == "exact"}
    line = bound.fit([(c["active"], c["tpotMs"]) for c in exact.values() if c["batch"] <= FIT_BATCHES])
    found = []
    for one in cells:
        if "active" not in one:
            found.append(one)
            continue
        base = exact[one["routing"], one["batch"]]
        least = bound.bound_ms(shape, one["active"], one["batch"], one["context"], bytes_per_s)
        most = bound.bound_ms(shape, base["active"], one["batch"], one["context"], bytes_per_s) / least
        predicted = line.speedup(base["active"], one["active"]) if line else None
        reached = one["speedup"] / predicted if predicted else None
        found.append(one | {"boundMs": least, "boundSpeedup": most, "predicted": predicted, "share": reached})
    return found, line


def same_again(engine: Engine, batch: int) -> dict[str, Any]:
    """Exact, S=1, exact on the same prompts: how many log-probabilities change, and whether they all return."""
    first, other, again = (engine.answers(arm, "skewed", batch, SAME_TOKENS) for arm in ("exact", "sere S=1", "exact"))
    changed = sum(a != b for one, two in zip(first, other, strict=True) for a, b in zip(one, two, strict=True))
    return {"batch": batch, "tokens": batch * SAME_TOKENS, "changedUnderS1": changed, "returnsExactly": first == again}


def checks(cells: list[dict[str, Any]], again: dict[str, Any] | None) -> list[Check]:
    """The targets of the design, on the skewed routing where one row is asked for."""
    by = {(c["routing"], c["batch"], c["arm"]): c for c in cells}
    found = []
    for arm, least in TARGETS.items():
        for kind in ROUTINGS:
            one = by.get((kind, TARGET_BATCH, arm), {})
            target = f"{arm}, batch {TARGET_BATCH}, {kind} routing"
            found.append(at_least(f"{target}: speed-up >= {least:g}x", one.get("speedup"), least, "x"))
            found.append(at_least(f"{target}: share of the fitted >= {TARGET_SHARE:g}", one.get("share"), TARGET_SHARE))
    ours = [c for c in cells if c["arm"].startswith("sere")]
    worst = min(ours, key=lambda c: c["speedup"], default=None)
    where = f" ({worst['arm']}, batch {worst['batch']}, {worst['routing']})" if worst else ""
    found.append(at_least(f"slowest cell of sere >= {NO_LOSS:g}x{where}", worst["speedup"] if worst else None, NO_LOSS, "x"))
    switches = [ms for c in cells for ms in c["switchMs"] if ms is not None]
    found.append(at_most(f"longest live switch <= {TARGET_SWITCH_MS:g} ms", max(switches, default=None), TARGET_SWITCH_MS, " ms"))
    if again:
        found.append(at_least("log-probabilities that change under S=1", float(again["changedUnderS1"]), 1))
        found.append(at_least("all return with exact routing", float(again["returnsExactly"]), 1))
    return found


HEAD = ["routing", "batch", "arm", "active", "TPOT ms", "bound ms", "speed-up", "95 %", "bound's", "fitted", "share"]


def lines(cells: list[dict[str, Any]]) -> list[list[str]]:
    """The table's rows."""

    def number(one: dict[str, Any], key: str, digits: int) -> str:
        return "" if one.get(key) is None else f"{one[key]:.{digits}f}"

    return [
        [
            one["routing"], str(one["batch"]), one["arm"], number(one, "active", 1), number(one, "tpotMs", 3), number(one, "boundMs", 3),
            number(one, "speedup", 2), f"{one['speedupLow']:.2f}-{one['speedupHigh']:.2f}" if one.get("speedupLow") else "",
            number(one, "boundSpeedup", 2), number(one, "predicted", 2), number(one, "share", 2),
        ]
        for one in cells
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b")
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--routing", nargs="+", choices=ROUTINGS, default=list(ROUTINGS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=9, help="no batch is begun after so many minutes")
    parser.add_argument("--stock", action="store_true", help="without the plug-in: one arm")
    parser.add_argument("--eager", action="store_true", help="no compilation and no CUDA graphs")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench-gpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--tiny", action="store_true", help="a small shape, one batch, few steps, for a CPU; its times say nothing"
    )
    args = parser.parse_args()
    if args.tiny:
        args.shape, args.batch, args.rounds, args.steps, args.eager = "tiny", [8], 2, 12, True
    shape, batches = SHAPES[args.shape], tuple(sorted(args.batch))
    folder = (args.folder / args.shape).resolve()
    report = Report("serve", args.out or RESULTS / f"serve-{args.shape}{'-stock' if args.stock else ''}.json")

    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    speed = copied_bytes_per_s(device, 2048 if device == "cuda" else 256)
    report.say(f"a copy moves {speed / 1e12:.3f} TB/s")
    report.keep(shape=shape.name, randomWeights=True, copyBytesPerS=speed)
    shape.write(folder / "model", MOST_ROUNDS_TOKENS)
    similarity = None if args.stock else random_similarity(shape, folder)
    engine = Engine(shape, folder, similarity, ARMS, batches, MOST_ROUNDS_TOKENS, args.eager)
    report.say(f"engine started in {engine.started_s:.1f} s; the cache holds {engine.room()} tokens")
    report.keep(startSeconds=engine.started_s, cacheTokens=engine.room())

    again = None if args.stock else same_again(engine, min(SAME_BATCH, max(batches)))
    report.say(f"the same prompts: {again}")
    report.keep(sameAgain=again)
    arms, cells = [STOCK] if args.stock else list(ARMS), []
    dice = random.Random(1)
    # The batch of the targets first, then the others from small to large: each run is useful where the next is cut off.
    for batch in sorted(batches, key=lambda b: (b != TARGET_BATCH, b)):
        if report.seconds() > 60 * args.minutes:
            report.say(f"out of time: batch {batch} and larger were not measured")
            break
        rounds = rounds_that_fit(args.rounds, len(arms), args.steps, batch, engine.room(), MOST_ROUNDS_TOKENS)
        for kind in args.routing:
            cells += measure(engine, kind, batch, arms, rounds, args.steps, dice)
        found, line = judged(cells, shape, speed)
        report.say(
            f"batch {batch}, {rounds} rounds: " + ", ".join(f"{c['arm']} {c['tpotMs']:.2f} ms" for c in found[-len(arms) :])
        )
        report.keep(cells=found, fit=line and line.__dict__)
    found, line = judged(cells, shape, speed)
    found.sort(key=lambda c: (c["routing"], c["batch"]))
    if line:
        report.say(f"T = {line.base:.3f} ms + {line.per_expert:.5f} ms * active experts, R2 {line.r2:.4f}")
    report.keep(cells=found)
    report.finish(HEAD, lines(found), [] if args.stock else checks(found, again))


if __name__ == "__main__":
    main()
