"""Questions with one right answer, made from a seed: what a small model is trained, calibrated and judged on.

An item is a short prompt (a family's letter, operands, ``=``) and its answer. Which families there are is the model's own matter
(`short_tasks.py`, `row_tasks.py`). Splits are disjoint by construction: the hash of a prompt says which split it belongs to,
whatever seed asked for it, so no evaluation item can have been seen in training or used for calibration. The hash has a key of
its own per set of tasks, so that a later split of the evaluation items by digest (search against certification) is independent
of this one.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

Split = Literal["train", "eval", "calibration"]

# A source of random numbers in, a prompt and its answer out.
Family = Callable[[random.Random], tuple[str, str]]

DIGITS = "0123456789"
LETTERS = "abcdefghijklmnopqrstuvwxyz"

# Hash buckets (of 100) that each split owns.
BUCKETS: dict[Split, range] = {"train": range(0, 60), "eval": range(60, 95), "calibration": range(95, 100)}


@dataclass(frozen=True, slots=True)
class Item:
    """One question: ``prompt`` is sent as is, ``answer`` is the whole expected completion, ``task`` names the family."""

    prompt: str
    answer: str
    task: str

    def as_dict(self) -> dict[str, str]:
        """The JSONL form of the item."""
        return asdict(self)


def text(rng: random.Random, alphabet: str, low: int, high: int) -> str:
    """Between ``low`` and ``high`` random characters of the alphabet, both included."""
    return "".join(rng.choices(alphabet, k=rng.randint(low, high)))


@dataclass(frozen=True, slots=True)
class TaskSet:
    """The families of one model.

    Attributes:
        split_key: key of the hash that decides a prompt's split.
        families: by name.
        unmastered: families that are trained on and left out of evaluation and calibration: an answer that is a guess flips
            with any rounding, so it would measure luck, not routing.
    """

    split_key: bytes
    families: Mapping[str, Family]
    unmastered: frozenset[str] = frozenset()

    def split_of(self, prompt: str) -> Split:
        """The one split that may contain this prompt."""
        bucket = int.from_bytes(hashlib.blake2b(prompt.encode(), key=self.split_key, digest_size=8).digest(), "big") % 100
        return next(name for name, owned in BUCKETS.items() if bucket in owned)

    def stream(self, split: Split, seed: int) -> Iterator[Item]:
        """Items of the split without end, families drawn evenly; prompts may come twice."""
        rng = random.Random(f"{split}:{seed}")  # a text seed hashes the same in every process
        names = [name for name in self.families if split == "train" or name not in self.unmastered]
        while True:
            task = rng.choice(names)
            prompt, answer = self.families[task](rng)
            if self.split_of(prompt) == split:
                yield Item(prompt, answer, task)

    def items(self, split: Split, count: int, seed: int) -> list[Item]:
        """The first ``count`` distinct items of ``stream(split, seed)``; a shorter list is a prefix of a longer one."""
        found: dict[str, Item] = {}
        for item in self.stream(split, seed):
            if len(found) == count:
                break
            found.setdefault(item.prompt, item)
        return list(found.values())
