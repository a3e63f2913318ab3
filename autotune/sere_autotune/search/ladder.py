"""Which policies a certificate is tried for: the ladder, from safe to fast, picked from the model of the search. Pure.

Certification tries the candidates in order, stops at the first that loses too much, and serves the fastest that passed. So
the worth of a ladder can be computed from the posterior, and the ladder of most worth is taken: how much of the accuracy limit
each candidate spends is no constant but follows from how sure the search is and from how many items are held out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sere_autotune.outcome import MIN_SPEEDUP
from sere_autotune.search.posterior import PolicyModel, best_table
from sere_autotune.trial import stats
from sere_autotune.tuning.space import Table

Floats = NDArray[np.float64]

# What ending without a policy costs beside the speed that is not gained, on the log scale: the trials were spent for nothing.
FAILURE_COST = 0.25
_SPENT = np.geomspace(0.02, 1.5, 24)  # shares of the limit from which tables compete for a place
_CAUTION = (0.5, 0.8, 0.95)  # quantiles of the drop that is held against such a share


@dataclass(frozen=True)
class Pick:
    """A table of choices, one for each bucket, with its predictions (posterior means)."""

    table: Table
    drop: float
    discordance: float
    speedup: float


def pick_ladder(
    model: PolicyModel,
    max_drop: float,
    candidates: int,
    noise: float,
    allowed: NDArray[np.bool_],
    *,
    items: int,
    alpha: float = 0.05,
) -> list[Pick]:
    """The ladder of most worth, safe to fast; [] where nothing gains.

    Args:
        candidates: how many the ladder may have, at least 1.
        noise: discordant share of exact routing against itself.
        allowed: [buckets, choices], False where a latency limit is predicted or was seen to break.
        items: held-out items that the certificate will have.
        alpha: its level.
    """
    drops = np.stack([model.drop(b) for b in range(model.buckets)])  # [buckets, draws, choices]
    excess = np.stack([model.excess(b) for b in range(model.buckets)])
    speeds = np.stack([model.log_speed(b) for b in range(model.buckets)])
    tables = _tables(speeds.mean(axis=1), [np.quantile(drops, q, axis=1) for q in _CAUTION], max_drop, allowed)

    def of(values: Floats) -> Floats:
        """[tables, draws]: means over buckets."""
        return np.stack([np.mean([values[b, :, i] for b, i in enumerate(table)], axis=0) for table in tables])

    if not tables:
        return []
    drop, differ, speed = of(drops), noise + of(excess), of(speeds)
    chance = stats.rough_power(items, differ, drop, max_drop, alpha)
    gains = speed.mean(axis=1)
    order = [i for i in np.argsort(gains) if gains[i] > np.log(MIN_SPEEDUP)]
    ladder = best_ladder(speed[order], chance[order], candidates) if order else []
    return [
        Pick(
            tuple(model.choices[j] for j in tables[i]),
            float(drop[i].mean()),
            float(differ[i].mean()),
            float(np.exp(gains[i])),
        )
        for i in (order[place] for place in ladder)
    ]


def _tables(speeds: Floats, drops: list[Floats], max_drop: float, allowed: NDArray[np.bool_]) -> list[tuple[int, ...]]:
    """The fastest table for every share of the limit, by every quantile of the drop; exact routing left out."""
    found = {tuple(best_table(speeds, drop, share * max_drop, allowed)) for drop in drops for share in _SPENT}
    return sorted(table for table in found if any(table))


def worth(speed: Floats, chance: Floats, ladder: tuple[int, ...]) -> float:
    """Expected log speed-up of what certification ends with, less what ending with nothing costs.

    Args:
        speed: log speed-ups [tables, draws].
        chance: to pass the certificate [tables, draws].
        ladder: tables in the order in which they are tried; the first that fails ends it.
    """
    reached, found = np.ones(speed.shape[1]), np.full(speed.shape[1], -FAILURE_COST)
    before = np.full(speed.shape[1], -FAILURE_COST)
    for place in ladder:
        reached = reached * chance[place]
        found = found + reached * (speed[place] - before)
        before = speed[place]
    return float(found.mean())


def best_ladder(speed: Floats, chance: Floats, candidates: int) -> list[int]:
    """The ladder of most worth among all with up to `candidates` tables, which are given slow to fast."""
    count = len(speed)
    best: tuple[int, ...] = ()
    score = worth(speed, chance, best)
    # Each place is refined in turn, from one candidate up: all ladders of that length are too many to try.
    for length in range(1, min(candidates, count) + 1):
        trials = {tuple(sorted({*best, extra})) for extra in range(count)} | (
            {(i,) for i in range(count)} if length == 1 else set()
        )
        for _ in range(3):
            scored = max(trials, key=lambda ladder: worth(speed, chance, ladder))
            if worth(speed, chance, scored) <= score + 1e-9:
                break
            best, score = scored, worth(speed, chance, scored)
            trials = {
                tuple(sorted({*best[:place], other, *best[place + 1 :]})) for place in range(len(best)) for other in range(count)
            }
    return list(best)
