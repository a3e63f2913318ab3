"""Is the canary worse than what it would replace? Pure; the answer is Passed, Rejected, Inconclusive, or not yet.

The certificate was earned elsewhere, on enough distinct items (`sere tune`). Here is tested for harm: latency by the
pods' own histograms against the SLO and against the stable side, accuracy by the profile's golden prompts. Nothing
passes on missing data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property

from sere_ext.contract.slo import LatencyLimits, LatencySlo
from sere_operator.plan.chain import first
from sere_operator.plan.histogram import Histogram, total
from sere_operator.plan.rollout.intervals import (
    CONFIDENCE,
    DESIGN_EFFECT,
    share_lower_limit,
    share_upper_limit,
    sign_test,
    student_quantile,
)

SLOWER_RATIO = 1.25  # mean TPOT of the canary over stable's: beyond this it is harm, whatever the SLO allows
# A Static policy is its author's decision: only what nobody can have meant is taken back.
FLAGRANT_RATIO = 1.5
FLAGRANT_CONFIDENCE = 0.99
# Independent requests' worth on both sides below which the spread is not known well enough to speak of harm.
LEAST_INDEPENDENT = 20.0
GOLDEN_ALPHA = 0.01  # of the one-sided sign test on answers that only one side got right
LEAST_GOLDEN_RIGHT = 0.5  # of stable's golden answers; they were chosen among those that exact routing answers right
_ALLOWED = {"p50": 0.50, "p90": 0.10, "p95": 0.05, "p99": 0.01}  # share of requests that may be above a limit


class Outcome(StrEnum):
    PENDING = "Pending"
    PASSED = "Passed"
    REJECTED = "Rejected"
    INCONCLUSIVE = "Inconclusive"


@dataclass(frozen=True)
class Verdict:
    outcome: Outcome
    message: str


@dataclass(frozen=True)
class Side:
    """What the canary, or the stable side, did in its window: histograms by batch bucket, golden answers in the prompts' order."""

    tpot: dict[str, Histogram] = field(default_factory=dict)
    ttft: dict[str, Histogram] = field(default_factory=dict)
    golden: tuple[bool | None, ...] | None = None

    @property
    def requests(self) -> int:
        """Finished requests: each has one TTFT."""
        return max(sum(h.count for h in self.ttft.values()), sum(h.count for h in self.tpot.values()))


@dataclass(frozen=True)
class Case:
    """What is judged.

    min_requests    finished requests that each side needs; 0: judge on what there is (a Static policy), and take only
                    flagrant slowness for harm
    golden_prompts  how many prompts each side must have answered; 0: none are asked for
    side_by_side    both sides ran at the same time. If not (one pod alone, in turns), more load in a few turns explains a
                    higher latency as well as the policy does: the policy goes back, but is not banned
    watched         for long enough that slowness is no passing disturbance; until then slowness is Pending
    """

    stable: Side
    canary: Side
    slo: LatencySlo | None
    min_requests: int
    golden_prompts: int
    deadline_over: bool
    side_by_side: bool = True
    watched: bool = True

    @property
    def if_slow(self) -> Outcome:
        """What a canary comes to that is slower for certain."""
        if not self.watched and not self.deadline_over:
            return Outcome.PENDING
        return Outcome.REJECTED if self.side_by_side else Outcome.INCONCLUSIVE

    @property
    def if_unknown(self) -> Outcome:
        """What a canary comes to of which too little is known."""
        return Outcome.INCONCLUSIVE if self.deadline_over else Outcome.PENDING

    @property
    def least_ratio(self) -> float:
        """Mean TPOT of the canary over the stable side's, beyond which the canary is slower."""
        return SLOWER_RATIO if self.min_requests else FLAGRANT_RATIO

    @cached_property
    def means(self) -> Means | None:
        """Mean TPOT of both sides compared at equal buckets."""
        return compare_means(self.canary.tpot, self.stable.tpot, CONFIDENCE if self.min_requests else FLAGRANT_CONFIDENCE)


def judge(case: Case) -> Verdict:
    """The answer of the first of `CHECKS` that has one.

    Harm is said only with confidence, and never without the stable side to compare with: a rejection bans the policy, and
    a busy machine must not. A case is judged again and again; what keeps the chance of a false rejection low over all of
    them is that the limit, not the estimate, must lie beyond `SLOWER_RATIO`.
    """
    verdict = first(CHECKS, case)
    assert verdict is not None, "nothing_against_it always answers"
    return verdict


def breaks_a_limit_that_stable_keeps(case: Case) -> Verdict | None:
    """The canary breaks a latency limit, and the stable side breaks it less often: Rejected."""
    if case.slo is None:
        return None
    for name, limits, here, there in (
        ("TPOT", case.slo.tpot_ms, case.canary.tpot, case.stable.tpot),
        ("TTFT", case.slo.ttft_ms, case.canary.ttft, case.stable.ttft),
    ):
        broken = _breaks_limit(name, limits, total(here.values()), total(there.values()))
        if broken:
            return Verdict(case.if_slow, broken)
    return None


def slower_than_stable(case: Case) -> Verdict | None:
    """The canary is slower at equal buckets, for certain: Rejected."""
    if case.means is None or not case.means.least > case.least_ratio:
        return None
    return Verdict(case.if_slow, case.means.words)


def golden_prompts_got_worse(case: Case) -> Verdict | None:
    """The canary answers golden prompts wrong that the stable side answers right: Rejected."""
    worse = golden_harm(case.stable.golden, case.canary.golden) if case.golden_prompts else None
    return Verdict(Outcome.REJECTED, worse) if worse else None


def golden_prompts_unanswered(case: Case) -> Verdict | None:
    """Golden prompts are not answered yet, or the stable side answers too few right for harm to show."""
    wanted = case.golden_prompts
    if not wanted:
        return None
    if not _complete(case.stable.golden, wanted) or not _complete(case.canary.golden, wanted):
        return Verdict(case.if_unknown, f"not all of {wanted} golden prompts were answered on both sides")
    known = sum(map(bool, case.stable.golden or ()))
    if known < LEAST_GOLDEN_RIGHT * wanted:
        words = f"the stable side answered only {known} of {wanted} golden prompts right, so they can show no harm"
        return Verdict(case.if_unknown, words)
    return None


def too_few_requests(case: Case) -> Verdict | None:
    """A side finished too few requests to be judged."""
    for name, side in (("canary", case.canary), ("stable side", case.stable)):
        if side.requests < case.min_requests:
            words = f"{name} finished {side.requests} of {case.min_requests} requests that are needed to judge"
            return Verdict(case.if_unknown, words)
    return None


def slower_but_not_for_certain(case: Case) -> Verdict | None:
    """The estimate lies beyond the limit, its confidence interval does not. Of a Static policy nobody asks."""
    if not case.min_requests or case.means is None or case.means.ratio <= SLOWER_RATIO:
        return None
    return Verdict(case.if_unknown, f"not certain yet: {case.means.words}")


def nothing_in_common(case: Case) -> Verdict | None:
    """Both sides ran, but at no batch size in common. Of a Static policy nobody asks."""
    if not case.min_requests or case.means is not None or not any(h.count for h in case.canary.tpot.values()):
        return None
    return Verdict(case.if_unknown, "canary and stable side ran at no batch size in common, so TPOT cannot be compared")


def limit_without_a_bound(case: Case) -> Verdict | None:
    """The pods' histograms have no bound at a limit, so it cannot be judged. Of a Static policy nobody asks."""
    unseen = _unseen_limit(case.slo, case.canary) if case.min_requests and case.slo is not None else None
    return Verdict(case.if_unknown, unseen) if unseen else None


def nothing_against_it(case: Case) -> Verdict | None:
    """All of it was judged: Passed."""
    return Verdict(Outcome.PASSED, _summary(case.stable, case.canary, case.golden_prompts))


CHECKS = (
    breaks_a_limit_that_stable_keeps,
    slower_than_stable,
    golden_prompts_got_worse,
    golden_prompts_unanswered,
    too_few_requests,
    slower_but_not_for_certain,
    nothing_in_common,
    limit_without_a_bound,
    nothing_against_it,
)


def _breaks_limit(name: str, limits: LatencyLimits | None, canary: Histogram, stable: Histogram) -> str | None:
    if limits is None or canary.count == 0:
        return None
    for percentile, allowed in _ALLOWED.items():
        limit = getattr(limits, percentile)
        over = canary.over.get(f"{limit:g}") if limit is not None else None
        if over is None:
            continue
        least = share_lower_limit(over, canary.count)
        if least > allowed and least > share_upper_limit(stable.over.get(f"{limit:g}", 0), stable.count):
            return (
                f"canary {name} {percentile} above the limit of {limit:g} ms ({over / canary.count:.1%} of {canary.count:,} "
                f"requests over it, at least {least:.1%} at {CONFIDENCE:.0%}, {allowed:.0%} allowed)"
            )
    return None


def _unseen_limit(slo: LatencySlo, canary: Side) -> str | None:
    for name, limits, histograms in (("TPOT", slo.tpot_ms, canary.tpot), ("TTFT", slo.ttft_ms, canary.ttft)):
        bounds = total(histograms.values()).over
        for percentile in _ALLOWED:
            limit = getattr(limits, percentile) if limits is not None else None
            if limit is not None and f"{limit:g}" not in bounds:
                return f"the pods' histograms have no bound at the {name} limit of {limit:g} ms, so it cannot be judged"
    return None


@dataclass(frozen=True)
class Means:
    """Mean TPOT of the canary over the stable side's at equal buckets: the estimate, and what it is at least.

    `least` is minus infinity where the data cannot say (too few requests).
    """

    ratio: float
    least: float
    words: str


def compare_means(canary: dict[str, Histogram], stable: dict[str, Histogram], confidence: float) -> Means | None:
    """The ratio of mean latencies and its one-sided lower limit, over the buckets that both sides saw; None: none.

    Buckets weigh n m / (n + m), the weight that says most about a common ratio: one that a side hardly saw hardly
    counts. The limit is Student's on the logarithm, by the delta method, with the sample shrunk by `DESIGN_EFFECT`.
    """
    shared = [(h, stable[bucket]) for bucket, h in canary.items() if h.count and bucket in stable and stable[bucket].count]
    weights = [here.count * there.count / (here.count + there.count) for here, there in shared]
    if not shared:
        return None
    sides = [[pair[side] for pair in shared] for side in (0, 1)]
    mean, before = (sum(w * h.mean_s for w, h in zip(weights, side, strict=True)) for side in sides)
    if before <= 0:
        return None
    ratio, least = mean / before, -math.inf
    independent = 2 * sum(weights) / DESIGN_EFFECT  # of a side, where both are equally large
    spreads = [[h.variance_s2 for h in side] for side in sides]
    if independent >= LEAST_INDEPENDENT:
        variance = sum(
            w * w * spread * DESIGN_EFFECT / h.count / (whole * whole)
            for side, spread_of, whole in zip(sides, spreads, (mean, before), strict=True)
            for w, h, spread in zip(weights, side, spread_of, strict=True)
        )
        least = ratio * math.exp(-student_quantile(confidence, independent - 1) * math.sqrt(variance))
    words = (
        f"canary mean TPOT {mean / sum(weights) * 1e3:.1f} ms is {ratio:.2f} times the stable side's "
        f"{before / sum(weights) * 1e3:.1f} ms"
    )
    return Means(ratio, least, f"{words} (at least {least:.2f} at {confidence:.0%})" if least > 0 else words)


def golden_harm(stable: tuple[bool | None, ...] | None, canary: tuple[bool | None, ...] | None) -> str | None:
    """One-sided sign test over prompts that exactly one side answered right."""
    if not stable or not canary:
        return None
    pairs = [(a, b) for a, b in zip(stable, canary, strict=False) if a is not None and b is not None]
    lost = sum(1 for a, b in pairs if a and not b)
    won = sum(1 for a, b in pairs if b and not a)
    p = sign_test(lost, won)
    if lost > won and p < GOLDEN_ALPHA:
        right = sum(1 for _, b in pairs if b)
        return (
            f"canary answered {right} of {len(pairs)} golden prompts right, the stable side {right + lost - won} "
            f"({lost} lost, {won} won, p = {p:.2g})"
        )
    return None


def _complete(answers: tuple[bool | None, ...] | None, wanted: int) -> bool:
    return answers is not None and len(answers) >= wanted and None not in answers


def _summary(stable: Side, canary: Side, golden_prompts: int) -> str:
    parts = []
    here, there = total(canary.tpot.values()), total(stable.tpot.values())
    if here.count and there.count:
        faster = f" ({there.mean_s / here.mean_s:.2f}x as fast)" if here.mean_s > 0 else ""
        parts.append(
            f"mean TPOT {here.mean_s * 1e3:.1f} ms against {there.mean_s * 1e3:.1f} ms{faster} "
            f"over {canary.requests:,} and {stable.requests:,} requests"
        )
    if golden_prompts and canary.golden and stable.golden:
        parts.append(
            f"{sum(map(bool, canary.golden))} of {golden_prompts} golden prompts right against {sum(map(bool, stable.golden))}"
        )
    return "canary passed: " + ("; ".join(parts) or "the policy applied and a token came through")
