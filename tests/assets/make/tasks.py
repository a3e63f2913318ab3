"""The task families that the small model is trained and judged on, made from a seed.

An item is a short prompt (a family letter, operands, ``=``) and an answer of several characters. Splits are disjoint by
construction: a prompt belongs to the split that its hash says, whatever seed asked for it, so no evaluation item can have
been seen in training or used for calibration. The hash has its own key, so that a later split of the evaluation items by
digest (search against certification) is independent of this one.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import accumulate, groupby
from typing import Literal

Split = Literal["train", "eval", "calibration"]

DIGITS = "0123456789"
LETTERS = "abcdefghijklmnopqrstuvwxyz"

# Hash buckets (of 100) that each split owns.
BUCKETS: dict[str, range] = {"train": range(0, 60), "eval": range(60, 95), "calibration": range(95, 100)}


@dataclass(frozen=True, slots=True)
class Item:
    """One question: ``prompt`` is sent as is, ``answer`` is the whole expected completion, ``task`` names the family."""

    prompt: str
    answer: str
    task: str

    def as_dict(self) -> dict[str, str]:
        """The JSONL form of the item."""
        return asdict(self)


def split_of(prompt: str) -> Split:
    """The one split that may contain this prompt."""
    bucket = int.from_bytes(hashlib.blake2b(prompt.encode(), key=b"tiny-moe-split", digest_size=8).digest(), "big") % 100
    return next(name for name, owned in BUCKETS.items() if bucket in owned)  # type: ignore[return-value]


def _text(rng: random.Random, alphabet: str, low: int, high: int) -> str:
    return "".join(rng.choices(alphabet, k=rng.randint(low, high)))


def _digitwise(letter: str, sign: str, apply: Callable[[int, int], int]) -> Callable[[random.Random], tuple[str, str]]:
    """A family that combines two equally long digit strings position by position, modulo 10 and without a carry."""

    def make(rng: random.Random) -> tuple[str, str]:
        left = _text(rng, DIGITS, 4, 6)
        right = _text(rng, DIGITS, len(left), len(left))
        answer = "".join(str(apply(int(a), int(b)) % 10) for a, b in zip(left, right, strict=True))
        return f"{letter}{left}{sign}{right}=", answer

    return make


def _reverse(rng: random.Random) -> tuple[str, str]:
    text = _text(rng, LETTERS, 4, 8)
    return f"R{text}=", text[::-1]


def _sort(rng: random.Random) -> tuple[str, str]:
    text = _text(rng, DIGITS, 5, 8)
    return f"S{text}=", "".join(sorted(text))


def _shift(rng: random.Random) -> tuple[str, str]:
    key = rng.randint(1, 9)
    text = _text(rng, LETTERS, 4, 7)
    return f"C{key}{text}=", "".join(LETTERS[(LETTERS.index(c) + key) % 26] for c in text)


def _prefix_sums(rng: random.Random) -> tuple[str, str]:
    text = _text(rng, DIGITS, 5, 8)
    return f"P{text}=", "".join(str(total % 10) for total in accumulate(map(int, text)))


def _run_lengths(rng: random.Random) -> tuple[str, str]:
    runs = rng.randint(2, 4)
    letters = rng.sample(LETTERS, runs)
    text = "".join(letter * rng.randint(1, 4) for letter in letters)
    return f"E{text}=", "".join(f"{len(list(run))}{letter}" for letter, run in groupby(text))


def _interleave(rng: random.Random) -> tuple[str, str]:
    left = _text(rng, LETTERS, 3, 5)
    right = _text(rng, LETTERS, len(left), len(left))
    return f"I{left},{right}=", "".join(a + b for a, b in zip(left, right, strict=True))


def _carry(rng: random.Random) -> tuple[str, str]:
    """Addition with a carry, the answer's lowest digit first and always one digit longer than the operands."""
    width = rng.randint(4, 6)
    left, right = _text(rng, DIGITS, width, width), _text(rng, DIGITS, width, width)
    return f"L{left}+{right}=", str(int(left) + int(right)).zfill(width + 1)[::-1]


FAMILIES: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "reverse": _reverse,
    "sort": _sort,
    "shift": _shift,
    "add": _digitwise("A", "+", lambda a, b: a + b),
    "subtract": _digitwise("B", "-", lambda a, b: a - b),
    "multiply": _digitwise("M", "*", lambda a, b: a * b),
    "maximum": _digitwise("X", "^", max),
    "prefix_sums": _prefix_sums,
    "run_lengths": _run_lengths,
    "interleave": _interleave,
    "carry": _carry,
}

# Trained on, but not mastered by a model of this size (carry 0 %, run lengths 64 %): an answer that is a guess flips with any
# rounding, so these two would measure luck, not routing. Evaluation and calibration leave them out.
UNMASTERED = frozenset({"carry", "run_lengths"})

# Every character that a prompt or an answer can hold, in a fixed order: the tokenizer's vocabulary follows it.
ALPHABET = DIGITS + LETTERS + "RSCPEILABMX" + "+-*^,="


def stream(split: Split, seed: int) -> Iterator[Item]:
    """Items of the split without end, families drawn evenly; prompts may come twice."""
    rng = random.Random(f"{split}:{seed}")  # a text seed hashes the same in every process
    names = [name for name in FAMILIES if split == "train" or name not in UNMASTERED]
    while True:
        task = rng.choice(names)
        prompt, answer = FAMILIES[task](rng)
        if split_of(prompt) == split:
            yield Item(prompt, answer, task)


def items(split: Split, count: int, seed: int) -> list[Item]:
    """The first ``count`` distinct items of ``stream(split, seed)``; a shorter list is a prefix of a longer one."""
    found: dict[str, Item] = {}
    for item in stream(split, seed):
        if len(found) == count:
            break
        found.setdefault(item.prompt, item)
    return list(found.values())
