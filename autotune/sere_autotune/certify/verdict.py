"""From a candidate's blocks to a verdict, and from verdicts to the chosen candidate. Pure.

Facts page "statistics", section Selection: a candidate that breaks a latency limit is skipped (the safe ones are the slow
ones), the first that fails the accuracy test ends the ladder (a fixed sequence needs no correction).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sere_autotune.certify import latency
from sere_autotune.study.schema import MeasuredBlock, Verdict
from sere_autotune.trial import stats
from sere_autotune.trial.measures import STATISTICS, Answer, Pairs, pair


def judge(
    blocks: Sequence[MeasuredBlock],
    limits: Sequence[tuple[str, str, float]],
    max_drop: float,
    alpha: float,
    max_failures: float,
) -> Verdict:
    """Decide on one candidate from all its blocks: latency limits first, then the score test at the declared n."""
    pairs = paired_items(blocks)
    p = stats.noninferiority_p(pairs.losses, pairs.gains, pairs.n, max_drop)
    chosen = [b for b in blocks if b.routing == "chosen"]
    exact = [b for b in blocks if b.routing == "exact"]
    verdicts = [v for limit in limits for v in latency.judge_limit(limit, exact, chosen)]
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
    return Verdict(
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
        speedup={name: ratio for name in STATISTICS if (ratio := latency.speedup(exact, chosen, name)) is not None},
        latency_ms={"exact": latency.table(exact), "chosen": latency.table(chosen)},
        active_before=float(np.mean([a[0] for a in active])) if active else None,
        active_after=float(np.mean([a[1] for a in active])) if active else None,
        tokens={
            routing: float(np.mean([b.tokens for b in some])) if some else 0.0
            for routing, some in (("exact", exact), ("chosen", chosen))
        },
    )


def paired_items(blocks: Sequence[MeasuredBlock]) -> Pairs:
    """Counts over distinct items, blocks in the order of pairs: a repeated item is no new evidence."""
    answers: dict[str, dict[str, Answer]] = {"exact": {}, "chosen": {}}
    for block in sorted(blocks, key=lambda b: (b.pair, b.level)):
        for item, right, said in zip(block.items, block.right, block.said, strict=True):
            answers[block.routing].setdefault(item, Answer(right == "1", said))
    return pair(answers["exact"], answers["chosen"])


def walk(verdicts: Sequence[str]) -> tuple[int | None, bool]:
    """(index of the chosen candidate or None, whether the ladder has ended) after these verdicts, safe to fast."""
    chosen = None
    for index, verdict in enumerate(verdicts):
        if verdict == "passed":
            chosen = index
        elif verdict == "accuracy":
            return chosen, True
    return chosen, False
