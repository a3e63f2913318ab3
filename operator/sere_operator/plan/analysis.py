"""Is the canary worse than what it would replace? Pure; the answer is Passed, Rejected, Inconclusive, or not yet.

The certificate was earned elsewhere, on enough distinct items (`sere tune`). Here is tested for harm: latency by the
pods' own histograms against the SLO and against the stable side, accuracy by the profile's golden prompts. Nothing
passes on missing data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum

from sere_operator.api.common import Percentiles, Slo
from sere_operator.plan.snapshot import Histogram, Object

CONFIDENCE = 0.95
# Latencies of requests that share batches are alike: n requests tell as much as n / DESIGN_EFFECT independent ones.
# Measured 20 to 35 for TPOT under load; with the upper end a rejection is a safe one.
DESIGN_EFFECT = 30.0
SLOWER_RATIO = 1.25  # mean TPOT of the canary over stable's: beyond this it is harm, whatever the SLO allows
GOLDEN_ALPHA = 0.01  # of the one-sided sign test on answers that only one side got right
LEAST_GOLDEN_RIGHT = 0.5  # of stable's golden answers; they were chosen among those that exact routing answers right
OTHER_BUCKET = "other"  # the plug-in's label for batch sizes outside every bucket (sere_ext/state.py)
_ALLOWED = {"p50": 0.50, "p95": 0.05, "p99": 0.01}


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
class Arm:
    """What one side did in its window: histograms by batch bucket, golden answers in the prompts' order."""

    tpot: dict[str, Histogram] = field(default_factory=dict)
    ttft: dict[str, Histogram] = field(default_factory=dict)
    golden: tuple[bool | None, ...] | None = None

    @property
    def requests(self) -> int:
        """Finished requests: each has one TTFT."""
        return max(sum(h.count for h in self.ttft.values()), sum(h.count for h in self.tpot.values()))


def total(histograms: dict[str, Histogram]) -> Histogram:
    over: dict[str, int] = {}
    for histogram in histograms.values():
        for limit, count in histogram.over.items():
            over[limit] = over.get(limit, 0) + count
    return Histogram(sum(h.count for h in histograms.values()), sum(h.total_s for h in histograms.values()), over)


def judge(
    stable: Arm,
    canary: Arm,
    slo: Slo | None,
    *,
    min_requests: int,
    golden_prompts: int,
    deadline_over: bool,
    side_by_side: bool = True,
) -> Verdict:
    """The checklist, in order; the first that applies decides.

    1. canary breaks an SLO limit, and more than stable does   Rejected (not side by side: Inconclusive)
    2. canary is slower than stable at equal buckets           Rejected (not side by side: Inconclusive)
    3. golden prompts got worse                                Rejected
    4. golden answers missing, or stable's mostly wrong        Pending, after the deadline Inconclusive
    5. too few requests on a side                              Pending, after the deadline Inconclusive
    6. an SLO limit that the histograms have no bound for      Pending, after the deadline Inconclusive
    7. all judged                                              Passed

    Args:
        min_requests: finished requests that each side needs; 0: judge on what there is (a Static policy).
        golden_prompts: how many prompts each side must have answered; 0: none are asked for.
        side_by_side: both sides ran at the same time. If not (one pod alone, before and after), more load explains a
            higher latency as well as the policy does: it goes back, but is not banned.
    """
    slow = Outcome.REJECTED if side_by_side else Outcome.INCONCLUSIVE
    if slo is not None:
        for name, limits, here, there in (
            ("TPOT", slo.tpot_ms, canary.tpot, stable.tpot),
            ("TTFT", slo.ttft_ms, canary.ttft, stable.ttft),
        ):
            broken = _breaks_limit(name, limits, total(here), total(there))
            if broken:
                return Verdict(slow, broken)
    slower = _slower(canary, stable, min_requests)
    if slower:
        return Verdict(slow, slower)
    unanswered = Outcome.INCONCLUSIVE if deadline_over else Outcome.PENDING
    if golden_prompts:
        worse = golden_harm(stable.golden, canary.golden)
        if worse:
            return Verdict(Outcome.REJECTED, worse)
        if not _complete(stable.golden, golden_prompts) or not _complete(canary.golden, golden_prompts):
            return Verdict(unanswered, f"not all of {golden_prompts} golden prompts were answered on both sides")
        known = sum(map(bool, stable.golden or ()))
        if known < LEAST_GOLDEN_RIGHT * golden_prompts:
            words = f"the stable side answered only {known} of {golden_prompts} golden prompts right, so they can show no harm"
            return Verdict(unanswered, words)
    for side, arm in (("canary", canary), ("stable", stable)):
        if arm.requests < min_requests:
            return Verdict(unanswered, f"{side} finished {arm.requests} of {min_requests} requests that are needed to judge")
    unseen = _unseen_limit(slo, canary) if slo is not None and min_requests else None
    if unseen:
        return Verdict(unanswered, unseen)
    return Verdict(Outcome.PASSED, _summary(stable, canary, golden_prompts))


def _breaks_limit(name: str, limits: Percentiles | None, canary: Histogram, stable: Histogram) -> str | None:
    if limits is None or canary.count == 0:
        return None
    for percentile, allowed in _ALLOWED.items():
        limit = getattr(limits, percentile)
        over = canary.over.get(f"{limit:g}") if limit is not None else None
        if over is None:
            continue
        share = over / canary.count
        before = stable.over.get(f"{limit:g}", 0) / stable.count if stable.count else 0.0
        least = share_lower_limit(over, canary.count)
        if least > allowed and share > before:
            return (
                f"canary {name} {percentile} above the limit of {limit:g} ms ({share:.1%} of {canary.count:,} requests over it, "
                f"at least {least:.1%} at {CONFIDENCE:.0%}, {allowed:.0%} allowed)"
            )
    return None


def _unseen_limit(slo: Slo, canary: Arm) -> str | None:
    for name, limits, histograms in (("TPOT", slo.tpot_ms, canary.tpot), ("TTFT", slo.ttft_ms, canary.ttft)):
        bounds = total(histograms).over
        for percentile in _ALLOWED:
            limit = getattr(limits, percentile) if limits is not None else None
            if limit is not None and f"{limit:g}" not in bounds:
                return f"the pods' histograms have no bound at the {name} limit of {limit:g} ms, so it cannot be judged"
    return None


def _slower(canary: Arm, stable: Arm, min_requests: int) -> str | None:
    """Mean TPOT, at buckets that both sides saw enough of; where they share none, over all requests."""
    enough = max(20, min_requests // 10)
    shared = [
        bucket for bucket, h in canary.tpot.items()
        if h.count >= enough and stable.tpot.get(bucket, Histogram(0, 0.0)).count >= enough
    ]  # fmt: skip
    here = total({bucket: canary.tpot[bucket] for bucket in shared} if shared else canary.tpot)
    if here.count < enough or total(stable.tpot).count < enough:
        return None
    # Stable's mean, had it seen each bucket as often as the canary did.
    weights = {bucket: canary.tpot[bucket].count for bucket in shared}
    if shared:
        before = sum(stable.tpot[b].total_s / stable.tpot[b].count * weight for b, weight in weights.items()) / sum(
            weights.values()
        )
    else:
        whole = total(stable.tpot)
        before = whole.total_s / whole.count
    mean = here.total_s / here.count
    if before > 0 and mean > SLOWER_RATIO * before:
        return f"canary mean TPOT {mean * 1e3:.1f} ms is {mean / before:.2f} times the stable side's {before * 1e3:.1f} ms"
    return None


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


def _summary(stable: Arm, canary: Arm, golden_prompts: int) -> str:
    parts = []
    here, there = total(canary.tpot), total(stable.tpot)
    if here.count and there.count:
        parts.append(
            f"mean TPOT {here.total_s / here.count * 1e3:.1f} ms against {there.total_s / there.count * 1e3:.1f} ms "
            f"over {canary.requests:,} and {stable.requests:,} requests"
        )
    if golden_prompts and canary.golden and stable.golden:
        parts.append(
            f"{sum(map(bool, canary.golden))} of {golden_prompts} golden prompts right against {sum(map(bool, stable.golden))}"
        )
    return "canary passed: " + ("; ".join(parts) or "the policy applied and a token came through")


def sign_test(lost: int, won: int) -> float:
    """P(at least `lost` of lost + won fair coin tosses)."""
    n = lost + won
    return sum(math.comb(n, k) for k in range(lost, n + 1)) / 2**n


def share_lower_limit(over: int, n: int, confidence: float = CONFIDENCE, design_effect: float = DESIGN_EFFECT) -> float:
    """Lower Clopper-Pearson limit of a share, with the sample shrunk by the design effect."""
    k, m = over / design_effect, n / design_effect
    if k <= 0:
        return 0.0
    low, high = 0.0, over / n
    for _ in range(60):  # bisection: the tail probability rises with the share
        middle = (low + high) / 2
        if _upper_tail(k, m, middle) < 1 - confidence:
            low = middle
        else:
            high = middle
    return low


def _upper_tail(k: float, n: float, p: float) -> float:
    """P(X >= k) of a binomial with real-valued k and n: the regularised incomplete beta I_p(k, n - k + 1)."""
    return incomplete_beta(k, n - k + 1, p)


def incomplete_beta(a: float, b: float, x: float) -> float:
    """I_x(a, b) by Lentz's continued fraction (Numerical Recipes 6.4). a, b > 0, x in [0, 1]."""
    if x <= 0.0 or x >= 1.0:
        return 0.0 if x <= 0 else 1.0
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    if x < (a + 1) / (a + b + 2):
        return front * _beta_fraction(a, b, x) / a
    return 1.0 - front * _beta_fraction(b, a, 1 - x) / b


def _beta_fraction(a: float, b: float, x: float) -> float:
    tiny = 1e-300
    c, d = 1.0, 1.0 / (1.0 - (a + b) * x / (a + 1) or tiny)
    h = d
    for m in range(1, 300):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        d = 1.0 / (1.0 + even * d or tiny)
        c = 1.0 + even / c or tiny
        h *= d * c
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1.0 / (1.0 + odd * d or tiny)
        c = 1.0 + odd / c or tiny
        step = d * c
        h *= step
        if abs(step - 1.0) < 1e-12:
            break
    return h


def window(start: Object | None, now: dict[str, Histogram]) -> dict[str, Histogram] | None:
    """What was added since `start` (as `packed`), by bucket; None if a counter fell, which means that the pod restarted."""
    added: dict[str, Histogram] = {}
    known: Object = start or {}
    for bucket, histogram in now.items():
        old = unpacked(known[bucket]) if bucket in known else Histogram(0, 0.0)
        if histogram.count < old.count:
            return None
        over = {limit: count - old.over.get(limit, 0) for limit, count in histogram.over.items()}
        added[bucket] = Histogram(histogram.count - old.count, histogram.total_s - old.total_s, over)
    if any(bucket not in now for bucket in known):
        return None
    return added


def packed(histograms: dict[str, Histogram]) -> Object:
    """As small JSON for the status: {bucket: {"n": requests, "s": seconds, "over": {limit ms: requests}}}."""
    return {bucket: {"n": h.count, "s": round(h.total_s, 6), "over": h.over} for bucket, h in sorted(histograms.items())}


def unpacked(data: Object) -> Histogram:
    return Histogram(int(data["n"]), float(data["s"]), {str(key): int(value) for key, value in data.get("over", {}).items()})


def merged(many: list[dict[str, Histogram]]) -> dict[str, Histogram]:
    """Sum over pods, by bucket."""
    buckets = sorted({bucket for one in many for bucket in one})
    return {bucket: total({str(i): one[bucket] for i, one in enumerate(many) if bucket in one}) for bucket in buckets}
