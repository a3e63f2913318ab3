"""The statistics of ranking and certifying. Pure.

Drops and shares are fractions here, never points. "Loss" is an item that exact routing answers right and the
candidate wrong, "gain" the reverse; d is the share of both (discordance).

Sources: T. Tango, Statistics in Medicine 17 (1998) 891 (score test for paired binary outcomes);
I. Waudby-Smith, A. Ramdas, arXiv 2010.09686 (betting); C. Clopper, E. Pearson, Biometrika 26 (1934) 404.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats as sps

Floats = NDArray[np.float64]


def noninferiority_p(losses: float, gains: float, n: float, limit: float) -> float:
    """p-value of H0 "the true drop is `limit` or more" for paired binary outcomes, n fixed beforehand.

    Tango's score test, with the probability that no loss at all is seen under H0 as its floor: with few
    discordant items the normal approximation would certify 1 point on 268 items, where 299 are needed.

    Args:
        losses: items right under exact routing and wrong under the candidate.
        gains: items wrong under exact routing and right under the candidate.
        n: distinct items, each once under each routing. All three may be fractions, divided by a design effect.
        limit: largest drop that may be lost, in (0, 1).

    Returns:
        The one-sided p-value; 1.0 for a limit of 0 (no finite sample can show it) or n = 0.
    """
    if n <= 0 or limit <= 0:
        return 1.0
    return float(_p_values(np.array([losses]), np.array([gains]), n, limit)[0])


def score_cdf(losses: float, gains: float, n: float, limit: float) -> float:
    """Lower tail of Tango's score statistic at a drop of `limit`: near 0 where the drop is well below, near 1 where above it.

    Args:
        losses, gains, n: counts, which may be fractions where they were divided by a design effect.
    """
    return float(_score_cdf(np.array([losses]), np.array([gains]), n, limit)[0])


def _score_cdf(losses: NDArray[Any], gains: NDArray[Any], n: float, limit: float) -> Floats:
    a = 2.0 * n
    b = -losses - gains + (2.0 * n - losses + gains) * limit
    c = -gains * limit * (1.0 - limit)
    share_of_gains = (np.sqrt(b * b - 4.0 * a * c) - b) / (2.0 * a)  # restricted maximum likelihood under H0
    variance = n * (2.0 * share_of_gains + limit * (1.0 - limit))
    z = (losses - gains - n * limit) / np.sqrt(variance)
    return np.asarray(sps.norm.cdf(z), dtype=float)


def _p_values(losses: NDArray[Any], gains: NDArray[Any], n: float, limit: float) -> Floats:
    return np.maximum(_score_cdf(losses, gains, n, limit), (1.0 - limit) ** n)


def drop_upper_bound(losses: float, gains: float, n: float, confidence: float) -> float:
    """The smallest limit that these counts certify: the upper end of the one-sided interval of the drop."""
    low, high = max((losses - gains) / n, 0.0), 1.0 - 1e-9
    if noninferiority_p(losses, gains, n, high) > 1.0 - confidence:
        return 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if noninferiority_p(losses, gains, n, middle) <= 1.0 - confidence else (middle, high)
    return high


def power(n: int, d: float, true_drop: float, limit: float, alpha: float) -> float:
    """Probability that n items certify `limit` when the true drop is `true_drop` and a share d is discordant.

    Summed exactly over the trinomial: D discordant of n, losses among D.
    """
    if limit <= 0 or n <= 0:
        return 0.0
    d = max(d, abs(true_drop))
    if d <= 0:
        return float((1.0 - limit) ** n <= alpha)
    low, high = (int(sps.binom.ppf(q, n, d)) for q in (1e-6, 1 - 1e-6))
    discordant = np.arange(low, high + 1)
    # The p-value rises with the losses: bisect, for every number of discordant items, the most losses that still pass.
    passes, fails = np.full(len(discordant), -1), discordant + 1
    while (fails - passes > 1).any():
        middle = (passes + fails) // 2
        good = (_p_values(middle, discordant - middle, n, limit) <= alpha) & (middle >= 0) & (middle <= discordant)
        passes, fails = np.where(good, middle, passes), np.where(good, fails, np.maximum(middle, passes + 1))
    share = (d + true_drop) / (2 * d)
    return float(np.sum(sps.binom.pmf(discordant, n, d) * sps.binom.cdf(passes, discordant, share)))


def rough_power(n: int, d: Floats, true_drop: Floats, limit: float, alpha: float) -> Floats:
    """`power` by the normal approximation, for arrays of worlds: good enough to rank, not to promise.

    Args:
        d: shares of discordant items, of any shape.
        true_drop: shares, of the same shape.
    """
    if limit <= 0 or n <= 0:
        return np.zeros_like(true_drop)
    d = np.maximum(d, np.abs(true_drop))
    under_null = np.sqrt(np.maximum(np.maximum(d, limit) - limit**2, 0.0) / n)
    spread = np.sqrt(np.maximum(d - true_drop**2, 1.0 / n) / n)
    return np.asarray(sps.norm.cdf((limit - true_drop - sps.norm.ppf(1 - alpha) * under_null) / spread))


def items_needed(d: float, true_drop: float, limit: float, alpha: float = 0.05, wanted_power: float = 0.8) -> int | None:
    """Distinct items that certify `limit` with the wanted power; None where no number does (true drop at the limit)."""
    if limit <= true_drop or limit <= 0:
        return None
    low, high = 1, 64
    while power(high, d, true_drop, limit, alpha) < wanted_power:
        low, high = high, high * 2
        if high > 2**22:
            return None
    while high - low > max(1, high // 200):  # the power saws a little, so a finer answer would be noise
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle, d, true_drop, limit, alpha) >= wanted_power else (middle, high)
    return high


def smallest_limit(n: int, d: float, alpha: float = 0.05, wanted_power: float = 0.8) -> float | None:
    """The smallest limit that n items certify for a policy that truly costs nothing. None below any."""
    low, high = 0.0, 0.5
    if power(n, d, 0.0, high, alpha) < wanted_power:
        return None
    while high - low > 0.0001:
        middle = (low + high) / 2
        low, high = (low, middle) if power(n, d, 0.0, middle, alpha) >= wanted_power else (middle, high)
    return high


def largest_difference(n: int, true_drop: float, limit: float, alpha: float = 0.05, wanted_power: float = 0.8) -> float | None:
    """The largest share of discordant items at which n items certify `limit` with the wanted power; None where they never do.

    Args:
        true_drop: share that the policy truly costs. At least so many items differ.
    """

    def enough(d: float) -> bool:
        return power(n, d, true_drop, limit, alpha) >= wanted_power

    low, high = true_drop, 1.0
    if not enough(low):
        return None
    while high - low > 0.0001:
        middle = (low + high) / 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    return low


_BETS = np.array([0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9])


@dataclass
class DropRejector:
    """Betting e-process against H0 "the true drop is at most `limit`", to end hopeless trials early.

    Feed it in dispatch order only: in completion order the late answers, which are the wrong ones, come last.
    Wealth is the mean over fixed bets, so it is a martingale under H0 whatever the stopping rule.
    """

    limit: float
    alpha: float = 0.05
    items: int = 0
    _wealth: Floats = field(default_factory=lambda: np.ones(len(_BETS)))

    def update(self, exact_right: bool, chosen_right: bool) -> bool:
        """Add one item; True once H0 is rejected, i.e. the drop is above the limit."""
        self.items += 1
        difference = float(exact_right) - float(chosen_right)
        self._wealth = self._wealth * (1.0 + _BETS / (1.0 + self.limit) * (difference - self.limit))
        return self.rejected

    @property
    def wealth(self) -> float:
        return float(self._wealth.mean())

    @property
    def rejected(self) -> bool:
        return self.wealth >= 1.0 / self.alpha


def clopper_pearson(over: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided limits of a share: lower and upper, each at (1 - confidence) one-sided. n may be fractional (n/deff)."""
    alpha = 1.0 - confidence
    low = float(sps.beta.ppf(alpha, over, n - over + 1)) if over > 0 else 0.0
    high = float(sps.beta.ppf(1 - alpha, over + 1, n - over)) if over < n else 1.0
    return low, high


def design_effect(blocks: Sequence[Floats]) -> float:
    """How many times the variance of a mean exceeds that of independent requests.

    Args:
        blocks: per stretch of time (15 residences or more) an array of a request quantity, in any unit.

    Returns:
        Mean square between the stretches over the variance of single requests, at least 1. A short stretch weighs by its size.
    """
    kept = [block for block in blocks if len(block) >= 2]
    if len(kept) < 2:
        return 1.0
    everything = np.concatenate(kept)
    variance = float(everything.var(ddof=1))
    if variance <= 0:
        return 1.0
    mean = everything.mean()
    between = sum(len(block) * float(block.mean() - mean) ** 2 for block in kept) / (len(kept) - 1)
    return max(1.0, between / variance)


@dataclass(frozen=True)
class ShareVerdict:
    """Whether "at most `allowed` of requests are over the limit" holds."""

    verdict: str  # "pass" | "fail" | "undecided"
    over_share: float
    low: float
    high: float
    allowed: float
    requests: int
    design_effect: float


def judge_share(over: int, n: int, allowed: float, deff: float, confidence: float = 0.95) -> ShareVerdict:
    """Decide a percentile limit by the share of requests over it, n counted as n/deff independent ones."""
    if n == 0:
        return ShareVerdict("undecided", 0.0, 0.0, 1.0, allowed, 0, deff)
    low, high = clopper_pearson(over / deff, n / deff, confidence)
    verdict = "pass" if high <= allowed else "fail" if low > allowed else "undecided"
    return ShareVerdict(verdict, over / n, low, high, allowed, n, deff)


@dataclass(frozen=True)
class RatioInterval:
    """exact / candidate with its t interval; None where one pair is all there is."""

    value: float
    low: float | None
    high: float | None
    pairs: int


def ratio_interval(exact: Sequence[float], candidate: Sequence[float], confidence: float = 0.95) -> RatioInterval:
    """Geometric mean of the pairs' ratios, with a two-sided t interval on their logarithms."""
    logs = np.log(np.asarray(exact, dtype=float)) - np.log(np.asarray(candidate, dtype=float))
    mean, pairs = float(logs.mean()), len(logs)
    if pairs < 2:
        return RatioInterval(math.exp(mean), None, None, pairs)
    half = float(sps.t.ppf(0.5 + confidence / 2, pairs - 1) * logs.std(ddof=1) / math.sqrt(pairs))
    return RatioInterval(math.exp(mean), math.exp(mean - half), math.exp(mean + half), pairs)


def mean_upper_bound(blocks: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """One-sided t limits (lower, upper) of a mean from block means; infinite where there is one block only."""
    values = np.asarray(blocks, dtype=float)
    if len(values) < 2:
        return -math.inf, math.inf
    half = float(sps.t.ppf(confidence, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return float(values.mean()) - half, float(values.mean()) + half
