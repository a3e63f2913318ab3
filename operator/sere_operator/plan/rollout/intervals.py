"""How sure a figure is: confidence limits of shares and of ratios of means, and a sign test. Pure.

The operator's image holds no SciPy; the few functions that are needed rest on the regularised incomplete beta function.
"""

from __future__ import annotations

import math
from statistics import NormalDist

CONFIDENCE = 0.95
# Latencies of requests that share batches are alike: n requests tell as much as n / DESIGN_EFFECT independent ones.
# Measured 20 to 35 for TPOT under load; with the upper end a rejection is a safe one.
DESIGN_EFFECT = 30.0


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


def share_upper_limit(over: int, n: int, confidence: float = CONFIDENCE, design_effect: float = DESIGN_EFFECT) -> float:
    """Upper Clopper-Pearson limit of a share; 1 without a request."""
    return 1.0 - share_lower_limit(n - over, n, confidence, design_effect) if n else 1.0


def _upper_tail(k: float, n: float, p: float) -> float:
    """P(X >= k) of a binomial with real-valued k and n: the regularised incomplete beta I_p(k, n - k + 1)."""
    return incomplete_beta(k, n - k + 1, p)


def student_quantile(confidence: float, dof: float) -> float:
    """The t below which a share `confidence` (above 0.5) of Student's t distribution lies. dof > 0."""
    t = NormalDist().inv_cdf(confidence)  # too small; the tail is convex, so Newton's steps only grow towards the answer
    height = math.exp(math.lgamma((dof + 1) / 2) - math.lgamma(dof / 2)) / math.sqrt(dof * math.pi)
    for _ in range(50):
        tail = incomplete_beta(dof / 2, 0.5, dof / (dof + t * t)) / 2
        step = (tail - (1 - confidence)) / (height * (1 + t * t / dof) ** (-(dof + 1) / 2))
        t += step
        if step < 1e-9 * t:
            break
    return t


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
