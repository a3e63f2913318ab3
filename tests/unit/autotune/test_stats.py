"""The statistics against brute force, simulation, and the figures that the project's planning rests on."""

import math

import numpy as np
import pytest
from scipy import stats as sps

from sere_autotune.trial import stats


def test_planning_figures_are_reproduced() -> None:
    """80 % power at 95 %: items for (limit 1, true 0), (1, 0.3), (2, 0), (2, 0.6) points, by discordance."""
    wanted = {
        0.01: (800, 1560, 255, 514),
        0.02: (1360, 2800, 400, 800),
        0.05: (3140, 6450, 830, 1660),
        0.10: (6290, 12800, 1590, 3140),
    }
    for d, row in wanted.items():
        for (drop, limit), n in zip([(0, 0.01), (0.003, 0.01), (0, 0.02), (0.006, 0.02)], row, strict=True):
            assert stats.items_needed(d, drop, limit) == pytest.approx(n, rel=0.04)


def test_without_any_difference_299_items_certify_one_point_and_149_two() -> None:
    assert stats.noninferiority_p(0, 0, 299, 0.01) <= 0.05 < stats.noninferiority_p(0, 0, 298, 0.01)
    assert stats.noninferiority_p(0, 0, 149, 0.02) <= 0.05 < stats.noninferiority_p(0, 0, 148, 0.02)
    assert stats.items_needed(0.0, 0.0, 0.01) == 299


@pytest.mark.parametrize("gain_share", [0.0, 0.005, 0.02, 0.05])
@pytest.mark.parametrize("n", [300, 800])
def test_false_certificates_stay_near_alpha_at_the_limit(n: int, gain_share: float) -> None:
    """Summed over every outcome (losses, gains) with the true drop exactly at the limit."""
    limit, loss_share = 0.01, 0.01 + gain_share
    total = 0.0
    for gains in range(int(sps.binom.ppf(1 - 1e-7, n, gain_share)) + 1 if gain_share else 1):
        weight = sps.binom.pmf(gains, n, gain_share)
        for losses in range(int(sps.binom.ppf(1 - 1e-7, n, loss_share)) + 1):
            chance = sps.binom.pmf(losses, n - gains, loss_share / (1 - gain_share))
            if weight * chance > 1e-12 and stats.noninferiority_p(losses, gains, n, limit) <= 0.05:
                total += weight * chance
    assert total <= 0.06


def test_power_agrees_with_simulation() -> None:
    rng = np.random.default_rng(0)
    n, d, drop, limit = 900, 0.03, 0.002, 0.015
    losses = rng.binomial(n, (d + drop) / 2, 4000)
    gains = rng.binomial(n, (d - drop) / 2, 4000)
    passed = np.mean([stats.noninferiority_p(int(a), int(b), n, limit) <= 0.05 for a, b in zip(losses, gains, strict=True)])
    assert stats.power(n, d, drop, limit, 0.05) == pytest.approx(passed, abs=0.03)


def test_a_limit_of_zero_and_a_drop_at_the_limit_need_infinitely_many() -> None:
    assert stats.noninferiority_p(0, 50, 1000, 0.0) == 1.0
    assert stats.items_needed(0.01, 0.0, 0.0) is None
    assert stats.items_needed(0.05, 0.01, 0.01) is None


def test_smallest_limit_of_1319_items_at_5_percent_is_one_and_a_half_points() -> None:
    assert stats.smallest_limit(1319, 0.05) == pytest.approx(0.0155, abs=0.0006)


def test_upper_bound_is_where_the_p_value_meets_alpha() -> None:
    bound = stats.drop_upper_bound(7, 3, 2000, 0.95)
    assert stats.noninferiority_p(7, 3, 2000, bound * 1.001) <= 0.05 < stats.noninferiority_p(7, 3, 2000, bound * 0.999)
    assert bound > 0.002


@pytest.mark.parametrize(("drop", "slowest_median"), [(0.20, 70), (0.10, 140), (0.05, 400)])
def test_e_process_ends_hopeless_trials_early(drop: float, slowest_median: int) -> None:
    rng = np.random.default_rng(1)
    used = []
    for _ in range(100):
        rejector = stats.DropRejector(0.01)
        while not rejector.update(True, bool(rng.random() >= drop)):
            if rejector.items >= 3000:
                break
        used.append(rejector.items)
    assert np.median(used) <= slowest_median


def test_e_process_rarely_rejects_a_policy_at_the_limit() -> None:
    rng = np.random.default_rng(2)
    wrong = 0
    for _ in range(300):
        rejector = stats.DropRejector(0.01, alpha=0.05)
        # 5 % discordant, true drop exactly 1 point, looked at after every item.
        draws = rng.random(1500)
        for u in draws:
            if rejector.update(u < 0.03 or u >= 0.05, u >= 0.03):
                wrong += 1
                break
    assert wrong / 300 <= 0.05 + 0.03


def test_clopper_pearson_known_values() -> None:
    assert stats.clopper_pearson(0, 59)[1] == pytest.approx(1 - 0.05 ** (1 / 59))
    low, high = stats.clopper_pearson(5, 100)
    assert (low, high) == pytest.approx((0.0199, 0.1023), abs=0.0005)
    assert stats.clopper_pearson(10, 10)[1] == 1.0


def test_design_effect_of_independent_and_of_repeated_requests() -> None:
    rng = np.random.default_rng(3)
    independent = [rng.normal(size=200) for _ in range(60)]
    assert stats.design_effect(independent) == pytest.approx(1.0, abs=0.5)
    clumped = [np.repeat(rng.normal(size=20), 10) for _ in range(60)]  # ten equal in a row: deff 10
    assert stats.design_effect(clumped) == pytest.approx(10, rel=0.45)
    uneven = [rng.normal(size=400 if i % 2 else 10) for i in range(60)]
    assert stats.design_effect(uneven) == pytest.approx(1.0, abs=0.5), "short stretches scatter more and weigh less"


def test_a_p99_limit_needs_299_effective_requests() -> None:
    assert stats.judge_share(0, 299, 0.01, 1.0).verdict == "pass"
    assert stats.judge_share(0, 298, 0.01, 1.0).verdict == "undecided"
    assert stats.judge_share(0, 2990, 0.01, 10.1).verdict == "undecided"
    assert stats.judge_share(60, 1000, 0.01, 2.0).verdict == "fail"
    assert stats.judge_share(0, 0, 0.01, 1.0).verdict == "undecided"


def test_ratio_interval_covers_at_its_nominal_rate() -> None:
    rng = np.random.default_rng(4)
    covered = 0
    for _ in range(400):
        drift = rng.normal(0, 0.2, 10)
        exact = 20 * np.exp(drift + rng.normal(0, 0.05, 10))
        chosen = 20 / 1.35 * np.exp(drift + rng.normal(0, 0.05, 10))
        found = stats.ratio_interval(list(exact), list(chosen))
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 1.35 <= found.high
    assert covered / 400 == pytest.approx(0.95, abs=0.035)


def test_one_pair_has_no_interval() -> None:
    found = stats.ratio_interval([20.0], [10.0])
    assert found.value == pytest.approx(2.0)
    assert (found.low, found.high) == (None, None)
    assert stats.mean_upper_bound([1.0]) == (-math.inf, math.inf)
