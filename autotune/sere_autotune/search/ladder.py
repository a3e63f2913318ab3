"""From the model to the ladder, and from a ladder's blocks to verdicts. Pure: search ranks, certification decides.

Facts page "statistics", section Selection: at most three rungs from safe to fast, frozen before CERT is opened;
a rung that breaks a latency limit is skipped (the safe ones are the slow ones), the first that fails the accuracy
test ends the ladder (a fixed sequence needs no correction), the last that passed is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sere_autotune.search.posterior import MonotoneModel, best_table
from sere_autotune.trial import stats
from sere_autotune.trial.measures import METRICS, Answer, Pairs, pair, statistic
from sere_autotune.tuning.space import Table

# Share of the accuracy budget that each rung may be predicted to cost.
FRACTIONS = {1: (0.25,), 2: (0.05, 0.25), 3: (0.05, 0.25, 0.5)}
MIN_SPEEDUP = 1.02  # below this a policy is not worth a certificate
# If the first rung fails, the run ends with nothing. So it takes the choice of most worth among those alone whose chance to certify and
# to gain anything at all, over the posterior, is at least this share of the best one's: as a mere factor the chance is outweighed by a
# speed-up that one lucky block has shown. Simulated (8 trials of 160 items, block times +-30 %): 98 % of runs end with a policy, not 92 %.
_FIRST_CAUTION = 0.98


@dataclass(frozen=True)
class Rung:
    """One candidate of the frozen ladder, with what the search predicts of it (posterior means)."""

    policy: dict[str, Any]
    describe: str
    fraction: float
    drop: float  # share
    discordance: float  # share, noise floor included
    speedup: float
    power: float  # probability to certify, posterior mean

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Candidate:
    """A table with its predictions."""

    table: Table
    drop: float
    discordance: float
    speedup: float


def pick_ladder(
    model: MonotoneModel,
    max_drop: float,
    rungs: int,
    noise: float,
    allowed: NDArray[np.bool_],
    *,
    items: int,
    alpha: float = 0.05,
) -> list[tuple[float, Candidate]]:
    """The table of most worth for each share of the budget, safe to fast; a rung not faster than the one before is left out.

    Worth is the log speed-up times the chance to certify it, both over the posterior: after few trials a fast choice that
    nobody has measured well has a low mean drop and still a poor chance, and a failed certificate gains nothing. The first rung
    is more cautious, see `_FIRST_CAUTION`.

    Args:
        allowed: [buckets, choices], False where a latency limit is predicted or was seen to break.
        items: held-out items that the certificate will have.
        alpha: its level.
    """

    powers = [stats.rough_power(items, noise + model.excess(b), model.drop(b), max_drop, alpha) for b in range(model.buckets)]

    def mean(of: Callable[[int], NDArray[np.float64]]) -> NDArray[np.float64]:
        return np.stack([of(b).mean(axis=0) for b in range(model.buckets)])

    speeds, drops, excess, chances = mean(model.log_speed), mean(model.drop), mean(model.excess), mean(powers.__getitem__)
    sure = mean(lambda b: powers[b] * (model.log_speed(b) > np.log(MIN_SPEEDUP)))
    found: list[tuple[float, Candidate]] = []
    for fraction in FRACTIONS[rungs]:
        usable = allowed
        if not found:
            best_chance = np.max(sure, where=allowed & (drops <= fraction * max_drop), initial=0.0)
            usable = allowed & (sure >= _FIRST_CAUTION * best_chance)
        picks = best_table(speeds * chances, drops, fraction * max_drop, usable)
        candidate = Candidate(
            tuple(model.choices[i] for i in picks),
            drop=float(np.mean([drops[b, i] for b, i in enumerate(picks)])),
            discordance=noise + float(np.mean([excess[b, i] for b, i in enumerate(picks)])),
            speedup=float(np.exp(np.mean([speeds[b, i] for b, i in enumerate(picks)]))),
        )
        best = found[-1][1].speedup if found else MIN_SPEEDUP
        if candidate.speedup > best:
            found.append((fraction, candidate))
    return found


@dataclass(frozen=True)
class ArmBlock:
    """One certification block of one arm, as kept in the study."""

    pair: int
    level: int  # index into the load levels
    arm: str  # "exact" | "chosen"
    answers: dict[str, Answer]  # labelled items in dispatch order; text may be a digest of it
    latency_ms: dict[str, NDArray[np.float64]]
    seconds: float
    requests: int
    failures: int
    tokens: float
    active_before: float | None = None
    active_after: float | None = None


@dataclass
class RungResult:
    """The verdict on one rung."""

    verdict: str  # "passed" | "slo" | "accuracy"
    reason: str
    p_value: float
    alpha: float
    items: int
    losses: int
    gains: int
    differ: int
    exact_accuracy: float
    chosen_accuracy: float
    upper_bound: float  # of the drop, share
    slo: list[dict[str, Any]] = field(default_factory=list)
    speedup: dict[str, Any] = field(default_factory=dict)  # statistic -> interval
    latency_ms: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)  # arm -> metric -> statistic
    active_before: float | None = None
    active_after: float | None = None
    tokens: dict[str, float] = field(default_factory=dict)

    @property
    def drop(self) -> float:
        return self.exact_accuracy - self.chosen_accuracy

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def judge_rung(
    blocks: Sequence[ArmBlock],
    limits: Sequence[tuple[str, str, float]],
    max_drop: float,
    alpha: float,
    max_failures: float,
) -> RungResult:
    """Decide one rung from all its blocks: latency limits first, then the score test at the declared n."""
    pairs = paired_items(blocks)
    p = stats.noninferiority_p(pairs.losses, pairs.gains, pairs.n, max_drop)
    chosen = [b for b in blocks if b.arm == "chosen"]
    exact = [b for b in blocks if b.arm == "exact"]
    verdicts = [v for limit in limits for v in _judge_limit(limit, exact, chosen)]
    failures = sum(b.failures for b in chosen) / max(1, sum(b.requests for b in chosen))
    broken = [v for v in verdicts if v["verdict"] != "pass"]
    if failures > max_failures:
        verdict, reason = "slo", f"{failures:.2%} of requests failed, {max_failures:.2%} allowed"
    elif broken:
        verdict, reason = "slo", broken[0]["text"]
    elif p > alpha:
        drop = (pairs.losses - pairs.gains) / max(pairs.n, 1)
        verdict, reason = "accuracy", f"{-drop * 100:+.2f} points, p = {p:.2g} against {alpha:.2g}"
    else:
        verdict, reason = "passed", f"p = {p:.2g} on {pairs.n:,} items"
    active = [(b.active_before, b.active_after) for b in chosen if b.active_before is not None and b.active_after is not None]
    return RungResult(
        verdict=verdict,
        reason=reason,
        p_value=p,
        alpha=alpha,
        items=pairs.n,
        losses=pairs.losses,
        gains=pairs.gains,
        differ=pairs.differ,
        exact_accuracy=pairs.exact_right / max(pairs.n, 1),
        chosen_accuracy=pairs.chosen_right / max(pairs.n, 1),
        upper_bound=stats.drop_upper_bound(pairs.losses, pairs.gains, pairs.n, 1 - alpha) if pairs.n else 1.0,
        slo=verdicts,
        speedup={name: _speedup(exact, chosen, name) for name in ("mean", "p50", "p90", "p95", "p99")},
        latency_ms={
            arm: {m: {n: statistic(_joined(some, m), n) for n in ("mean", "p50", "p90", "p95", "p99")} for m in METRICS}
            for arm, some in (("exact", exact), ("chosen", chosen))
        },
        active_before=float(np.mean([a[0] for a in active])) if active else None,
        active_after=float(np.mean([a[1] for a in active])) if active else None,
        tokens={
            arm: float(np.mean([b.tokens for b in some])) if some else 0.0 for arm, some in (("exact", exact), ("chosen", chosen))
        },
    )


def paired_items(blocks: Sequence[ArmBlock]) -> Pairs:
    """Counts over distinct items, blocks in the order of pairs: a repeated item is no new evidence."""
    arms: dict[str, dict[str, Answer]] = {"exact": {}, "chosen": {}}
    for block in sorted(blocks, key=lambda b: (b.pair, b.level)):
        for item, answer in block.answers.items():
            arms[block.arm].setdefault(item, answer)
    return pair(arms["exact"], arms["chosen"])


def _joined(blocks: Sequence[ArmBlock], metric: str) -> NDArray[np.float64]:
    return np.concatenate([b.latency_ms[metric] for b in blocks]) if blocks else np.array([])


def _judge_limit(limit: tuple[str, str, float], exact: Sequence[ArmBlock], chosen: Sequence[ArmBlock]) -> list[dict[str, Any]]:
    """One verdict per load level."""
    metric, name, bound = limit
    found = []
    for level in sorted({b.level for b in chosen}):
        mine = [b.latency_ms[metric] for b in chosen if b.level == level]
        theirs = [b.latency_ms[metric] for b in exact if b.level == level]
        samples = np.concatenate(mine)
        measured = statistic(samples, name)
        if name == "mean":
            low, high = stats.mean_upper_bound([float(x.mean()) for x in mine if len(x)])
            verdict = "pass" if high <= bound else "fail" if low > bound else "undecided"
            detail = f"mean at most {high:.1f} ms at 95 %"
            extra: dict[str, Any] = {}
        else:
            quantile = float(name[1:])
            deff = max(_tail_effect(mine, quantile), _tail_effect(theirs, quantile))
            share = stats.judge_share(int((samples > bound).sum()), len(samples), 1 - quantile / 100, deff)
            verdict = share.verdict
            if verdict == "undecided" and share.over_share == 0 and _far_below(mine, quantile, bound):
                verdict = "pass"
            detail = (
                f"{share.over_share:.1%} of {share.requests:,} requests over it, between {share.low:.1%} and {share.high:.1%} "
                f"at 95 %, {share.allowed:.0%} allowed"
            )
            extra = {"overShare": share.over_share, "low": share.low, "high": share.high, "designEffect": deff}
        words = {"pass": "within", "fail": "above", "undecided": "not shown to be within"}[verdict]
        text = f"{metric.upper()} {name} {measured:.1f} ms {words} the limit of {bound:g} ms ({detail})"
        found.append({"metric": metric, "statistic": name, "limit": bound, "level": level, "measured": measured,
                      "exact": statistic(np.concatenate(theirs), name) if theirs else float("nan"),
                      "verdict": verdict, "text": text, **extra})  # fmt: skip
    return found


def _far_below(blocks: Sequence[NDArray[np.float64]], quantile: float, bound: float) -> bool:
    """Whether the blocks' own percentiles stay below the limit with 99 % confidence (batch means on the log scale).

    Only asked where not one request was over the limit: the share test cannot tell 10 ms from 999 ms under a limit of
    1,000 ms, and would call both undecided on a few hundred correlated requests.
    """
    logs = [float(np.log(np.percentile(b, quantile))) for b in blocks if len(b) >= 20]
    return len(logs) >= 3 and stats.mean_upper_bound(logs, 0.99)[1] <= np.log(bound)


def _tail_effect(blocks: Sequence[NDArray[np.float64]], quantile: float) -> float:
    """Design effect of the share of requests above the arm's own quantile."""
    kept = [b for b in blocks if len(b)]
    if not kept:
        return 1.0
    edge = np.percentile(np.concatenate(kept), quantile)
    return stats.design_effect([(b > edge).astype(float) for b in kept])


def _speedup(exact: Sequence[ArmBlock], chosen: Sequence[ArmBlock], name: str) -> dict[str, Any]:
    """exact / chosen TPOT with its interval from paired blocks, levels averaged within a pair (on the log scale)."""

    def by_pair(blocks: Sequence[ArmBlock]) -> Mapping[int, float]:
        logs: dict[int, list[float]] = {}
        for b in blocks:
            value = statistic(b.latency_ms["tpot"], name)
            if value > 0:
                logs.setdefault(b.pair, []).append(float(np.log(value)))
        return {index: float(np.exp(np.mean(found))) for index, found in logs.items()}

    first, second = by_pair(exact), by_pair(chosen)
    both = sorted(first.keys() & second.keys())
    if not both:
        return {}
    interval = stats.ratio_interval([first[i] for i in both], [second[i] for i in both])
    return asdict(interval)


def walk(verdicts: Sequence[str]) -> tuple[int | None, bool]:
    """(chosen rung or None, whether the ladder has ended) after these verdicts, safe to fast."""
    chosen = None
    for index, verdict in enumerate(verdicts):
        if verdict == "passed":
            chosen = index
        elif verdict == "accuracy":
            return chosen, True
    return chosen, False
