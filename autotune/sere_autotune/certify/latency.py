"""Latencies of a candidate's blocks: the limits of the SLO, and TPOT against exact routing. Pure.

Requests under load are correlated, so a percentile limit is judged by the share of requests over it with their number
divided by the design effect, and a speed-up by the ratio in each pair of blocks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sere_autotune.study.schema import Interval, MeasuredBlock
from sere_autotune.trial import stats
from sere_autotune.trial.measures import METRICS, STATISTICS, statistic

Floats = NDArray[np.float64]


def samples(blocks: Sequence[MeasuredBlock], metric: str) -> list[Floats]:
    """Milliseconds of every block's timed requests."""
    return [np.array(block.latency_ms[metric], dtype=float) for block in blocks]


def table(blocks: Sequence[MeasuredBlock]) -> dict[str, dict[str, float]]:
    """Metric -> statistic -> milliseconds, over all requests of the blocks."""
    joined = {metric: np.concatenate(samples(blocks, metric)) if blocks else np.array([]) for metric in METRICS}
    return {metric: {name: statistic(values, name) for name in STATISTICS} for metric, values in joined.items()}


def judge_limit(
    limit: tuple[str, str, float], exact: Sequence[MeasuredBlock], chosen: Sequence[MeasuredBlock]
) -> list[dict[str, Any]]:
    """Whether the candidate keeps a latency limit, one verdict for each load level.

    Args:
        limit: (metric, statistic, milliseconds), e.g. ("tpot", "p95", 20.0).
    """
    metric, name, bound = limit
    found = []
    for level in sorted({b.level for b in chosen}):
        mine = samples([b for b in chosen if b.level == level], metric)
        theirs = samples([b for b in exact if b.level == level], metric)
        joined = np.concatenate(mine)
        measured = statistic(joined, name)
        if name == "mean":
            low, high = stats.mean_upper_bound([float(x.mean()) for x in mine if len(x)])
            verdict = "pass" if high <= bound else "fail" if low > bound else "undecided"
            detail = f"mean at most {high:.1f} ms at 95 %"
            extra: dict[str, Any] = {}
        else:
            quantile = float(name[1:])
            deff = max(_tail_effect(mine, quantile), _tail_effect(theirs, quantile))
            share = stats.judge_share(int((joined > bound).sum()), len(joined), 1 - quantile / 100, deff)
            verdict = share.verdict
            if verdict == "undecided" and share.over_share == 0 and _far_below(mine, quantile, bound):
                verdict = "pass"
            detail = (
                f"{share.over_share:.1%} of {share.requests:,} requests over it, between {share.low:.1%} and {share.high:.1%} "
                f"at 95 %, {share.allowed:.0%} allowed"
            )
            extra = {"overShare": share.over_share, "low": share.low, "high": share.high, "designEffect": deff}
        words = {"pass": "within", "fail": "above", "undecided": "not shown to be within"}[verdict]
        text = f"{metric.upper()} {name} {measured:.1f} ms {words} the limit of {bound:g} ms ({detail})"
        found.append({"metric": metric, "statistic": name, "limit": bound, "level": level, "measured": measured,
                      "exact": statistic(np.concatenate(theirs), name) if theirs else float("nan"),
                      "verdict": verdict, "text": text, **extra})  # fmt: skip
    return found


def _far_below(blocks: Sequence[Floats], quantile: float, bound: float) -> bool:
    """Whether the blocks' own percentiles stay below the limit with 99 % confidence (batch means on the log scale).

    Only asked where not one request was over the limit: the share test cannot tell 10 ms from 999 ms under a limit of
    1,000 ms, and would call both undecided on a few hundred correlated requests.
    """
    logs = [float(np.log(np.percentile(b, quantile))) for b in blocks if len(b) >= 20]
    return len(logs) >= 3 and stats.mean_upper_bound(logs, 0.99)[1] <= np.log(bound)


def _tail_effect(blocks: Sequence[Floats], quantile: float) -> float:
    """Design effect of the share of requests above its own quantile, in the blocks of one routing."""
    kept = [b for b in blocks if len(b)]
    if not kept:
        return 1.0
    edge = np.percentile(np.concatenate(kept), quantile)
    return stats.design_effect([(b > edge).astype(float) for b in kept])


def speedup(
    exact: Sequence[MeasuredBlock], chosen: Sequence[MeasuredBlock], name: str, confidence: float = 0.95
) -> Interval | None:
    """exact / candidate TPOT with its two-sided t interval from paired blocks, load levels averaged within a pair.

    A load level of a pair counts only where both routings have a TPOT there: one routing's mean over a fast and a slow level
    beside the other's over the fast one alone would be a gain that nobody measured.

    Args:
        name: the statistic of TPOT, such as "mean" or "p95".
        confidence: of the interval, a share.

    Returns:
        None where no pair of blocks has a TPOT under both routings, as where answers have one token.
    """

    def measured(blocks: Sequence[MeasuredBlock]) -> dict[tuple[int, int], float]:
        tpot_ms = {(b.pair, b.level): statistic(np.array(b.latency_ms["tpot"], dtype=float), name) for b in blocks}
        return {place: value for place, value in tpot_ms.items() if value > 0}

    first, second = measured(exact), measured(chosen)
    pairs: dict[int, list[tuple[int, int]]] = {}
    for place in sorted(first.keys() & second.keys()):
        pairs.setdefault(place[0], []).append(place)
    if not pairs:
        return None

    def averaged(tpot_ms: Mapping[tuple[int, int], float]) -> list[float]:
        return [float(np.exp(np.mean([np.log(tpot_ms[place]) for place in places]))) for places in pairs.values()]

    return Interval(**asdict(stats.ratio_interval(averaged(first), averaged(second), confidence)))
