"""Which policies a certificate is tried for: the ladder, from safe to fast, picked from the model of the search. Pure.

Facts page "statistics", section Selection: at most three candidates, frozen before the held-out items are opened.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sere_autotune.search.posterior import MonotoneModel, best_table
from sere_autotune.trial import stats
from sere_autotune.tuning.space import Table

# For a ladder of one, two or three candidates: the share of the accuracy limit that each may be predicted to cost.
FRACTIONS = {1: (0.25,), 2: (0.05, 0.25), 3: (0.05, 0.25, 0.5)}
MIN_SPEEDUP = 1.02  # below this a policy is not worth a certificate
# If the first candidate fails, the run ends with nothing. So only those choices compete for its place whose chance to certify and to gain
# anything at all, over the posterior, is at least this share of the best choice's chance. Multiplying worth by that chance is not
# enough: one lucky block outweighs it. Simulated (8 trials of 160 items, block times +-30 %): 98 % of runs end with a policy, not 92 %.
_FIRST_CAUTION = 0.98


@dataclass(frozen=True)
class Pick:
    """A table of choices, one for each bucket, with its predictions."""

    table: Table
    drop: float
    discordance: float
    speedup: float


def pick_ladder(
    model: MonotoneModel,
    max_drop: float,
    candidates: int,
    noise: float,
    allowed: NDArray[np.bool_],
    *,
    items: int,
    alpha: float = 0.05,
) -> list[tuple[float, Pick]]:
    """The table of most worth for each share of the budget, safe to fast; a pick that is not faster than the one before is left out.

    Worth is the log speed-up times the chance to certify it, both over the posterior: after few trials a fast choice that
    nobody has measured well has a low mean drop and still a poor chance, and a failed certificate gains nothing. The first pick
    is more cautious, see `_FIRST_CAUTION`.

    Args:
        candidates: how many the ladder may have, 1 to 3.
        noise: discordant share of exact routing against itself.
        allowed: [buckets, choices], False where a latency limit is predicted or was seen to break.
        items: held-out items that the certificate will have.
        alpha: its level.
    """
    powers = [stats.rough_power(items, noise + model.excess(b), model.drop(b), max_drop, alpha) for b in range(model.buckets)]

    def mean(of: Callable[[int], NDArray[np.float64]]) -> NDArray[np.float64]:
        return np.stack([of(b).mean(axis=0) for b in range(model.buckets)])

    speeds, drops, excess, chances = mean(model.log_speed), mean(model.drop), mean(model.excess), mean(powers.__getitem__)
    sure = mean(lambda b: powers[b] * (model.log_speed(b) > np.log(MIN_SPEEDUP)))
    found: list[tuple[float, Pick]] = []
    for fraction in FRACTIONS[candidates]:
        usable = allowed
        if not found:
            best_chance = np.max(sure, where=allowed & (drops <= fraction * max_drop), initial=0.0)
            usable = allowed & (sure >= _FIRST_CAUTION * best_chance)
        picks = best_table(speeds * chances, drops, fraction * max_drop, usable)
        pick = Pick(
            tuple(model.choices[i] for i in picks),
            drop=float(np.mean([drops[b, i] for b, i in enumerate(picks)])),
            discordance=noise + float(np.mean([excess[b, i] for b, i in enumerate(picks)])),
            speedup=float(np.exp(np.mean([speeds[b, i] for b, i in enumerate(picks)]))),
        )
        best = found[-1][1].speedup if found else MIN_SPEEDUP
        if pick.speedup > best:
            found.append((fraction, pick))
    return found
