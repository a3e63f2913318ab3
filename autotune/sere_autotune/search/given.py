"""A given policy in place of a search: exact routing and the policy once on search items, for pace and for its chance."""

from __future__ import annotations

import dataclasses

from sere_autotune.search.blocks import measure, trial_items
from sere_autotune.search.rank import rank
from sere_autotune.search.sizing import certificate_size
from sere_autotune.study.run import Run
from sere_autotune.study.schema import LADDER, PACE, Candidate
from sere_autotune.trial.measures import objective
from sere_autotune.trial.stats import power
from sere_ext.contract.policy import Policy


def given_ladder(run: Run, policy: Policy) -> list[Candidate]:
    """A ladder of the given policy alone, measured once and kept.

    Raises:
        BudgetExhaustedError: a budget ran out before both were measured.
        SereError: the engine keeps failing.
    """
    frozen = run.study.get(LADDER)
    if frozen is not None:
        return frozen
    run.similarity_digest = policy.similarity_digest or run.similarity_digest
    search = run.spec.search
    rank(dataclasses.replace(run, spec=run.spec.model_copy(update={"search": search.model_copy(update={"trials": 1})})))
    items = trial_items(run, 1)
    levels = measure(run, policy, items, number=1, seconds=search.trial_seconds, reject=False)
    exact = run.study.levels(run.study.complete()[0])
    n = max(1, sum(level.items for level in levels))
    d = (sum(level.losses + level.gains for level in levels) + 0.5) / n
    drop = max(0.0, sum(level.losses - level.gains for level in levels) / n)
    speed = objective(exact) / objective(levels, [level.latency_ms["tpot"]["p50"] for level in exact])
    pace = run.study.get(PACE)
    assert pace is not None
    size, per_block = certificate_size(
        run.spec, pace, run.traffic.labelled_share, run.cert_items, discordance=d, drop=drop, speedup=speed, alpha=run.alpha,
        left_s=run.left_s(), candidates=1,
    )  # fmt: skip
    chance = power(size, d, drop, run.max_drop, run.alpha)
    # One small measurement says little of the drop: the certificate decides, so the policy is never refused from this.
    ladder = [
        Candidate(
            policy.to_json_dict(),
            policy.describe(),
            min(drop, run.max_drop / 2),
            d,
            speed,
            max(chance, 0.5),
            size,
            per_block,
        )
    ]
    run.study.put(LADDER, ladder)
    return ladder
