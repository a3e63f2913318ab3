"""From a candidate's blocks to a verdict, and from verdicts to the chosen candidate. Pure.

The checks of `judge` in order: failed requests, latency limits, speed, accuracy. A candidate that fails one of the first three is
skipped, since the safe candidates are the slow ones and nothing of the significance level has been spent on it. The first that
fails the accuracy test ends the ladder: a fixed sequence needs no correction. Of those that pass all checks, the one that was measured fastest is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from sere_autotune.certify import accuracy, latency
from sere_autotune.study.schema import MeasuredBlock, Part, SpeedVerdict, Verdict
from sere_autotune.trial.measures import STATISTICS

SPEED_ALPHA = 0.05  # largest chance that any candidate of a ladder is called faster though none is
# An undecided speed is judged a second time, with more pairs. Two judgements at 0.6 of a level keep that level together
# (Pocock 1977). Half of that leaves a margin: of simulated studies in which no policy is faster, 2.8 % end with a false
# "faster" (benchmarks/results/verdicts.json), and a ladder of 1.05x, 1.08x and 1.12x at 8 % noise is missed in 2 % more.
_EACH_OF_TWO = 0.3
_PART_OF_LIMIT = 0.1  # share of the accuracy limit that items which one routing did not answer may make up


@dataclass(frozen=True)
class Rules:
    """What a candidate is judged by; the same for every candidate of a ladder."""

    limits: Sequence[tuple[str, str, float]]  # (metric, statistic, milliseconds)
    max_drop: float  # share
    alpha: float  # of the accuracy test
    max_failures: float  # share of requests
    candidates: int = 1  # on the ladder; each gets an equal part of SPEED_ALPHA
    loads: Sequence[str] = ("",)  # names of the load levels
    tasks: Mapping[str, str] = field(default_factory=dict)  # item digest -> name of its task
    baseline: str = ""  # why exact routing answers too badly for a drop to mean something; empty where it does not

    @property
    def speed_alpha(self) -> float:
        """Significance level of one judgement of one candidate's speed."""
        return SPEED_ALPHA * _EACH_OF_TWO / self.candidates

    @property
    def shown(self) -> float:
        """Confidence of a candidate's intervals of speed, each limit at the level of a judgement.

        The chosen candidate is the one that was measured fastest, perhaps by luck. Limits for it alone would lie above its
        true speed in one of six ladders of eight equal candidates; these hold at 95 % for all candidates and both judgements.
        """
        return 1 - 2 * self.speed_alpha


def judge(blocks: Sequence[MeasuredBlock], rules: Rules) -> Verdict:
    """Decide on one candidate from all its blocks, of exact routing and of itself."""
    pairs = accuracy.paired(blocks)
    chosen = [b for b in blocks if b.routing == "chosen"]
    exact = [b for b in blocks if b.routing == "exact"]
    p, effect, upper = accuracy.noninferiority(pairs, rules.max_drop)
    parts = accuracy.parts(pairs, rules.max_drop, rules.loads, rules.tasks)
    limits = [found for limit in rules.limits for found in latency.judge_limit(limit, exact, chosen)]
    speed = judge_speed(exact, chosen, rules.speed_alpha)
    broken = [found for found in limits if found["verdict"] != "pass"]
    harmed = [part for part in parts if part.harmed]
    n = len(pairs.items)
    drop = (pairs.losses - pairs.gains) / max(n, 1)
    if failing := _failures(pairs, exact, chosen, rules):
        verdict, reason = "failures", failing
    elif broken:
        verdict, reason = "slo", broken[0]["text"]
    elif speed.verdict != "faster":
        words = {"slower": "slower than exact routing", "undecided": "not shown to be faster"}[speed.verdict]
        verdict, reason = speed.verdict, f"{words}: {speed}"
    elif harmed:
        verdict, reason = "accuracy", over_the_limit(harmed)
    elif rules.baseline:
        verdict, reason = "accuracy", rules.baseline
    elif p > rules.alpha:
        verdict, reason = "accuracy", f"{-drop * 100:+.2f} points, p = {p:.2g} against {rules.alpha:.2g}"
    else:
        verdict, reason = "passed", f"p = {p:.2g} on {n:,} items"
    active = [(b.active_before, b.active_after) for b in chosen if b.active_before is not None and b.active_after is not None]
    return Verdict(
        verdict=verdict,
        reason=reason,
        p_value=p,
        alpha=rules.alpha,
        items=n,
        losses=pairs.losses,
        gains=pairs.gains,
        differ=sum(item.differ for item in pairs.items),
        left_out=pairs.left_out,
        design_effect=effect,
        exact_accuracy=sum(item.exact for item in pairs.items) / max(n, 1),
        chosen_accuracy=sum(item.chosen for item in pairs.items) / max(n, 1),
        upper_bound=upper(1 - rules.alpha),
        speed=speed,
        parts=parts,
        slo=limits,
        speedup={name: ratio for name in STATISTICS if (ratio := latency.speedup(exact, chosen, name, rules.shown)) is not None},
        latency_ms={"exact": latency.table(exact), "chosen": latency.table(chosen)},
        active_before=float(np.mean([a[0] for a in active])) if active else None,
        active_after=float(np.mean([a[1] for a in active])) if active else None,
        tokens={
            routing: float(np.mean([b.tokens for b in some])) if some else 0.0
            for routing, some in (("exact", exact), ("chosen", chosen))
        },
    )


def over_the_limit(harmed: Sequence[Part]) -> str:
    """The worst of the parts in which harm is shown, in words."""
    worst = max(harmed, key=lambda part: part.drop)
    where = {"load": "at {}", "task": "in {}", "edge": "at {}, where the policy applies too"}[worst.kind].format(worst.name)
    return f"{-worst.drop * 100:+.2f} points {where}, shown to be over the limit"


def _failures(
    pairs: accuracy.Paired, exact: Sequence[MeasuredBlock], chosen: Sequence[MeasuredBlock], rules: Rules
) -> str | None:
    """What is wrong with failed requests, in words; None where nothing is.

    Failures that both routings share are no fault of the candidate. Items that one routing alone did not answer left the
    pairs, perhaps because they were the hard ones, so they may make up a small part of the accuracy limit only.
    """
    requests = sum(b.requests for b in chosen)
    more = (sum(b.failures for b in chosen) - sum(b.failures for b in exact)) / max(1, requests)
    alone = max(more, pairs.chosen_failed / max(1, len(pairs.items) + pairs.left_out))
    if alone > rules.max_failures:
        return f"{alone:.2%} of requests failed that exact routing answers, {rules.max_failures:.2%} allowed"
    counted = len(pairs.items) + pairs.left_out
    allowed = math.ceil(counted * rules.max_drop * _PART_OF_LIMIT)
    for who, number in (("exact routing", pairs.exact_failed), ("the policy", pairs.chosen_failed)):
        if number > allowed:
            return f"{who} alone failed on {number:,} of {counted:,} items; {allowed:,} may be left out of the accuracy test"
    if pairs.both_failed > counted / 10:
        return f"{pairs.both_failed:,} of {counted:,} items failed with and without the policy"
    return None


def judge_speed(exact: Sequence[MeasuredBlock], chosen: Sequence[MeasuredBlock], alpha: float) -> SpeedVerdict:
    """Whether mean TPOT is lower under the candidate, by one-sided t limits over the pairs of blocks.

    The mean is what the search minimises and what a canary compares; a percentile may be a latency limit, never a gain.

    Args:
        alpha: significance level of each of the two limits.
    """
    found = latency.speedup(exact, chosen, "mean", 1 - 2 * alpha)
    if found is None:
        return SpeedVerdict("undecided", math.nan, None, None, 0, alpha)
    low, high = found.low, found.high
    verdict = "faster" if low is not None and low > 1 else "slower" if high is not None and high < 1 else "undecided"
    return SpeedVerdict(verdict, found.value, low, high, found.pairs, alpha)


def walk(verdicts: Sequence[Verdict]) -> tuple[int | None, bool]:
    """The end of the ladder so far.

    Args:
        verdicts: on the first candidates of the ladder, safe to fast.

    Returns:
        Index of the chosen candidate, which is the one measured fastest of those that passed, or None; and whether the
        ladder has ended.
    """
    passed: list[tuple[float, int]] = []
    for index, verdict in enumerate(verdicts):
        if verdict.verdict == "passed" and verdict.speed is not None:
            passed.append((verdict.speed.value, index))
        elif verdict.verdict == "accuracy":
            return (max(passed)[1] if passed else None), True
    return (max(passed)[1] if passed else None), False
