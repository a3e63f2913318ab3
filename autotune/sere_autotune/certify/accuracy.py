"""Answers of a candidate's blocks, paired by item: losses, gains, what left the pairs, and drops by load and by task. Pure.

A loss is an item that exact routing answers right and the candidate wrong, a gain the reverse.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy import stats as sps

from sere_autotune.study.schema import MeasuredBlock, Part
from sere_autotune.trial import stats

_Name = TypeVar("_Name", bound=Hashable)
# A design effect up to this is what independent answers show by chance over ten blocks; above it the evidence is cut by it.
_NOTABLE_DESIGN_EFFECT = 1.5
_HARM_ALPHA = 0.05  # chance of a false alarm over everything that is tested for harm together


@dataclass(frozen=True)
class PairedItem:
    """One item's answers under both routings."""

    item: str
    block: tuple[int, int]  # (pair, level)
    exact: bool
    chosen: bool
    differ: bool

    @property
    def loss(self) -> int:
        """1 for a loss, -1 for a gain, 0 where both routings agree."""
        return int(self.exact) - int(self.chosen)


@dataclass(frozen=True)
class Paired:
    """All items of a candidate's blocks, each once."""

    items: list[PairedItem]
    exact_failed: int  # items that the candidate answered and exact routing did not
    chosen_failed: int  # items that exact routing answered and the candidate did not
    both_failed: int

    @property
    def left_out(self) -> int:
        return self.exact_failed + self.chosen_failed + self.both_failed

    @property
    def losses(self) -> int:
        return sum(item.loss > 0 for item in self.items)

    @property
    def gains(self) -> int:
        return sum(item.loss < 0 for item in self.items)


def paired(blocks: Sequence[MeasuredBlock]) -> Paired:
    """Pair the answers by item, in the order of the blocks. A repeated item is no new evidence: its first answer counts.

    An item whose request failed under one routing leaves the pairs: a failed answer of exact routing would otherwise count
    as a gain of the candidate.
    """
    answers: dict[str, dict[str, tuple[tuple[int, int], str, str]]] = {"exact": {}, "chosen": {}}
    for block in sorted(blocks, key=lambda b: (b.pair, b.level)):
        mine = answers[block.routing]
        for item, right, said in zip(block.items, block.right, block.said, strict=True):
            mine.setdefault(item, ((block.pair, block.level), right, said))
    found: list[PairedItem] = []
    failed = {"exact": 0, "chosen": 0, "both": 0}
    for item, (where, right, said) in answers["chosen"].items():
        if item not in answers["exact"]:
            continue
        _, reference, words = answers["exact"][item]
        if "x" in (right, reference):
            failed["both" if right == reference else "chosen" if right == "x" else "exact"] += 1
            continue
        found.append(PairedItem(item, where, reference == "1", right == "1", words != said))
    return Paired(found, failed["exact"], failed["chosen"], failed["both"])


def design_effect(items: Sequence[PairedItem]) -> float:
    """How many times the variance of losses less gains, over the blocks of a load level, exceeds that of independent items.

    Drops that differ between load levels are no correlation, so each level's mean is taken out first. At least 1, and at most
    the number of losses and gains: were they all one event, they would count as one. A single loss shows no correlation,
    however small the block it fell into.
    """
    discordant = sum(item.loss != 0 for item in items)
    if not discordant:
        return 1.0
    levels: dict[int, list[int]] = {}
    blocks: dict[tuple[int, int], list[int]] = {}
    for item in items:
        levels.setdefault(item.block[1], []).append(item.loss)
        blocks.setdefault(item.block, []).append(item.loss)
    means = {level: float(np.mean(losses)) for level, losses in levels.items()}
    found = stats.design_effect([np.array(losses) - means[block[1]] for block, losses in blocks.items()])
    return min(found, float(discordant))


def noninferiority(pairs: Paired, max_drop: float) -> tuple[float, float, Callable[[float], float]]:
    """The test that decides accuracy.

    Answers of one block may be correlated (a fault of the engine in one of ten blocks, say). Where blocks scatter notably
    more than independent items would, all counts are divided by the design effect.

    Args:
        max_drop: largest drop that may be lost, a share.

    Returns:
        p-value of "the true drop is `max_drop` or more"; the design effect; and the upper bound of the drop as a function
        of the confidence.
    """
    n, effect = len(pairs.items), design_effect(pairs.items)
    by = effect if effect > _NOTABLE_DESIGN_EFFECT else 1.0
    losses, gains = pairs.losses / by, pairs.gains / by

    def upper(confidence: float) -> float:
        return stats.drop_upper_bound(losses, gains, n / by, confidence) if n else 1.0

    return stats.noninferiority_p(losses, gains, n / by, max_drop), effect, upper


def harm_p(losses: int, gains: int, n: int, limit: float) -> float:
    """p-value of H0 "the true drop is `limit` or less"; a small value shows harm.

    Upper tail of the score test, with the exact binomial tail of that many losses as its floor: on few items the normal
    approximation alone takes a single loss for harm. Without more losses than gains nothing speaks for harm: 1.0.
    """
    if n <= 0 or losses <= gains:
        return 1.0
    score = 1.0 - stats.score_cdf(losses, gains, n, limit)
    return float(max(score, sps.binom.sf(losses - gains - 1, n, limit)))


def harmed(tested: Mapping[_Name, float]) -> set[_Name]:
    """Of p-values of "no harm", those that show harm with a chance of a false alarm of 5 % over all of them (Holm)."""
    found: set[_Name] = set()
    for rank, name in enumerate(sorted(tested, key=lambda name: tested[name])):
        # The smallest is tested against alpha / m, the next against alpha / (m - 1), and so on.
        if tested[name] > _HARM_ALPHA / (len(tested) - rank):
            break
        found.add(name)
    return found


def parts(pairs: Paired, max_drop: float, loads: Sequence[str], tasks: Mapping[str, str]) -> list[Part]:
    """The drop at every load and in every task, tested for harm together (Holm); [] where there is one of each.

    Args:
        max_drop: the limit, a share; a drop above it in one part is harm, however small it is on average.
        loads: names of the load levels.
        tasks: item digest -> name of the task.
    """
    groups: dict[tuple[str, str], list[PairedItem]] = {}
    several = len(set(tasks.values())) > 1
    for item in pairs.items:
        if len(loads) > 1:
            groups.setdefault(("load", loads[item.block[1]]), []).append(item)
        if several and item.item in tasks:
            groups.setdefault(("task", tasks[item.item]), []).append(item)
    counts = {
        group: (len(items), sum(i.loss > 0 for i in items), sum(i.loss < 0 for i in items)) for group, items in groups.items()
    }
    tested = {group: harm_p(losses, gains, n, max_drop) for group, (n, losses, gains) in counts.items()}
    bad = harmed(tested)
    return [Part(kind, name, *counts[kind, name], tested[kind, name], (kind, name) in bad) for kind, name in counts]
