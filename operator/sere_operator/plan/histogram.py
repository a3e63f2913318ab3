"""Latency histograms of the pods: what is read of them, what one window added, sums, and how the status keeps them. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Object = dict[str, Any]

# Requests of one bucket whose width is not known (above the last bound) are taken to lie between the bound and this times it.
_OPEN_END = 2.0


@dataclass(frozen=True)
class Histogram:
    """One latency histogram of one policy and one batch bucket.

    count    requests
    total_s  the sum of their latencies in seconds, exact
    over     by a limit in milliseconds: the number of requests above it
    moments  sums of the first (s) and second (s^2) moment of the bucket that each request fell in, taken as uniform
             within it; None: not known. Both are sums over requests, so windows and pods subtract and add exactly, and
             the spread that they give is never below that of the buckets themselves.
    """

    count: int = 0
    total_s: float = 0.0
    over: dict[str, int] = field(default_factory=dict)
    moments: tuple[float, float] | None = (0.0, 0.0)

    @property
    def mean_s(self) -> float:
        """NaN without a request."""
        return self.total_s / self.count if self.count else math.nan

    @property
    def variance_s2(self) -> float | None:
        """Variance of one request's latency, None if it is not known or there is no request."""
        if self.moments is None or not self.count:
            return None
        first, second = self.moments
        return max(0.0, second / self.count - (first / self.count) ** 2)


def from_bounds(at_most: Mapping[float, float], total_s: float, limits: Iterable[str]) -> Histogram:
    """A Histogram from Prometheus's cumulative counts.

    Args:
        at_most: requests at or below each bound (seconds), with infinity for all of them.
        limits: the bounds (ms) to keep in `over`.
    """
    count = int(at_most.get(math.inf, 0))
    named = {f"{bound * 1e3:g}": below for bound, below in at_most.items() if bound != math.inf}
    first = second = lower = below = 0.0
    for bound, reached in sorted(at_most.items()):
        upper = bound if bound != math.inf else _OPEN_END * lower
        first += (reached - below) * (lower + upper) / 2
        second += (reached - below) * (lower * lower + lower * upper + upper * upper) / 3
        lower, below = upper, reached
    return Histogram(count, total_s, {limit: count - int(named[limit]) for limit in limits if limit in named}, (first, second))


def total(histograms: Iterable[Histogram]) -> Histogram:
    """Their sum; moments are known if all of them are."""
    many = list(histograms)
    over: dict[str, int] = {}
    for histogram in many:
        for limit, count in histogram.over.items():
            over[limit] = over.get(limit, 0) + count
    known = [h.moments for h in many if h.moments is not None]
    moments = (sum(m[0] for m in known), sum(m[1] for m in known)) if len(known) == len(many) else None
    return Histogram(sum(h.count for h in many), sum(h.total_s for h in many), over, moments)


def merged(many: list[dict[str, Histogram]]) -> dict[str, Histogram]:
    """Sum over pods, by bucket."""
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
        moments = None
        if histogram.moments is not None and old.moments is not None:
            moments = (histogram.moments[0] - old.moments[0], histogram.moments[1] - old.moments[1])
        added[bucket] = Histogram(histogram.count - old.count, histogram.total_s - old.total_s, over, moments)
    if any(bucket not in now for bucket in known):
        return None
    return added


def packed(histograms: dict[str, Histogram]) -> Object:
    """As small JSON for the status: {bucket: {"n": requests, "s": seconds, "over": {limit ms: requests}, "m": moments}}."""
    return {bucket: _packed(histogram) for bucket, histogram in sorted(histograms.items())}


def _packed(histogram: Histogram) -> Object:
    body: Object = {"n": histogram.count, "s": round(histogram.total_s, 6), "over": histogram.over}
    if histogram.moments is not None:
        body["m"] = [round(moment, 9) for moment in histogram.moments]
    return body


def unpacked(data: Object) -> Histogram:
    """The inverse of `packed`, by bucket. What an operator of before packed has no moments."""
    moments = (float(data["m"][0]), float(data["m"][1])) if "m" in data else None
    over = {str(key): int(value) for key, value in data.get("over", {}).items()}
    return Histogram(int(data["n"]), float(data["s"]), over, moments)
