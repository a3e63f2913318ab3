"""The two small models: what each one is asked, its shape, and how it is trained. Nothing else here knows them apart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.assets.make.row_tasks import ROWS
from tests.assets.make.short_tasks import SHORT
from tests.assets.make.tasks import TaskSet

ASSETS = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Recipe:
    """One model.

    Attributes:
        tasks: the questions and their answers.
        experts, top_k, expert_width: the Mixture-of-Experts layers; all else of the architecture is the same for both.
        longest_item: characters of the longest prompt and answer together.
        longest_answer: tokens after which an answer is cut off: the longest right one and some room.
        steps: optimiser steps.
        batch: items per step.
        pool: batches that are sorted by length together, which saves padding where lengths differ; 1 sorts nothing.
        noisy_share: share of the steps, the last ones, whose router's logits carry noise.
        widening: how many times `widen.py` repeats an expert's neurons.
        widened_dtype: of the widened form's weights, and what its engine is told by --dtype.
    """

    name: str
    tasks: TaskSet
    experts: int
    top_k: int
    expert_width: int
    longest_item: int
    longest_answer: int
    steps: int
    batch: int
    pool: int
    noisy_share: float
    widening: int
    widened_dtype: str

    @property
    def directory(self) -> Path:
        """Where the committed weights are."""
        return ASSETS / self.name

    @property
    def engine_arguments(self) -> tuple[str, ...]:
        """Arguments of `vllm serve` for the widened form on a CPU, with a KV cache of 8 MB instead of a GiB.

        A block of the CPU's cache holds 128 tokens, which one sequence never fills: 64 blocks are enough for 32 sequences.
        """
        return ("--dtype", self.widened_dtype, "--enforce-eager", "--max-num-seqs", "32", "--num-gpu-blocks-override", "64")


TINY = Recipe(
    name="tiny_moe",
    tasks=SHORT,
    experts=16,
    top_k=4,
    expert_width=64,
    longest_item=23,
    longest_answer=16,
    steps=900,
    batch=192,
    pool=4,
    noisy_share=0.0,
    widening=64,
    widened_dtype="float32",
)

ROWS_MOE = Recipe(
    name="rows_moe",
    tasks=ROWS,
    experts=64,
    top_k=8,
    expert_width=16,
    longest_item=70,
    longest_answer=72,
    steps=1350,
    batch=64,
    pool=1,
    noisy_share=1 / 3,
    widening=192,
    widened_dtype="bfloat16",
)

RECIPES = {recipe.name: recipe for recipe in (TINY, ROWS_MOE)}


def of(directory: Path) -> Recipe:
    """The recipe of an HF directory: that of its name, or else of the number of its experts (a retrained or widened form)."""
    if directory.name in RECIPES:
        return RECIPES[directory.name]
    import json

    config = json.loads((directory / "config.json").read_text())
    experts = config.get("num_experts") or config["num_local_experts"]
    return next(recipe for recipe in RECIPES.values() if recipe.experts == experts)
