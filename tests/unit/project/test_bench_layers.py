"""Which layer keeps the larger S: the benchmark's own arithmetic, on answers made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import layers
from sere_autotune.tuning.space import Choice
from sere_ext.contract.policy import Kind

ITEMS = 200
# Items that are lost, by the layers that keep one expert more. Layer 2 alone loses least on the even items, then layer 1.
LOST: dict[tuple[int, ...], tuple[int, ...]] = {
    (): (0, 1, 2, 3, 4, 5, 6, 8), (0,): (0, 1, 2, 3, 4, 5, 6), (1,): (0, 1, 2, 3, 4), (2,): (0, 2, 3), (0, 1): (0, 1, 3), (1, 2): (0,),
    (0, 1, 2): (),
}  # fmt: skip


def answers(*wrong: int) -> list[bool]:
    return [number not in wrong for number in range(ITEMS)]


def decode(_: Choice, larger: tuple[int, ...]) -> tuple[list[bool], dict[str, Any]]:
    return answers(*LOST[larger]), {"active": 10.0 + len(larger), "slots": 8.0}


def test_layers_are_ordered_on_the_even_items_alone() -> None:
    """Layer 1 looks best there, and is worse than layer 0 on the odd ones; equally good layers stay in the model's order."""
    assert layers.ordered([answers(0, 2, 4), answers(1, 3, 5, 7), answers(0, 2, 5)]) == [1, 2, 0]


def test_a_family_compares_the_best_layers_with_the_first_ones_on_the_odd_items() -> None:
    found = layers.family(Choice(Kind.OEA, 1), answers(), decode, 3)
    assert found["order"] == [2, 1, 0]
    one, two = found["against"]
    assert (one["first"]["larger"], one["chosen"]["larger"]) == ([0], [2])
    assert one["gained"]["points"] == pytest.approx(2.0)  # of 100 odd items the first layer loses 1, 3 and 5, and layer 2 loses 3
    assert (two["first"]["larger"], two["chosen"]["larger"]) == ([0, 1], [1, 2])
    assert two["gained"]["points"] == pytest.approx(2.0) and two["gained"]["low"] > -2
    assert [row["lost"]["points"] for row in found["each"]] == [3.5, 2.5, 1.5]
    assert found["none"]["lost"]["points"] == 4.0 and found["all"]["lost"]["points"] == 0.0
    assert found["all"]["active"] == 13.0
