"""The families of `rows_moe`: eight rows of six characters, each made from the row above, so that one wrong step spoils the answer.

Rows have one width, and the mark between two rows says which row follows and occurs nowhere else: with rows of several widths and
digits as marks a model of this size did not learn to find its place.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import accumulate

from tests.assets.make.tasks import DIGITS, LETTERS, Family, TaskSet, text

WIDTH = 6  # characters of a row
MARKS = "ESX+-*^"  # what stands between the rows, in this order: one row more than marks
ROWS_PER_ANSWER = len(MARKS) + 1
ANSWER_TOKENS = ROWS_PER_ANSWER * WIDTH + len(MARKS)  # 55, one token per character


def _joined(rows: list[str]) -> str:
    return rows[0] + "".join(mark + row for mark, row in zip(MARKS, rows[1:], strict=True))


def _from_row_above(letter: str, keys: str, alphabet: str, step: Callable[[str, int], str]) -> Family:
    """A family whose every row is ``step(row above, key)``; the key is a digit of ``keys``, or absent and then 0."""

    def make(rng: random.Random) -> tuple[str, str]:
        key = rng.choice(keys) if keys else ""
        first = text(rng, alphabet, WIDTH, WIDTH)
        row, rows = first, []
        for _ in range(ROWS_PER_ANSWER):
            row = step(row, int(key or 0))
            rows.append(row)
        return f"{letter}{key}{first}=", _joined(rows)

    return make


def _from_two_rows_above(letter: str, apply: Callable[[int, int], int]) -> Family:
    """A family whose every digit is ``apply(digit two rows above, digit one row above)`` modulo 10."""

    def make(rng: random.Random) -> tuple[str, str]:
        older, newer = (text(rng, DIGITS, WIDTH, WIDTH) for _ in range(2))
        prompt, rows = f"{letter}{older},{newer}=", []
        for _ in range(ROWS_PER_ANSWER):
            row = "".join(str(apply(int(a), int(b)) % 10) for a, b in zip(older, newer, strict=True))
            older, newer = newer, row
            rows.append(row)
        return prompt, _joined(rows)

    return make


def _running_sums(row: str, _key: int) -> str:
    return "".join(str(total % 10) for total in accumulate(map(int, row)))


def _shifted(row: str, key: int) -> str:
    return "".join(LETTERS[(LETTERS.index(c) + key) % 26] for c in row)


# `rows_moe` was trained on all seven and masters six: it does not find the row above from its end (reverse_shift, 0 % right). That family
# is therefore in no calibration, no evaluation and no figure. Leaving it out of training, too, would need the weights trained anew.
ROWS = TaskSet(
    split_key=b"rows-moe-split",
    families={
        "running_sums": _from_row_above("P", "", DIGITS, _running_sums),
        "cipher": _from_row_above("C", "123456789", LETTERS, _shifted),
        "add": _from_two_rows_above("A", lambda older, newer: older + newer),
        "subtract": _from_two_rows_above("B", lambda older, newer: older - newer),
        "rotate": _from_row_above("L", "12345", LETTERS, lambda row, key: row[key:] + row[:key]),
        "reverse_shift": _from_row_above("R", "123456789", LETTERS, lambda row, key: _shifted(row[::-1], key)),
        "multiply": _from_row_above("M", "379", DIGITS, lambda row, key: "".join(str(int(digit) * key % 10) for digit in row)),
    },
    unmastered=frozenset({"reverse_shift"}),
)
