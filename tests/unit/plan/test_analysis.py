"""The canary's judgement: figures against tables, and a verdict for each line of the checklist."""

from __future__ import annotations

from typing import Any

import pytest
from sere_operator.api.common import Slo
from sere_operator.plan.analysis import (
    Arm,
    Histogram,
    Outcome,
    golden_harm,
    incomplete_beta,
    judge,
    packed,
    share_lower_limit,
    sign_test,
    unpacked,
    window,
)

SLO = Slo.model_validate({"tpotMs": {"p95": 20}})


def arm(n: int, tpot_ms: float, over: int, right: int | None = 16, bucket: str = "8-64") -> Arm:
    histogram = {bucket: Histogram(n, n * tpot_ms / 1e3, {"20": over})}
    golden = None if right is None else (True,) * right + (False,) * (16 - right)
    return Arm(histogram, histogram, golden)


def verdict(stable: Arm, canary: Arm, **changes: Any) -> Outcome:
    given: dict[str, Any] = {"min_requests": 500, "golden_prompts": 16, "deadline_over": False, **changes}
    return judge(stable, canary, SLO, **given).outcome


@pytest.mark.parametrize(
    ("stable", "canary", "expected"),
    [
        (arm(1000, 18, 20), arm(1000, 14, 10), Outcome.PASSED),
        (arm(1000, 18, 20), arm(3000, 18, 900), Outcome.REJECTED),  # 30 % over the limit, 5 % allowed
        (arm(1000, 30, 990), arm(1000, 30, 980), Outcome.PASSED),  # breaks the limit, but less than stable does
        (arm(1000, 18, 20), arm(1000, 19, 90), Outcome.PASSED),  # 9 % over; too few independent requests to be sure
        (arm(1000, 10, 0), arm(1000, 13, 0), Outcome.REJECTED),  # within the SLO, yet 1.3 times slower
        (arm(1000, 10, 0, bucket="other"), arm(1000, 13, 0), Outcome.REJECTED),  # no bucket in common: over all
        (arm(1000, 18, 20), arm(1000, 14, 10, right=6), Outcome.REJECTED),
        (arm(1000, 18, 20), arm(1000, 14, 10, right=13), Outcome.PASSED),  # 3 of 16 lost: chance
        (arm(1000, 18, 20), arm(1000, 14, 10, right=None), Outcome.PENDING),
        (arm(1000, 18, 20, right=2), arm(1000, 14, 10, right=2), Outcome.PENDING),  # prompts that nobody answers show nothing
        (arm(1000, 18, 20), arm(499, 14, 10), Outcome.PENDING),
        (arm(499, 18, 20), arm(1000, 14, 10), Outcome.PENDING),
        (Arm(), Arm(), Outcome.PENDING),
    ],
)
def test_verdicts(stable: Arm, canary: Arm, expected: Outcome) -> None:
    assert verdict(stable, canary) is expected


@pytest.mark.parametrize("canary", [arm(1000, 14, 10, right=None), arm(10, 14, 0), Arm()])
def test_missing_data_never_passes(canary: Arm) -> None:
    assert verdict(arm(1000, 18, 20), canary, deadline_over=True) is Outcome.INCONCLUSIVE


def test_before_and_after_on_one_pod_bans_nothing_for_latency() -> None:
    """More load explains it as well; worse answers it does not explain."""
    slow, stable = arm(3000, 40, 2900), arm(1000, 18, 20)
    assert verdict(stable, slow) is Outcome.REJECTED
    assert verdict(stable, slow, side_by_side=False) is Outcome.INCONCLUSIVE
    assert verdict(stable, arm(1000, 14, 10, right=6), side_by_side=False) is Outcome.REJECTED


def test_a_limit_without_a_bound_cannot_be_judged() -> None:
    histogram = {"8-64": Histogram(1000, 14.0, {})}
    unseen = Arm(histogram, histogram, (True,) * 16)
    assert verdict(arm(1000, 18, 20), unseen) is Outcome.PENDING


def test_the_message_tells_share_limit_and_certainty() -> None:
    told = judge(arm(1000, 18, 20), arm(3000, 18, 900), SLO, min_requests=500, golden_prompts=0, deadline_over=False).message
    assert told.startswith("canary TPOT p95 above the limit of 20 ms (30.0% of 3,000 requests over it, at least ")
    assert told.endswith("at 95%, 5% allowed)")


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


def test_a_window_is_a_difference_and_a_restart_is_seen() -> None:
    start = packed({"8-64": Histogram(10, 1.0, {"20": 3})})
    now = {"8-64": Histogram(30, 2.5, {"20": 4}), "other": Histogram(2, 0.1, {"20": 0})}
    assert window(start, now) == {"8-64": Histogram(20, 1.5, {"20": 1}), "other": Histogram(2, 0.1, {"20": 0})}
    assert window(start, {"8-64": Histogram(9, 0.5, {"20": 0})}) is None
    assert window(start, {}) is None
    assert unpacked(start["8-64"]) == Histogram(10, 1.0, {"20": 3})
