"""Latency histograms of the pods: what is read of them, what one window added, sums, and how the status keeps them. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Object = dict[str, Any]

# Requests above the last bound are taken to lie between that bound and this many times it.
_OPEN_END = 2.0


@dataclass(frozen=True)
class Histogram:
    """One latency histogram of one policy and one batch bucket.

    count    requests
    total_s  the sum of their latencies in seconds, exact
    over     by a limit in milliseconds: the number of requests above it
    moments  sums over requests of the first (s) and second (s^2) moment of the bucket that each request fell in, taken
             as uniform within it. Windows and pods subtract and add exactly, and the spread that the moments give is
             never below that of the buckets themselves.
    """

    count: int = 0
    total_s: float = 0.0
    over: dict[str, int] = field(default_factory=dict)
    moments: tuple[float, float] = (0.0, 0.0)

    @property
    def mean_s(self) -> float:
        """Mean latency of a request in seconds; NaN without a request."""
        return self.total_s / self.count if self.count else math.nan

    @property
    def variance_s2(self) -> float:
        """Variance of one request's latency in s^2; NaN without a request."""
        if not self.count:
            return math.nan
        first, second = self.moments
        return max(0.0, second / self.count - (first / self.count) ** 2)


def from_bounds(at_most: Mapping[float, float], total_s: float, limits: Iterable[str]) -> Histogram:
    """A Histogram from Prometheus's cumulative counts.

    Args:
        at_most: requests at or below each bound (seconds), with infinity for all of them.
        total_s: the sum of the latencies, seconds.
        limits: the bounds (ms) to keep in `over`.

    Raises:
        ValueError: a figure is no finite number, is negative, or a count falls from one bound to the next; so that what a
            sick engine says is read as no answer.
    """
    ordered = sorted(at_most.items())
    counts = [below for _, below in ordered]
    if not all(math.isfinite(value) and value >= 0 for value in (total_s, *counts)) or any(math.isnan(b) for b, _ in ordered):
        raise ValueError("a histogram holds a negative number, or one that is not finite")
    if counts != sorted(counts):
        raise ValueError("a histogram's cumulative counts fall")
    count = int(at_most.get(math.inf, 0))
    named = {f"{bound * 1e3:g}": below for bound, below in ordered if bound != math.inf}
    first = second = lower = below = 0.0
    for bound, reached in ordered:
        upper = bound if bound != math.inf else _OPEN_END * lower
        first += (reached - below) * (lower + upper) / 2
        second += (reached - below) * (lower * lower + lower * upper + upper * upper) / 3
        lower, below = upper, reached
    return Histogram(count, total_s, {limit: count - int(named[limit]) for limit in limits if limit in named}, (first, second))


def total(histograms: Iterable[Histogram]) -> Histogram:
    """The sum of histograms. A limit is in `over` if it is in that of any of them."""
    many = list(histograms)
    over: dict[str, int] = {}
    for histogram in many:
        for limit, count in histogram.over.items():
            over[limit] = over.get(limit, 0) + count
    moments = (sum(h.moments[0] for h in many), sum(h.moments[1] for h in many))
    return Histogram(sum(h.count for h in many), sum(h.total_s for h in many), over, moments)


def merged(many: list[dict[str, Histogram]]) -> dict[str, Histogram]:
    """The sum over pods, by bucket.

    Args:
        many: one pod's histograms by bucket each.
    """
    buckets = sorted({bucket for one in many for bucket in one})
    return {bucket: total(one[bucket] for one in many if bucket in one) for bucket in buckets}


def window(start: Object | None, now: dict[str, Histogram]) -> dict[str, Histogram] | None:
    """What was added since `start` (as `packed`), by bucket; None if a counter fell, which means that the pod restarted."""
    added: dict[str, Histogram] = {}
    known: Object = start or {}
    for bucket, histogram in now.items():
        old = unpacked(known[bucket]) if bucket in known else Histogram()
        if histogram.count < old.count:
            return None
        over = {limit: count - old.over.get(limit, 0) for limit, count in histogram.over.items()}
        moments = (histogram.moments[0] - old.moments[0], histogram.moments[1] - old.moments[1])
        added[bucket] = Histogram(histogram.count - old.count, histogram.total_s - old.total_s, over, moments)
    if any(bucket not in now for bucket in known):
        return None
    return added


def packed(histograms: dict[str, Histogram]) -> Object:
    """As small JSON for the status: {bucket: {"n": requests, "s": seconds, "over": {limit ms: requests}, "m": moments}}."""
    return {
        bucket: {"n": h.count, "s": round(h.total_s, 6), "over": h.over, "m": [round(moment, 9) for moment in h.moments]}
        for bucket, h in sorted(histograms.items())
    }


def unpacked(data: Object) -> Histogram:
    """One bucket's histogram from what `packed` made of it."""
    first, second = data["m"]
    over = {str(key): int(value) for key, value in data["over"].items()}
    return Histogram(int(data["n"]), float(data["s"]), over, (float(first), float(second)))
