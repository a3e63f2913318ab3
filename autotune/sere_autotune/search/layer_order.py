"""Which MoE layers get the larger S first, from one short measurement of each quarter of them. Pure.

Each measurement has S in all layers and S + 1 in one quarter of them, on the same items. What is counted are the answers that differ
from exact routing's: they are several times as many as those that are wrong, so that few items tell quarters apart. Wrong answers
decide between quarters under which equally many differ.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from sere_autotune.tuning.space import S_STEPS
from sere_autotune.words import percent

_NEARLY_ALL = 0.9  # share of differing answers beyond which quarters cannot be told apart
_ERRORS = 2.0  # standard errors between the best and the worst quarter that chance is taken to bring about


@dataclass(frozen=True)
class Seen:
    """What one quarter's measurement showed: how many items were compared with exact routing, and how many went otherwise."""

    items: int
    differ: int  # answers that differ from exact routing's
    wrong: int  # answers that are wrong where exact routing's are right

    @property
    def share(self) -> float:
        """Share of the answers that differ."""
        return self.differ / max(self.items, 1)


def quarters(layers: int) -> list[range]:
    """The positions of so many MoE layers in S_STEPS groups of neighbours, each as large as what one step of S adds."""
    edges = [round(step * layers / S_STEPS) for step in range(S_STEPS + 1)]
    return [range(first, end) for first, end in itertools.pairwise(edges)]


def first_of(quarter: Sequence[int], layers: int) -> tuple[int, ...]:
    """The order of so many layers in which those of one quarter come first."""
    return (*quarter, *(position for position in range(layers) if position not in quarter))


def tells_nothing(seen: Sequence[Seen]) -> bool:
    """Whether nearly every answer differs, whichever quarter has the larger S."""
    return all(one.share > _NEARLY_ALL for one in seen)


def order_of(seen: Sequence[Seen], layers: int) -> tuple[int, ...]:
    """The positions of all MoE layers, those first that should get the larger S first.

    Args:
        seen: of each of the `quarters`.

    Returns:
        the quarters by how few answers differed under them; () where chance explains the difference between best and worst.
    """
    ranked = _ranked(seen)
    best, worst = seen[ranked[0]], seen[ranked[-1]]
    if not all(one.items for one in seen):
        return ()
    pooled = (best.differ + worst.differ) / (best.items + worst.items)
    error = math.sqrt(pooled * (1 - pooled) * (1 / best.items + 1 / worst.items))
    if worst.share - best.share <= _ERRORS * error:
        return ()
    parts = quarters(layers)
    return tuple(position for quarter in ranked for position in parts[quarter])


def describe(seen: Sequence[Seen], numbers: Sequence[int]) -> str:
    """What `order_of` found, in one sentence.

    Args:
        numbers: model layer numbers of the MoE layers.
    """
    ranked = _ranked(seen)
    best, worst = seen[ranked[0]], seen[ranked[-1]]
    if not order_of(seen, len(numbers)):
        return (
            "the larger S goes first to the first layers: it makes no difference beyond chance where it is "
            f"({_percent(best)} to {_percent(worst)} of {best.items} answers differ from exact routing's)"
        )
    where = [_named([numbers[position] for position in quarter]) for quarter in quarters(len(numbers))]
    return (
        f"the larger S goes first to {where[ranked[0]]}: {_percent(best)} of {best.items} answers differ from exact routing's "
        f"with it there, {_percent(worst)} with it in {where[ranked[-1]]}"
    )


def _ranked(seen: Sequence[Seen]) -> list[int]:
    """Numbers of the quarters, best first."""
    return sorted(range(len(seen)), key=lambda i: (seen[i].share, seen[i].wrong / max(seen[i].items, 1), i))


def _named(numbers: Sequence[int]) -> str:
    return f"layers {numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else f"layer {numbers[0]}"


def _percent(seen: Seen) -> str:
    return percent(round(seen.share, 2))
