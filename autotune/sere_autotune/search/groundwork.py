"""What is measured right after exact routing's trial, once in a study: pace, batch sizes, order of the layers, noise floor."""

from __future__ import annotations

from dataclasses import replace

from sere_autotune import planner
from sere_autotune.search.blocks import measure, trial_items
from sere_autotune.search.layer_order import Seen, describe, first_of, order_of, quarters, tells_nothing
from sere_autotune.search.learned import count_choices
from sere_autotune.search.open_loop import least_size
from sere_autotune.search.pacing import reserve_s, time_left_s
from sere_autotune.study.run import Run
from sere_autotune.study.schema import CEILING, EDGES, LAYER_ORDER, NOISE, PACE, NoiseFloor, Pace
from sere_autotune.tuning.space import S_STEPS, Choice, Space, auto_buckets
from sere_ext.contract.errors import EngineCrashError, PolicyError, UnsupportedError
from sere_ext.contract.policy import EXACT_POLICY, Kind

_LEAST_ITEMS = 16  # of the measurement of one quarter of the layers


def lay_groundwork(run: Run) -> None:
    """Measure what the study has not got yet; a run that was killed here goes on with the part that it was at.

    Raises:
        EngineCrashError: the engine died twice under exact routing.
    """
    study = run.study
    first = study.levels(study.complete()[0])
    if study.get(PACE) is None:
        study.put(PACE, Pace(first[0].rate, first[0].residence_s, run.engine.start_seconds))
    levels = run.spec.workload.load.levels
    if study.get(EDGES) is None:
        sizes = [level.step_tokens for level in first]
        least = 1.0 if all(levels) else least_size(study.get(CEILING))
        edges = run.spec.search.buckets or auto_buckets(levels, [level.batch for level in first], sizes, least)
        study.put(EDGES, list(edges))
    if study.get(LAYER_ORDER) is None:
        # Trials of policies hold for the order that they were measured with, so that it is not sought once there are some.
        study.put(LAYER_ORDER, list(_layer_order(run)) if len(study.complete()) == 1 else [])
    if study.get(NOISE) is None:
        run.report.step("exact routing against itself: how often its own answers differ under load", time_left_s(run))
        items = trial_items(run, 0)
        run.engine.apply(EXACT_POLICY)  # which is recorded, and not the last policy that the layers were put in order by
        run.engine.record()
        again = measure(run, EXACT_POLICY, items, number=0, seconds=run.spec.search.trial_seconds, reject=False)
        count_choices(run, run.space())  # before a restart loses what was recorded
        n = sum(level.items for level in again)
        differ = sum(level.differ for level in again) / max(n, 1)
        discordant = sum(level.losses + level.gains for level in again) / max(n, 1)
        study.put(NOISE, NoiseFloor(n, differ, discordant))


def _layer_order(run: Run) -> tuple[int, ...]:
    """The space's order, as short measurements of kind topk show it; () where they show none, or are not worth their time.

    Kind topk needs no similarity, and it loses most, so that it takes the fewest items. docs/policies.md has how far the order is
    the same for every kind.
    """
    space = run.space()
    trials_left = (run.left_s() - reserve_s(run)) / planner.estimated_trial_seconds(run.spec, run.study.get(PACE))
    if space.step == 1 or not planner.seeks_order(run.spec.search) or trials_left < planner.LEAST_TRIALS_TO_ORDER:
        return ()
    try:
        seen = _quarter_by_quarter(run, space, 1)
        if tells_nothing(seen) and space.top_k > 2:
            seen = _quarter_by_quarter(run, space, 2)
    except (EngineCrashError, UnsupportedError, PolicyError) as error:
        run.report.step(f"the larger S goes first to the first layers: no other order could be measured ({error})", 0.0)
        return ()
    run.report.step(describe(seen, space.layers), 0.0)
    return order_of(seen, len(space.layers))


def _quarter_by_quarter(run: Run, space: Space, S: int) -> list[Seen]:
    """S experts in all layers, and S + 1 in one quarter of them after another, on the same part of a trial's items."""
    run.report.step(f"order of the layers: topk {S}, and topk {S + 1} in one quarter of them after another", time_left_s(run))
    items = trial_items(run, 0)
    some = items[: max(len(items) // S_STEPS, _LEAST_ITEMS)]
    seconds = max(1.0, run.spec.search.trial_seconds * len(some) / len(items))
    layers = len(space.layers)
    seen: list[Seen] = []
    for quarter in quarters(layers):
        choice = Choice(Kind.TOPK, S + len(quarter) / layers)
        policy = replace(space, order=first_of(quarter, layers)).policy((choice,) * len(space.edges))
        levels = measure(run, policy, some, number=0, seconds=seconds, reject=False, reference=False)
        counts = [(level.items, level.differ, level.losses) for level in levels]
        seen.append(Seen(*(sum(column) for column in zip(*counts, strict=True))))
    return seen
