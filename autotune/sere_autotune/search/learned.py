"""What the trials so far teach: the noise floor, the candidate of the ladder to measure next, and the ladder that is frozen at the end."""

from __future__ import annotations

from collections import Counter
from dataclasses import astuple
from typing import Any

import numpy as np

from sere_autotune import planner
from sere_autotune.search import replay
from sere_autotune.search.kinds import removed_kinds
from sere_autotune.search.ladder import Pick, pick_ladder
from sere_autotune.search.observations import observations
from sere_autotune.search.open_loop import count_open
from sere_autotune.search.pacing import time_left_s
from sere_autotune.search.posterior import PolicyModel
from sere_autotune.search.replay import Counts
from sere_autotune.search.sizing import certificate_size
from sere_autotune.study.run import Run
from sere_autotune.study.schema import (
    CEILING,
    LADDER,
    NOISE,
    PACE,
    SEARCH_ENDED,
    Candidate,
    CountedChoices,
    NoiseFloor,
    counts_key,
)
from sere_autotune.trial import stats
from sere_autotune.trial.routing import Matrix, Routing
from sere_autotune.tuning.space import EXACT, Space, Table
from sere_autotune.words import screened
from sere_ext.similarity.file import read_similarity

_FINALS = 1 / 3  # of the trials, in which candidates of the ladder come first
FINAL_TRIALS = 2  # that each of them gets


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


def fitted_model(run: Run, space: Space, seed: int) -> PolicyModel:
    """The model of all trials so far, over the choices whose kind the search has not given up."""
    gone = removed_kinds(run.study.complete())
    choices = space.choices()
    kept = [i for i, choice in enumerate(choices) if choice.kind not in gone]
    counts = [Counts(c.active[kept], c.slots[kept], c.moved[kept], c.size[kept]) for c in count_choices(run, space)]
    model = PolicyModel([choices[i] for i in kept], counts, noise_discordance(run))
    model.fit([seen for seen in observations(run.study, space) if seen.choice.kind not in gone], seed)
    return model


def count_choices(run: Run, space: Space) -> list[Counts]:
    """What every choice was counted to do to each bucket's steps: from what the engine recorded, once, and kept in the study.

    Where the load is a rate and the ceiling's law is known, every choice is counted at the size of steps that it will itself have;
    without a law at the size that exact routing's steps had.
    """
    buckets = range(len(space.edges))
    if run.study.get(counts_key(0)) is None:
        recorded = run.engine.recorded()
        exact = run.study.levels(run.study.complete()[0])
        for bucket in buckets:
            typical = exact[bucket].step_tokens or exact[bucket].batch
            routing = (recorded.within(space.edges[bucket], typical) if recorded else None) or _assumed(run, space, bucket)
            ceiling = run.study.get(CEILING)
            shares = ceiling.exact_shares if ceiling and not run.spec.workload.load.levels[bucket] else None
            given = routing, _matrices(run, routing), space.choices(), space.order
            found = replay.count(*given) if shares is None else count_open(*given, shares)
            run.study.put(counts_key(bucket), CountedChoices(*(values.tolist() for values in astuple(found))))
            if bucket == 0 and run.spec.search.trials > 1 and len(found.active) > 1:
                run.report.step(screened(found.active.tolist(), recorded=recorded is not None), time_left_s(run))
    kept = [run.study.get(counts_key(bucket)) for bucket in buckets]
    return [Counts(*map(np.array, astuple(k))) for k in kept if k is not None]


def slots(run: Run, space: Space, table: Table) -> tuple[float, ...]:
    """Slots of a token that a table was counted to have in each bucket's steps; of exact routing also before any were recorded."""
    if table == space.exact():
        return (float(space.top_k),) * len(table)
    order = {choice: i for i, choice in enumerate(space.choices())}
    return tuple(float(counts.slots[order[choice]]) for counts, choice in zip(count_choices(run, space), table, strict=True))


def _assumed(run: Run, space: Space, bucket: int) -> Routing:
    """Calls as published models make them, where the engine cannot record its own or none had the bucket's size."""
    assert run.facts is not None
    edge = space.edges[bucket]
    level = run.spec.workload.load.levels[bucket] or round(run.study.levels(run.study.complete()[0])[bucket].batch)
    experts = run.facts.experts or 8 * run.facts.top_k
    return Routing.assumed(experts, run.facts.top_k, min(max(level, edge.min_tokens), edge.max_tokens))


def _matrices(run: Run, routing: Routing) -> list[Matrix] | None:
    """The similarity of experts in each of the routing's MoE layers; None where the study has no artefact of such experts.

    Assumed calls may have other layers than the model: those take the matrices in turn.
    """
    if run.similarity is None:
        return None
    found = [matrix for _, matrix in sorted(read_similarity(run.similarity).matrices.items())]
    if len(found[0]) != routing.experts:
        return None
    return [found[layer % len(found)] for layer in range(len(routing.calls))]


def finalist(run: Run, space: Space) -> Table | None:
    """Of those that the ladder would have now, the least measured one, until each has FINAL_TRIALS; asked for in the last third of the trials.

    What is certified then rests on what was seen of it, not on the model alone. Every trial of a candidate has items and a pair of
    blocks of its own, and the model takes them together.
    """
    done = run.study.complete()
    if len(done) < run.spec.search.trials * (1 - _FINALS):
        return None
    tried = Counter(space.table(trial.params) for trial in done)
    picks = _picks(run, space, fitted_model(run, space, run.spec.search.seed + len(done)))
    least = min((pick.table for pick in picks), key=lambda table: tried[table], default=None)
    return least if least is not None and tried[least] < FINAL_TRIALS else None


def _picks(run: Run, space: Space, model: PolicyModel) -> list[Pick]:
    """The ladder that the trials teach."""
    candidates = planner.planned_candidates(run.spec, run.study.get(PACE), run.cert_items)
    allowed = _allowed(run, space, model)
    return pick_ladder(model, run.max_drop, candidates, noise_discordance(run), allowed, items=run.cert_items, alpha=run.alpha)


def freeze_ladder(run: Run) -> list[Candidate]:
    """The ladder, picked once and kept; empty where no policy is predicted to hold the limits and to gain."""
    frozen = run.study.get(LADDER)
    if frozen is not None:
        return frozen
    space = run.space()
    model = fitted_model(run, space, run.spec.search.seed)
    picks = _picks(run, space, model)
    ladder = [_candidate(run, space, model, pick, len(picks)) for pick in picks]
    if ladder or not run.study.get(SEARCH_ENDED):  # a search cut short may go on with a raised budget
        run.study.put(LADDER, ladder)
    return ladder


def _candidate(run: Run, space: Space, model: PolicyModel, pick: Pick, candidates: int) -> Candidate:
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
        policy=policy.to_json_dict(), describe=policy.describe(), drop=pick.drop, discordance=pick.discordance,
        speedup=pick.speedup, power=float(np.mean(chance)), items=items, per_block=per_block,
        slots=slots(run, space, pick.table),
    )  # fmt: skip


def _allowed(run: Run, space: Space, model: PolicyModel) -> Any:
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
