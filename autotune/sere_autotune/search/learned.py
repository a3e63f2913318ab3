"""What the trials so far teach: the noise floor, the next proposal, and the ladder that is frozen at the end. No engine."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from sere_autotune.search.kinds import removed_kinds
from sere_autotune.search.ladder import FRACTIONS, Pick, pick_ladder
from sere_autotune.search.observations import observations
from sere_autotune.search.posterior import MonotoneModel
from sere_autotune.search.sizing import certificate_size
from sere_autotune.study.run import Run
from sere_autotune.study.schema import LADDER, NOISE, PACE, SEARCH_ENDED, Candidate, NoiseFloor
from sere_autotune.trial import stats
from sere_autotune.tuning.space import EXACT, Space, Table

_REPEATS = 2  # trials that one table may have
_DRAWS = 16  # of the posterior, before a table that was tried often is replaced by a neighbour


def noise_floor(run: Run) -> NoiseFloor:
    """Exact against exact under the search's load, all measurements pooled."""
    first = run.study.get(NOISE) or NoiseFloor(0, 0.0, 0.0)
    levels = [level for trial in run.study.complete() for level in run.study.levels(trial)]
    n = first.items + sum(level.reference_items for level in levels)
    differ = first.differ * first.items + sum(level.reference_differ for level in levels)
    discordant = first.discordant * first.items + sum(level.reference_discordant for level in levels)
    return NoiseFloor(n, differ / max(n, 1), discordant / max(n, 1))


def noise_discordance(run: Run) -> float:
    """Discordant share of exact against exact; never quite zero, since it is estimated from a limited number of items."""
    noise = noise_floor(run)
    return float((noise.discordant * noise.items + 0.5) / (noise.items + 100))


def fitted_model(run: Run, space: Space, seed: int) -> MonotoneModel:
    """The model of all trials so far, over the choices whose kind the search has not given up."""
    gone = removed_kinds(run.study.complete())
    choices = [choice for choice in space.choices() if choice.kind not in gone]
    model = MonotoneModel(choices, len(space.edges), space.top_k, noise_discordance(run))
    model.fit([seen for seen in observations(run.study, space) if seen.choice.kind not in gone], seed)
    return model


def propose(run: Run, space: Space, seed: int) -> Table:
    """The next table: Thompson sampling near the budget shares that the ladder will ask for.

    A trial is cheap and blurred, so a table may come twice; a third time teaches less than a table not tried yet.
    """
    rng = np.random.default_rng(seed)
    model = fitted_model(run, space, seed)
    tried = Counter(space.table(trial.params) for trial in run.study.complete())
    for _ in range(_DRAWS):
        table = model.sample_table(run.max_drop * float(rng.choice(FRACTIONS[3])), rng)
        if table == space.exact():  # nothing is safe enough in this draw: learn from what costs least
            cheapest = [int(np.argmin(model.drop(b).mean(axis=0)[1:])) + 1 for b in range(model.buckets)]
            table = tuple(model.choices[i] for i in cheapest)
        if tried[table] < _REPEATS:
            return table
    near = [
        (float(model.drop(b).mean(axis=0)[i]), (*table[:b], choice, *table[b + 1 :]))
        for b in range(model.buckets)
        for i, choice in enumerate(model.choices)
        if i
    ]
    fresh = [(drop, other) for drop, other in near if tried[other] < _REPEATS]
    return min(fresh, key=lambda pair: pair[0])[1] if fresh else table


def freeze_ladder(run: Run) -> list[Candidate]:
    """The ladder, picked once and kept; empty where no policy is predicted to hold the limits and to gain."""
    frozen = run.study.get(LADDER)
    if frozen is not None:
        return frozen
    space = run.space()
    model = fitted_model(run, space, run.spec.search.seed)
    noise = noise_discordance(run)
    allowed = _allowed(run, space, model)
    picks = pick_ladder(model, run.max_drop, run.spec.search.rungs, noise, allowed, items=run.cert_items, alpha=run.alpha)
    ladder = [_candidate(run, space, model, fraction, pick, len(picks)) for fraction, pick in picks]
    if ladder or not run.study.get(SEARCH_ENDED):  # a search cut short may go on with a raised budget
        run.study.put(LADDER, ladder)
    return ladder


def _candidate(run: Run, space: Space, model: MonotoneModel, fraction: float, pick: Pick, candidates: int) -> Candidate:
    policy = space.policy(pick.table)
    index = [model.choices.index(choice) for choice in pick.table]
    drops = np.mean([model.drop(b)[:, i] for b, i in enumerate(index)], axis=0)
    excess = np.mean([model.excess(b)[:, i] for b, i in enumerate(index)], axis=0)
    pace = run.study.get(PACE)
    assert pace is not None
    items, per_block = certificate_size(
        run.spec, pace, run.traffic.labelled_share, run.cert_items, discordance=pick.discordance, drop=pick.drop,
        speedup=pick.speedup, alpha=run.alpha, left_s=run.left_s(), candidates=candidates,
    )  # fmt: skip
    some = np.linspace(0, len(drops) - 1, 24).astype(int)
    chance = [
        stats.power(items, noise_discordance(run) + float(excess[i]), float(drops[i]), run.max_drop, run.alpha) for i in some
    ]
    return Candidate(
        policy=policy.to_json_dict(), describe=policy.describe(), fraction=fraction, drop=pick.drop,
        discordance=pick.discordance, speedup=pick.speedup, power=float(np.mean(chance)), items=items, per_block=per_block,
    )  # fmt: skip


def _allowed(run: Run, space: Space, model: MonotoneModel) -> Any:
    """[buckets, choices]: False where TPOT is predicted over its limit, or a trial broke another latency limit."""
    study, choices = run.study, model.choices
    allowed = np.ones((model.buckets, len(choices)), bool)
    complete = study.complete()
    exact = study.levels(next(t for t in complete if space.table(t.params) == space.exact()))
    for metric, name, limit in run.spec.slo.limits():
        if metric == "tpot":
            for b in range(model.buckets):
                predicted = exact[b].latency_ms["tpot"][name] / np.exp(model.log_speed(b).mean(axis=0))
                allowed[b] &= predicted <= limit
    for trial in complete:
        broken = [k for k, by in trial.constraints.items() if by > 0 and k != "accuracy" and not k.startswith("tpot.")]
        if broken or trial.user_attrs.get("crash"):
            for b, choice in enumerate(space.table(trial.params)):
                if choice != EXACT and choice in choices:
                    allowed[b, choices.index(choice)] = False
    return allowed
