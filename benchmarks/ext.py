"""`make bench-ext`: what the extension costs and gains on this machine's CPU. Writes JSON.

    python benchmarks/ext.py [--rounds N] [--factor F] [--only PART ...] [--out FILE]

Four parts. `ops`: time of re-routing and of the experts, stock, re-routed, merged and packed (`operators.py`). `widened`: TPOT of
decode steps of the widened model at concurrency 1, 4, 16 and 64. `many`: the same at 16 and 64 of a model with 128 random experts,
which says nothing about accuracy but has the routing of a big model's shape. In both, stock vLLM without the plug-in runs in one
engine and the plug-in under each policy in another, both warm; they take turns on the same requests in random order, so that drift
cancels; ratios with a 95 % t interval over rounds. `calibration`: running sums against plain loops over pairs (`calibration.py`). Each
ratio has both its sides from one run.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sere_autotune.trial.stats import ratio_interval
from tune import MAKE, ROOT, machine, make_items, run

sys.path.insert(0, str(MAKE))

from tasks import items

RESULT = ROOT / "benchmarks" / "results" / "ext.json"
PARTS = ("ops", "widened", "many", "calibration")
CONCURRENCY = (1, 4, 16, 64)
WAVES = {1: 4, 4: 2, 16: 1, 64: 1}  # per turn
ANSWER = 8  # characters of every answer; with its end a wave decodes 8 steps
FACTOR = 128  # of the widening: experts take most of a decode step, as in a big model
MANY, MANY_TOP_K, MANY_WIDTH = 128, 8, 1024  # routing of the shape of a big model's: 805 MB of experts
ARMS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "off": {"kind": "exact"},
    "sere S=2": {"kind": "sere", "S": 2},
    "sere S=1": {"kind": "sere", "S": 1},
    "topk 2": {"kind": "topk", "S": 2},
    "oea k0=2": {"kind": "oea", "S": 2},
    "budget N=8": {"kind": "budget", "maxExperts": 8},
    "hybrid S=1 rho=0.30 N=8": {"kind": "hybrid", "S": 1, "rho": 0.3, "maxExperts": 8},
}


class Engine:
    """A child that runs `steps.py`."""

    def __init__(self, model: Path, similarity: Path | None) -> None:
        command = [sys.executable, str(ROOT / "benchmarks" / "steps.py"), str(model), str(similarity or "-")]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.child.stdin is not None
        print(json.dumps(request), file=self.child.stdin, flush=True)
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            raise SystemExit("the engine ended; what it said is above")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self.child.stdin is not None
        self.child.stdin.close()
        self.child.wait(60)


def decode(model: Path, similarity: Path, concurrencies: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """TPOT per concurrency and arm, and where a step's time goes at concurrency 16."""
    engines = {False: Engine(model, None), True: Engine(model, similarity)}
    asked = [item.prompt for item in items("eval", 20_000, 3) if len(item.answer) == ANSWER]

    def turn(arm: str, waves: list[list[str]], **more: Any) -> dict[str, Any]:
        bucket = ARMS[arm] and {"minTokens": 1, "maxTokens": len(waves[0]), **ARMS[arm]}
        return engines[bucket is not None].ask({"bucket": bucket, "waves": waves, "tokens": ANSWER + 1, **more})

    found = []
    order = random.Random(1)
    for concurrency in concurrencies:
        taken: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
        for number in range(-1, rounds):
            picked = order.sample(asked, concurrency * WAVES[concurrency])
            waves = [picked[start : start + concurrency] for start in range(0, len(picked), concurrency)]
            for arm in order.sample(list(ARMS), len(ARMS)):
                answer = turn(arm, waves)
                if number >= 0:  # the first round warms up
                    taken[arm].append(answer)
        found += [_arm(concurrency, arm, taken) for arm in ARMS]
        print(json.dumps(found[-len(ARMS) :], indent=1), file=sys.stderr)
    wave = [order.sample(asked, 16)]
    parts = []
    for arm in ARMS:
        runs = [turn(arm, wave, parts=True) for _ in range(6)][1:]
        best = min(runs, key=lambda answer: answer["tpotMs"][0])
        parts.append({"arm": arm, "stepMs": best["tpotMs"][0], **{k: v / ANSWER for k, v in best["parts"].items()}})
    for engine in engines.values():
        engine.close()
    return {"rounds": rounds, "steps": ANSWER, "arms": found, "parts": parts, "partsConcurrency": 16}


def _arm(concurrency: int, arm: str, taken: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    def means(name: str) -> list[float]:
        return [sum(answer["tpotMs"]) / len(answer["tpotMs"]) for answer in taken[name]]

    mine = means(arm)
    ratio = ratio_interval(means("stock"), mine)
    row = {
        "concurrency": concurrency, "arm": arm, "tpotMs": sum(mine) / len(mine), "ratio": ratio.value,
        "ratioLow": ratio.low, "ratioHigh": ratio.high,
    }  # fmt: skip
    counters = [answer["counters"] for answer in taken[arm] if answer["counters"]]
    if counters:
        total = {key: sum(counter[key] for counter in counters) for key in counters[0]}
        row |= {
            "activeBefore": total["activeBefore"] / total["calls"], "active": total["activeAfter"] / total["calls"],
            "slots": (total["slots"] - total["merged"]) / total["tokens"],
        }  # fmt: skip
    return row


def widened(folder: Path, factor: int) -> tuple[Path, Path]:
    """The widened model and its similarity; made once per factor."""
    from sere_ext.contract.similarity import model_config_digest
    from sere_ext.similarity.file import model_config_dict, read_similarity, write_similarity

    small, model, similarity = (
        ROOT / "tests" / "assets" / "tiny_moe",
        folder / f"model-{factor}",
        folder / f"wide-{factor}.safetensors",
    )
    if similarity.exists():
        return model, similarity
    folder.mkdir(parents=True, exist_ok=True)
    calibration, narrow = folder / "calib.jsonl", folder / "narrow.safetensors"
    run(sys.executable, MAKE / "widen.py", small, model, "--factor", str(factor))
    make_items(calibration, "calibration", 600, seed=0)
    run(sys.executable, "-m", "sere_ext.cli.main", "calibrate", small, "--data", calibration, "--out", narrow)
    # Widened experts compute what the small ones do, so that similarities hold as they are.
    found = read_similarity(narrow)
    meta = found.meta.model_copy(update={"config_digest": model_config_digest(model_config_dict(str(model)))})
    write_similarity(similarity, meta, found.matrices)
    return model, similarity


def many(folder: Path) -> tuple[Path, Path]:
    """The small model with MANY random experts in place of its own, and random similarities; made once. It answers nothing."""
    import torch
    from safetensors.torch import load_file, save_file
    from sere_ext.contract.similarity import SimilarityMeta, model_config_digest
    from sere_ext.similarity.file import write_similarity

    source, model, similarity = (
        ROOT / "tests" / "assets" / "tiny_moe",
        folder / "model-many",
        folder / "similarity-many.safetensors",
    )
    if similarity.exists():
        return model, similarity
    model.mkdir(parents=True, exist_ok=True)
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, model / name)
    config = json.loads((source / "config.json").read_text())
    config |= {
        "num_experts": MANY,
        "num_local_experts": MANY,
        "num_experts_per_tok": MANY_TOP_K,
        "moe_intermediate_size": MANY_WIDTH,
    }
    (model / "config.json").write_text(json.dumps(config))
    dice, hidden = torch.Generator().manual_seed(1), config["hidden_size"]
    weights = {name: weight for name, weight in load_file(source / "model.safetensors").items() if ".mlp." not in name}
    matrices = {}
    for layer in range(config["num_hidden_layers"]):
        mlp = f"model.layers.{layer}.mlp."
        weights[mlp + "gate.weight"] = 0.2 * torch.randn(MANY, hidden, generator=dice)
        for expert in range(MANY):
            for name, shape, scale in (
                ("gate_proj", (MANY_WIDTH, hidden), 0.05),
                ("up_proj", (MANY_WIDTH, hidden), 0.05),
                ("down_proj", (hidden, MANY_WIDTH), 0.001),  # little, so that what a token is still decides its experts
            ):
                weights[f"{mlp}experts.{expert}.{name}.weight"] = scale * torch.randn(shape, generator=dice)
        alike = torch.rand(MANY, MANY, generator=dice)
        matrices[layer] = ((alike + alike.T) / 2).fill_diagonal_(1).numpy()
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    meta = SimilarityMeta(
        model_type=config["model_type"], model_name=str(model), config_digest=model_config_digest(config), data_digest="",
        tokens=0, layers=tuple(matrices), num_experts=MANY,
    )  # fmt: skip
    write_similarity(similarity, meta, matrices)
    return model, similarity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--factor", type=int, default=FACTOR)
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run; the others stay as they were"
    )
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench-ext")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    result: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() and set(args.only) != set(PARTS) else {}
    for part in args.only:
        began = time.monotonic()
        if part == "ops":
            import operators

            found: dict[str, Any] = {"rows": operators.measure()}
        elif part == "widened":
            found = {"factor": args.factor, **decode(*widened(args.folder.resolve(), args.factor), CONCURRENCY, args.rounds)}
        elif part == "many":
            found = {"experts": MANY, "topK": MANY_TOP_K, **decode(*many(args.folder.resolve()), CONCURRENCY[2:], args.rounds)}
        else:
            import calibration

            found = calibration.measure()
        result[part] = {"machine": machine(), "seconds": time.monotonic() - began, **found}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(args.out)


if __name__ == "__main__":
    main()
