"""The ranking stage: trials on the warm engine until a budget ends. Search ranks, nothing more."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from sere_autotune import planner
from sere_autotune.search.baseline import check_baseline
from sere_autotune.search.kinds import removed_kinds
from sere_autotune.search.learned import count_choices, propose, slots
from sere_autotune.search.sampler import make_sampler
from sere_autotune.study.run import Run
from sere_autotune.study.schema import EDGES, LADDER, NOISE, PACE, SEARCH_ENDED, NoiseFloor, Pace
from sere_autotune.trial.engine import BlockReport, Reject
from sere_autotune.trial.items import Item
from sere_autotune.trial.load import Load, Request
from sere_autotune.trial.measures import LevelResult, answers, check_exact, constraints, objective, summarise
from sere_autotune.tuning.space import Space, Table, auto_buckets
from sere_ext.contract.errors import (
    BudgetExhaustedError,
    CannotCertifyError,
    EngineCrashError,
    PolicyError,
    SereError,
    UnsupportedError,
)
from sere_ext.contract.policy import EXACT_POLICY, Kind, Policy

_CRASH_FACTOR = 10.0  # a crashed trial's objective, times exact routing's: finite, so that samplers learn from it


def window(items: Sequence[Item], number: int, size: int, step: int | None = None) -> list[Item]:
    """The `size` items of a trial: the window moves on by `step` with each trial, else by its size, and wraps around."""
    size = min(size, len(items))
    start = number * (step or size) % len(items)
    return [items[(start + i) % len(items)] for i in range(size)]


def trial_items(run: Run, number: int) -> list[Item]:
    """The items of a trial: only those that exact routing answered at every load level, so that each has its partner.

    On a slow engine a trial's time ends before its items do; the window then moves on by what a trial can answer.
    """
    size = run.spec.search.items_per_trial
    answered: set[str] | None = None
    for level in range(len(run.spec.workload.load.levels)):
        found = set(run.study.exact_answers(level))
        answered = found if answered is None else answered & found
    items = [item for item in run.search if item.digest in (answered or set())]
    pace = run.study.get(PACE)
    paced = max(1, round((pace.rate_per_s if pace else size) * run.spec.search.trial_seconds * run.traffic.labelled_share))
    return window(items or run.search, number, size, min(size, paced))


def measure(run: Run, policy: Policy, items: Sequence[Item], *, number: int, seconds: float, reject: bool) -> list[LevelResult]:
    """One policy at every load level on the given items; stops at the first level that rejects it.

    Raises:
        EngineCrashError: the engine died under it twice.
    """
    found = []
    for index, level in enumerate(run.spec.workload.load.levels):
        exact = run.study.exact_answers(index)
        known = run.study.get(PACE)
        load = run.load(level, 2, known.residence_s if known else 0.3, seed=run.spec.workload.seed + 31 * number + index)
        requests = run.traffic.requests(items, offset=number * len(items))
        against = Reject(run.max_drop, 0.05, exact) if reject and exact else None
        report = _block(run, policy, requests, load, run.traffic.requests(items[: max(level * 2, 8)]), seconds, against)
        result = summarise(index, report.block, exact, run.traffic.timed)
        result.active_before, result.active_after = report.active_before, report.active_after
        result.step_tokens = report.step_tokens
        found.append(result)
        if policy == EXACT_POLICY and not exact:
            run.study.put_exact_answers(index, answers(report.block.sent))
        if result.stopped and result.stopped.startswith("accuracy"):
            return found
    if policy != EXACT_POLICY:
        _reference(run, found, items, number, seconds)
    return found


def _block(
    run: Run, policy: Policy, requests: Sequence[Request], load: Load, fillers: Sequence[Request], seconds: float,
    against: Reject | None,
) -> BlockReport:  # fmt: skip
    """One block under `policy`; once more, on a new engine, where the engine dies of it or hangs."""
    pace = run.study.get(PACE)
    for repeated in (False, True):
        limit = min(seconds, max(1.0, run.left_s()))  # the budget cuts a trial too
        try:
            run.engine.apply(policy)
            return run.engine.block(
                requests, load, fillers, limit, against, expected_s=limit + 3 * pace.residence_s if pace else None
            )
        except EngineCrashError:
            if repeated:
                raise
    raise AssertionError


def _reference(run: Run, found: Sequence[LevelResult], items: Sequence[Item], number: int, seconds: float) -> None:
    """Exact routing right after a trial, on a quarter of its items: what the machine's drift is, and more noise floor."""
    some = items[: max(len(items) // 4, 16)]
    again = measure(run, EXACT_POLICY, some, number=number, seconds=max(1.0, seconds / 3), reject=False)
    for level, exact in zip(found, again, strict=False):
        if exact.requests:
            level.reference_tpot_ms = exact.latency_ms["tpot"]["p50"]  # a short block's mean is at the mercy of one stall
            level.reference_items, level.reference_differ = exact.items, exact.differ
            level.reference_discordant = exact.losses + exact.gains


def rank(run: Run) -> None:
    """Run trials until the trials or the budget are used up; what certification needs is kept back."""
    study, search = run.study, run.spec.search
    study.heal()
    study.put(SEARCH_ENDED, "")
    study.enqueue_first(run.space(), search.trials)
    if study.complete():
        _check_baseline(run)
    run.report.stage("search", search.trials, len(study.complete()))
    for old in study.complete():
        space = run.space()
        base = study.exact_tpot_ms(space)
        run.report.trial(_row(old.number, space, space.table(old.params), study.levels(old), old.constraints, base))
    while (done := len(study.complete())) < search.trials and study.get(LADDER) is None:
        if done and run.left_s() < reserve_s(run) + _trial_seconds(run):
            study.put(
                SEARCH_ENDED, f"{run.budget.which(time.monotonic())} after {done} trials, the rest is kept for certification"
            )
            break
        if not done and run.left_s() < 10:
            raise BudgetExhaustedError(f"{run.budget.which(time.monotonic())} ran out before the first trial; raise it")
        gone = removed_kinds(study.complete())
        if done and gone.keys() >= set(search.policies):
            _check_alive(run, gone)
            break
        space = run.space()
        trial, table = study.ask(space, lambda number, space=space: make_sampler(  # type: ignore[misc]
            search.sampler, space, lambda seed: propose(run, space, seed), search.seed, number))  # fmt: skip
        if any(choice.kind in gone for choice in table):
            study.skip(trial)  # planned before, or by a sampler that knows nothing of it
            continue
        _evaluate(run, trial, table)
        if not done:
            _check_baseline(run)
            _after_exact(run)
        study.note_spent(run.budget)


def _check_alive(run: Run, gone: dict[Kind, str]) -> None:
    """Tell an engine that no kind of policy works on from one that is broken.

    Raises:
        SereError: it fails under exact routing too.
    """
    try:
        items = window(run.search, 0, 16)
        measure(run, EXACT_POLICY, items, number=0, seconds=run.spec.search.trial_seconds, reject=False)
    except EngineCrashError as error:
        causes = "; ".join(f"{kind.value}: {why}" for kind, why in gone.items())
        raise SereError(
            f"the engine keeps failing, under exact routing too ({error}; {causes}); see its log with SERE_ENGINE_LOGS=1"
        ) from error


def _evaluate(run: Run, trial: Any, table: Table) -> None:
    """Measure one trial and tell it.

    Raises:
        BudgetExhaustedError: a budget ran out before anything was answered.
        SereError: the engine fails under exact routing.
    """
    space, search, study = run.space(), run.spec.search, run.study
    policy = space.policy(table)
    exact = policy == EXACT_POLICY
    run.report.step(f"trial {trial.number}: {policy.describe()}", time_left_s(run))
    # Exact routing answers every search item, so that later windows find their partner.
    items = list(run.search) if exact and not study.exact_answers(0) else trial_items(run, trial.number)
    seconds = search.trial_seconds * max(1.0, len(items) / search.items_per_trial)
    limits = run.spec.slo.limits()
    began = time.monotonic()
    try:
        levels = measure(run, policy, items, number=trial.number, seconds=seconds, reject=not exact)
    except (EngineCrashError, UnsupportedError, PolicyError) as error:
        if exact:
            raise SereError(f"the engine keeps failing ({error}); see its log with SERE_ENGINE_LOGS=1") from error
        keys = [f"{metric}.{name}" for metric, name, _ in limits] + ["accuracy", "failures"]
        worst = max((t.value or 0.0 for t in study.complete()), default=1e3)
        before = removed_kinds(study.complete())
        crash: dict[str, Any] = {
            "policy": policy.to_json_dict(),
            "describe": policy.describe(),
            "crash": str(error),
            "refused": not isinstance(error, EngineCrashError),  # a kind that this model's router cannot have
        }
        study.tell(trial, worst * _CRASH_FACTOR, dict.fromkeys(keys, 1.0), crash)
        run.report.trial({"number": trial.number, "policy": policy.describe(), "crash": str(error)})
        for kind in removed_kinds(study.complete()).keys() - before.keys():
            run.report.step(f"kind {kind.value} is left out from here: {error}", 0.0)
        return
    if not any(level.requests for level in levels):
        raise BudgetExhaustedError(f"{run.budget.which(time.monotonic())} ran out in the middle of a trial; raise it")
    if exact:
        check_exact(levels)
    base = study.exact_tpot_ms(space)
    violations = constraints(levels, limits, run.max_drop, run.spec.slo.max_failure_share, base, is_exact=exact)
    record: dict[str, Any] = {
        "policy": policy.to_json_dict(),
        "describe": policy.describe(),
        "digest": policy.digest,
        "levels": [level.to_dict() for level in levels],
        "slots": slots(run, space, table),
        "seconds": time.monotonic() - began,
    }
    study.tell(trial, objective(levels, base), violations, record)
    run.report.trial(_row(trial.number, space, table, levels, violations, base))


def _row(
    number: int, space: Space, table: Table, levels: Sequence[LevelResult], violations: dict[str, float], base: Sequence[float]
) -> dict[str, Any]:
    items = sum(level.items for level in levels)
    return {
        "number": number,
        "policy": space.policy(table).describe(),
        "exact": table == space.exact(),
        "tpotMs": objective(levels, base) if levels else float("nan"),
        "accuracy": float(np.mean([level.accuracy for level in levels])) if levels else float("nan"),
        "dropPoints": 100 * sum(level.losses - level.gains for level in levels) / items if items else 0.0,
        "items": items,
        "active": levels[0].active_after if levels else None,
        "broken": [key for key, by in violations.items() if by > 0],
        "stopped": next((level.stopped for level in levels if level.stopped), None),
        "error": next((level.first_error for level in levels if level.first_error), None),
    }


def _check_baseline(run: Run) -> None:
    """Refuse before anything is searched where exact routing answers too badly for a limit to mean something.

    Raises:
        CannotCertifyError: it does, and the run is not one that goes on without a certificate.
    """
    for level in range(len(run.spec.workload.load.levels)):
        try:
            warning = check_baseline(run.study.exact_answers(level), run.search, run.max_drop)
        except CannotCertifyError as error:
            if not run.advisory:
                raise
            warning = str(error)
        if warning:
            run.report.step(f"warning: {warning}", 0.0)


def _after_exact(run: Run) -> None:
    """What the first trial teaches: pace, bucket edges from the sizes of its steps, and how far exact differs from exact."""
    study = run.study
    first = study.levels(study.complete()[0])
    if study.get(PACE) is None:
        study.put(PACE, Pace(first[0].rate, first[0].residence_s, run.engine.start_seconds))
    levels = run.spec.workload.load.levels
    if study.get(EDGES) is None:
        sizes = [level.step_tokens for level in first]
        edges = run.spec.search.buckets or auto_buckets(levels, [level.batch for level in first], sizes)
        study.put(EDGES, list(edges))
    if study.get(NOISE) is None:
        run.report.step("noise floor: exact against exact", time_left_s(run))
        items = trial_items(run, 0)
        run.engine.record()
        again = measure(run, EXACT_POLICY, items, number=0, seconds=run.spec.search.trial_seconds, reject=False)
        count_choices(run, run.space())  # before a restart loses what was recorded
        n = sum(level.items for level in again)
        differ = sum(level.differ for level in again) / max(n, 1)
        discordant = sum(level.losses + level.gains for level in again) / max(n, 1)
        study.put(NOISE, NoiseFloor(n, differ, discordant))


def reserve_s(run: Run) -> float:
    """Seconds that certifying the ladder will take; the first candidate alone where the budget is small."""
    pace = run.study.get(PACE)
    one = planner.candidate_seconds(run.spec, pace, len(run.spec.workload.load.levels)) * 1.15 + 5
    every = one * run.spec.search.rungs
    total = run.spec.search.device_hours * 3600 / run.budget.devices
    return every if every < total / 2 else one


def _trial_seconds(run: Run) -> float:
    times = [t.user_attrs["seconds"] for t in run.study.complete() if "seconds" in t.user_attrs]
    return float(max(times[1:] or times or [run.spec.search.trial_seconds]))


def time_left_s(run: Run) -> float:
    """Estimate for the live table: trials to come and certification."""
    trials = max(0, run.spec.search.trials - len(run.study.complete()))
    levels = len(run.spec.workload.load.levels)
    pace = run.study.get(PACE)
    certificates = run.spec.search.rungs * planner.candidate_seconds(run.spec, pace, levels, run.cert_items)
    return max(0.0, min(trials * _trial_seconds(run) + certificates, run.left_s()))
