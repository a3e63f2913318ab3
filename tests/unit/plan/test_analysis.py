"""The canary's judgement: figures against tables, and a verdict for each line of the checklist."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from sere_ext.contract.slo import LatencyLimits, LatencySlo
from sere_ext.control.metrics import bounds
from sere_operator.plan.histogram import Histogram, from_bounds, merged, packed, unpacked, window
from sere_operator.plan.rollout.analysis import (
    FLAGRANT_CONFIDENCE,
    FLAGRANT_RATIO,
    LEAST_INDEPENDENT,
    SLOWER_RATIO,
    Case,
    Outcome,
    Side,
    compare_means,
    golden_harm,
    judge,
)
from sere_operator.plan.rollout.intervals import (
    CONFIDENCE,
    DESIGN_EFFECT,
    incomplete_beta,
    share_lower_limit,
    share_upper_limit,
    sign_test,
    student_quantile,
)

SLO = LatencySlo.model_validate({"tpotMs": {"p95": 20}})


def histogram(n: int, mean_ms: float, over: int = 0, spread: float = 0.3) -> Histogram:
    """`spread`: standard deviation over mean."""
    total_s = n * mean_ms / 1e3
    return Histogram(n, total_s, {"20": over}, (total_s, n * (mean_ms / 1e3) ** 2 * (1 + spread**2)))


def side(n: int, tpot_ms: float, over: int, right: int | None = 16, bucket: str = "8-15", spread: float = 0.3) -> Side:
    seen = {bucket: histogram(n, tpot_ms, over, spread)}
    golden = None if right is None else (True,) * right + (False,) * (16 - right)
    return Side(seen, seen, golden)


def verdict(stable: Side, canary: Side, **changes: Any) -> Outcome:
    given: dict[str, Any] = {"min_requests": 500, "golden_prompts": 16, "deadline_over": False, **changes}
    return judge(Case(stable, canary, SLO, **given)).outcome


@pytest.mark.parametrize(
    ("stable", "canary", "expected"),
    [
        (side(1000, 18, 20), side(1000, 14, 10), Outcome.PASSED),
        (side(1000, 18, 20), side(3000, 18, 900), Outcome.REJECTED),  # 30 % over the limit, 5 % allowed
        (side(1000, 30, 990), side(1000, 30, 980), Outcome.PASSED),  # breaks the limit, but less than stable does
        (side(1000, 18, 20), side(1000, 19, 90), Outcome.PASSED),  # 9 % over; too few independent requests to be sure
        (side(1000, 30, 990), side(1000, 30, 999), Outcome.PASSED),  # both break it, by a difference that chance explains
        (side(3000, 10, 0), side(3000, 18, 0), Outcome.REJECTED),  # within the SLO, yet 1.8 times slower
        (side(1000, 10, 0), side(1000, 13, 0), Outcome.PENDING),  # 1.3 times slower, but not for certain
        (side(100, 10, 0), side(599, 18, 0), Outcome.PENDING),  # too few to know the spread: no ban
        (side(3000, 10, 0, bucket="1"), side(3000, 18, 0), Outcome.PENDING),  # no batch size in common: not comparable
        (side(1000, 18, 20), side(1000, 14, 10, right=6), Outcome.REJECTED),
        (side(1000, 18, 20), side(1000, 14, 10, right=13), Outcome.PASSED),  # 3 of 16 lost: chance
        (side(1000, 18, 20), side(1000, 14, 10, right=None), Outcome.PENDING),
        (side(1000, 18, 20, right=2), side(1000, 14, 10, right=2), Outcome.PENDING),  # prompts that nobody answers show nothing
        (side(1000, 18, 20), side(499, 14, 10), Outcome.PENDING),
        (side(499, 18, 20), side(1000, 14, 10), Outcome.PENDING),
        (Side(), Side(), Outcome.PENDING),
    ],
)
def test_verdicts(stable: Side, canary: Side, expected: Outcome) -> None:
    assert verdict(stable, canary) is expected


@pytest.mark.parametrize("canary", [side(1000, 14, 10, right=None), side(10, 14, 0), Side()])
def test_missing_data_never_passes(canary: Side) -> None:
    assert verdict(side(1000, 18, 20), canary, deadline_over=True) is Outcome.INCONCLUSIVE


def test_turns_on_one_pod_ban_nothing_for_latency() -> None:
    """More load explains it as well; worse answers it does not explain."""
    slow, stable = side(3000, 40, 2900), side(1000, 18, 20)
    assert verdict(stable, slow, watched=False) is Outcome.PENDING
    assert verdict(stable, slow) is Outcome.REJECTED
    assert verdict(stable, slow, side_by_side=False) is Outcome.INCONCLUSIVE
    assert verdict(stable, side(1000, 14, 10, right=6), side_by_side=False) is Outcome.REJECTED


def test_a_limit_without_a_bound_cannot_be_judged() -> None:
    seen = {"8-15": Histogram(1000, 14.0, {})}
    unseen = Side(seen, seen, (True,) * 16)
    assert verdict(side(1000, 18, 20), unseen) is Outcome.PENDING


def test_the_message_tells_share_limit_and_certainty() -> None:
    told = judge(Case(side(1000, 18, 20), side(3000, 18, 900), SLO, 500, 0, deadline_over=False)).message
    assert told.startswith("canary TPOT p95 above the limit of 20 ms (30.0% of 3,000 requests over it, at least ")
    assert told.endswith("at 95%, 5% allowed)")


def test_a_canary_that_passed_says_how_much_faster_it_was() -> None:
    case = Case(side(1000, 18, 20), side(1000, 12, 10), SLO, min_requests=500, golden_prompts=16, deadline_over=False)
    assert "mean TPOT 12.0 ms against 18.0 ms (1.50x as fast) over 1,000 and 1,000 requests" in judge(case).message


def test_incomplete_beta_against_closed_forms() -> None:
    for x in (0.01, 0.3, 0.5, 0.9):
        assert incomplete_beta(1, 1, x) == pytest.approx(x)
        assert incomplete_beta(3, 1, x) == pytest.approx(x**3)
        assert incomplete_beta(1, 4, x) == pytest.approx(1 - (1 - x) ** 4)
    assert incomplete_beta(2.5, 3.5, 0.4) + incomplete_beta(3.5, 2.5, 0.6) == pytest.approx(1)


def test_share_lower_limit_against_clopper_pearson() -> None:
    """5 of 20, one-sided 95 %: 0.1041 (tables). A design effect of 30 makes 150 of 600 tell as much."""
    assert share_lower_limit(5, 20, design_effect=1) == pytest.approx(0.1041, abs=2e-4)
    assert share_lower_limit(150, 600) == pytest.approx(0.1041, abs=2e-4)
    assert share_lower_limit(0, 100) == 0.0


def test_sign_test_and_golden_harm() -> None:
    assert sign_test(7, 0) == pytest.approx(1 / 128)
    assert sign_test(5, 5) == pytest.approx(0.623, abs=1e-3)
    right, wrong = (True,) * 7, (False,) * 7
    assert "7 lost, 0 won" in (golden_harm(right, wrong) or "")
    assert golden_harm(right[:6], wrong[:6]) is None  # p = 1.6 %
    assert golden_harm(wrong, right) is None
    assert golden_harm(None, right) is None


def test_student_quantile_against_tables() -> None:
    assert student_quantile(0.95, 1) == pytest.approx(6.3138, abs=1e-3)
    assert student_quantile(0.95, 9) == pytest.approx(1.8331, abs=1e-3)
    assert student_quantile(0.99, 20) == pytest.approx(2.5280, abs=1e-3)
    assert student_quantile(0.95, 1e6) == pytest.approx(1.6449, abs=1e-3)


def test_share_upper_limit_mirrors_the_lower() -> None:
    assert share_upper_limit(15, 20, design_effect=1) == pytest.approx(1 - 0.1041, abs=2e-4)
    assert share_upper_limit(0, 0) == 1.0


def test_a_static_policy_is_taken_back_only_for_flagrant_slowness() -> None:
    """Its author answers for it: what is only probably slower, or rarely used, stays."""
    static = {"min_requests": 0, "golden_prompts": 0}
    assert verdict(side(3000, 10, 0), side(3000, 14, 0), **static) is Outcome.PASSED
    assert verdict(side(100, 10, 0), side(100, 19, 0), **static) is Outcome.PASSED
    assert verdict(side(100, 10, 0), Side(), **static) is Outcome.PASSED
    assert verdict(Side(), side(3000, 30, 2900), **static) is Outcome.PASSED  # nothing to compare with: no harm shown
    assert verdict(side(3000, 10, 0), side(3000, 19, 0), **static) is Outcome.REJECTED
    assert verdict(side(3000, 10, 0), side(3000, 19, 0), **static, watched=False) is Outcome.PENDING
    assert verdict(side(3000, 10, 0), side(3000, 30, 2900), **static) is Outcome.REJECTED  # breaks the SLO as well


def test_means_are_compared_at_equal_buckets() -> None:
    """The canary ran at larger batches; at each of them it is as fast as the stable side."""
    canary = {"1": histogram(100, 10), "8-15": histogram(3000, 20)}
    stable = {"1": histogram(3000, 10), "8-15": histogram(100, 20), "2-3": histogram(5000, 1)}
    means = compare_means(canary, stable, CONFIDENCE)
    assert means is not None
    assert means.ratio == pytest.approx(1)


# ---- streams as a busy engine makes them --------------------------------------------------------------------------------

BOUNDS = (*bounds(LatencyLimits(p95=20)), math.inf)
LOOKS = (600, 900, 1500, 3000)


def stream(generator: np.random.Generator, runs: int, mean_ms: float, spread: float) -> np.ndarray:
    """TPOT [runs, requests] in seconds: log-normal, with the lag-1 correlation that gives the design effect.

    An AR(1) process has the design effect (1 + r) / (1 - r).
    """
    correlation = (DESIGN_EFFECT - 1) / (DESIGN_EFFECT + 1)
    noise = generator.standard_normal((runs, LOOKS[-1]))
    for i in range(1, LOOKS[-1]):
        noise[:, i] = correlation * noise[:, i - 1] + math.sqrt(1 - correlation**2) * noise[:, i]
    sigma = math.sqrt(math.log1p(spread**2))
    return np.asarray(mean_ms / 1e3 * np.exp(sigma * noise - sigma**2 / 2))


def seen(latencies: np.ndarray) -> dict[str, Histogram]:
    """As the plug-in's histogram tells it."""
    at_most = np.searchsorted(np.sort(latencies), BOUNDS, side="right")
    return {"8-15": from_bounds(dict(zip(BOUNDS, at_most.tolist(), strict=True)), float(latencies.sum()), {"20"})}


def rejected(canary: np.ndarray, stable: np.ndarray, least: float, confidence: float, looks: tuple[int, ...] = LOOKS) -> float:
    """Share of the runs that are called slower at any of the looks."""
    hits = 0
    for here, there in zip(canary, stable, strict=True):
        means = (compare_means(seen(here[:n]), seen(there[:n]), confidence) for n in looks)
        hits += any(found is not None and found.least > least for found in means)
    return hits / len(canary)


@pytest.mark.parametrize("spread", [0.15, 0.4, 0.8])
def test_equal_latency_under_correlated_noise_is_hardly_ever_rejected(spread: float) -> None:
    generator = np.random.default_rng(int(spread * 100))
    canary, stable = (stream(generator, 500, 15, spread) for _ in range(2))
    assert rejected(canary, stable, SLOWER_RATIO, CONFIDENCE) < 0.01
    assert rejected(canary, stable, FLAGRANT_RATIO, FLAGRANT_CONFIDENCE) < 0.005


def test_what_it_replaces_rejected_them() -> None:
    """The streams can fail the test: the estimate alone, on a few requests, goes beyond the limit often."""
    generator = np.random.default_rng(1)
    canary, stable = (stream(generator, 300, 15, 0.4) for _ in range(2))
    assert np.mean(canary[:, :100].mean(1) > SLOWER_RATIO * stable[:, :100].mean(1)) > 0.1


@pytest.mark.parametrize("spread", [0.15, 0.4])
def test_twice_the_latency_is_caught_at_a_few_thousand_requests(spread: float) -> None:
    generator = np.random.default_rng(int(spread * 100))
    canary, stable = stream(generator, 200, 30, spread), stream(generator, 200, 15, spread)
    assert rejected(canary, stable, SLOWER_RATIO, CONFIDENCE, LOOKS[-1:]) > 0.99
    assert rejected(canary, stable, FLAGRANT_RATIO, FLAGRANT_CONFIDENCE, LOOKS[-1:]) > 0.9


# ---- histograms ----------------------------------------------------------------------------------------------------------


def test_variance_from_buckets_is_near_the_truth_and_never_below_the_buckets_width() -> None:
    values = stream(np.random.default_rng(3), 1, 15, 0.4)[0]
    (found,) = seen(values).values()
    assert found.variance_s2 == pytest.approx(float(values.var()), rel=0.1)
    narrow = from_bounds({0.010: 0, 0.020: 50, math.inf: 50}, 0.55, set())
    assert narrow.variance_s2 == pytest.approx(0.010**2 / 12)
    assert math.isnan(Histogram().variance_s2)


def test_a_window_is_a_difference_and_a_restart_is_seen() -> None:
    start = packed({"8-15": Histogram(10, 1.0, {"20": 3}, (1.0, 0.1))})
    now = {"8-15": Histogram(30, 2.5, {"20": 4}, (2.5, 0.3)), "1": Histogram(2, 0.1, {"20": 0}, (0.1, 0.01))}
    added = window(start, now)
    assert added is not None
    assert added["1"] == now["1"]
    assert (added["8-15"].count, added["8-15"].total_s, added["8-15"].over) == (20, 1.5, {"20": 1})
    assert added["8-15"].moments == pytest.approx((1.5, 0.2))
    assert window(start, {"8-15": Histogram(9, 0.5, {"20": 0}, (0.5, 0.05))}) is None
    assert window(start, {}) is None
    assert unpacked(start["8-15"]) == Histogram(10, 1.0, {"20": 3}, (1.0, 0.1))


def test_pods_and_windows_add_up() -> None:
    parts = [{"1": Histogram(10, 1.0, {"20": 3}, (1.1, 0.2))}, {"1": Histogram(5, 0.5, {"20": 1}, (0.4, 0.1))}, {}]
    (added,) = merged(parts).values()
    assert (added.count, added.total_s, added.over) == (15, 1.5, {"20": 4})
    assert added.moments == pytest.approx((1.5, 0.3))


def test_too_few_requests_say_nothing_about_the_spread() -> None:
    enough = math.ceil(LEAST_INDEPENDENT * DESIGN_EFFECT)
    for n, known in ((enough, True), (enough - 1, False)):
        means = compare_means({"1": histogram(n, 90)}, {"1": histogram(n, 10)}, CONFIDENCE)
        assert means is not None
        assert (means.least > SLOWER_RATIO) is known


@pytest.mark.parametrize(
    ("at_most", "total_s"),
    [
        ({0.01: 1.0, math.inf: math.inf}, 1.0),
        ({0.01: 1.0, math.inf: math.nan}, 1.0),
        ({0.01: 1.0, math.inf: 2.0}, math.nan),
        ({0.01: 1.0, math.inf: 2.0}, -1.0),
        ({0.01: 5.0, math.inf: 2.0}, 1.0),
        ({math.nan: 1.0, math.inf: 2.0}, 1.0),
    ],
    ids=["infinite count", "no count", "no sum", "negative sum", "falling counts", "no bound"],
)
def test_figures_that_are_not_finite_are_no_histogram(at_most: dict[float, float], total_s: float) -> None:
    """A sick engine says so; the prober reads a ValueError as no answer."""
    with pytest.raises(ValueError, match="a histogram"):
        from_bounds(at_most, total_s, {"10"})
