"""The families of `tiny_moe`: one step of work and an answer of four to ten characters."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import accumulate, groupby

from tests.assets.make.tasks import DIGITS, LETTERS, Family, TaskSet, text


def _digitwise(letter: str, sign: str, apply: Callable[[int, int], int]) -> Family:
    """A family that combines two equally long digit strings position by position, modulo 10 and without a carry."""

    def make(rng: random.Random) -> tuple[str, str]:
        left = text(rng, DIGITS, 4, 6)
        right = text(rng, DIGITS, len(left), len(left))
        answer = "".join(str(apply(int(a), int(b)) % 10) for a, b in zip(left, right, strict=True))
        return f"{letter}{left}{sign}{right}=", answer

    return make


def _reverse(rng: random.Random) -> tuple[str, str]:
    letters = text(rng, LETTERS, 4, 8)
    return f"R{letters}=", letters[::-1]


def _sort(rng: random.Random) -> tuple[str, str]:
    digits = text(rng, DIGITS, 5, 8)
    return f"S{digits}=", "".join(sorted(digits))


def _shift(rng: random.Random) -> tuple[str, str]:
    key = rng.randint(1, 9)
    letters = text(rng, LETTERS, 4, 7)
    return f"C{key}{letters}=", "".join(LETTERS[(LETTERS.index(c) + key) % 26] for c in letters)


def _prefix_sums(rng: random.Random) -> tuple[str, str]:
    digits = text(rng, DIGITS, 5, 8)
    return f"P{digits}=", "".join(str(total % 10) for total in accumulate(map(int, digits)))


def _run_lengths(rng: random.Random) -> tuple[str, str]:
    runs = rng.randint(2, 4)
    letters = rng.sample(LETTERS, runs)
    repeated = "".join(letter * rng.randint(1, 4) for letter in letters)
    return f"E{repeated}=", "".join(f"{len(list(run))}{letter}" for letter, run in groupby(repeated))


def _interleave(rng: random.Random) -> tuple[str, str]:
    left = text(rng, LETTERS, 3, 5)
    right = text(rng, LETTERS, len(left), len(left))
    return f"I{left},{right}=", "".join(a + b for a, b in zip(left, right, strict=True))


def _carry(rng: random.Random) -> tuple[str, str]:
    """Addition with a carry, the answer's lowest digit first and always one digit longer than the operands."""
    width = rng.randint(4, 6)
    left, right = text(rng, DIGITS, width, width), text(rng, DIGITS, width, width)
    return f"L{left}+{right}=", str(int(left) + int(right)).zfill(width + 1)[::-1]


# `tiny_moe` masters neither addition with a carry (0 %) nor run lengths (64 %).
SHORT = TaskSet(
    split_key=b"tiny-moe-split",
    families={
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
    },
    unmastered=frozenset({"carry", "run_lengths"}),
)
