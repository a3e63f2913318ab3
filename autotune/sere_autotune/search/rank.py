"""The ranking stage: trials on the warm engine until a budget ends. Search ranks, nothing more.

Exact routing comes first, then a few settings that evidence suggests, then what Optuna's sampler draws. In the last third of the
trials, candidates that the ladder would have now come before the sampler's until each was measured twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from sere_autotune.search.baseline import check_baseline
from sere_autotune.search.blocks import measure, trial_items, window
from sere_autotune.search.groundwork import lay_groundwork
from sere_autotune.search.kinds import removed_kinds
from sere_autotune.search.learned import finalist, slots
from sere_autotune.search.pacing import longest_trial_seconds, reserve_s, time_left_s
from sere_autotune.study.run import Run
from sere_autotune.study.schema import LADDER, SEARCH_ENDED
from sere_autotune.study.study import TuningStudy
from sere_autotune.trial.measures import LevelResult, check_exact, constraints, objective
from sere_autotune.tuning.space import Space, Table
from sere_ext.contract.errors import (
    BudgetExhaustedError,
    CannotCertifyError,
    EngineCrashError,
    PolicyError,
    SereError,
    UnsupportedError,
)
from sere_ext.contract.policy import EXACT_POLICY, Kind

_CRASH_FACTOR = 10.0  # a crashed trial's objective, times exact routing's: finite, so that samplers learn from it


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
    if study.complete() and study.get(LADDER) is None:
        lay_groundwork(run)  # what a run that was killed there left to do
    skipped = False  # the last proposal
    while (done := len(study.complete())) < search.trials and study.get(LADDER) is None:
        if done and run.left_s() < reserve_s(run) + longest_trial_seconds(run):
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
        if not study.waiting() and (candidate := finalist(run, space)) is not None:
            study.enqueue(space, candidate)
        trial, table = study.ask(space, "random" if skipped else search.sampler, search.seed)
        skipped = any(choice.kind in gone for choice in table) or (done > 0 and table == space.exact())
        if skipped:  # no sampler knows what was given up or that exact routing was measured, and TPE would insist on it
            study.skip(trial)
            continue
        _evaluate(run, trial, table)
        if not done:
            _check_baseline(run)
            lay_groundwork(run)
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
        before = removed_kinds(study.complete())
        crash: dict[str, Any] = {
            "policy": policy.to_json_dict(),
            "describe": policy.describe(),
            "crash": str(error),
            "refused": not isinstance(error, EngineCrashError),  # a kind that this model's router cannot have
        }
        study.tell(trial, _useless(study), dict.fromkeys(keys, 1.0), crash)
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
    value = objective(levels, base)
    # Without a time per token there is no objective, and Optuna would not count the trial: the search would never end.
    study.tell(trial, _useless(study) if math.isnan(value) else value, violations, record)
    run.report.trial(_row(trial.number, space, table, levels, violations, base))


def _useless(study: TuningStudy) -> float:
    """The objective of a trial that has none, in milliseconds: that of the slowest so far, many times over."""
    return max((trial.value or 0.0 for trial in study.complete()), default=1e3) * _CRASH_FACTOR


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
