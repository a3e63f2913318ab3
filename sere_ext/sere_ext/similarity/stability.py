"""How many of the decisions that re-routing takes from a similarity matrix differ between two versions of it. Pure.

Values may move a little without any effect; what counts is which expert stands in for which. Two questions are asked:
each expert's most similar one of all, and its most similar one among the active (primary) experts of a random batch.
"""

from __future__ import annotations

import numpy as np

from sere_ext.contract.similarity import Changes
from sere_ext.similarity.packing import Matrix
from sere_ext.similarity.summary import nearest as closest

_SETS = 64  # random primary sets per layer
_ACTIVE_SHARE = 0.25  # of the experts in each
_SEED = 0


def changes(before: dict[int, Matrix], after: dict[int, Matrix]) -> Changes:
    """How many assignments differ between two versions of the matrices, as shares in [0, 1] over all layers.

    Args:
        before, after: [E, E] matrices by model layer number.
    """
    nearest = {layer: float((closest(before[layer]) != closest(after[layer])).mean()) for layer in before}
    stand_in = [_stand_ins_changed(before[layer], after[layer]) for layer in before]
    worst = max(nearest, key=lambda layer: nearest[layer])
    return Changes(
        nearest=round(float(np.mean(list(nearest.values()))), 6),
        stand_in=round(float(np.mean(stand_in)), 6),
        worst_layer=worst,
        worst_nearest=round(nearest[worst], 6),
    )


def describe(found: Changes) -> str:
    """The shares in words: `2.1 % of nearest experts and 3.0 % of stand-ins (most in layer 6: 6.2 %)`."""
    return (
        f"{100 * found.nearest:.1f} % of nearest experts and {100 * found.stand_in:.1f} % of stand-ins "
        f"(most in layer {found.worst_layer}: {100 * found.worst_nearest:.1f} % of nearest)"
    )


def _stand_ins_changed(before: Matrix, after: Matrix) -> float:
    experts = before.shape[0]
    draw = np.random.default_rng(_SEED)
    differ = total = 0
    for _ in range(_SETS):
        active = np.zeros(experts, bool)
        active[draw.choice(experts, max(1, round(experts * _ACTIVE_SHARE)), replace=False)] = True
        allowed = np.broadcast_to(active, (experts, experts))
        differ += int((closest(before, allowed) != closest(after, allowed))[~active].sum())
        total += int((~active).sum())
    return differ / total if total else 0.0
