"""How long what is left of a run takes, by what its trials have taken so far."""

from __future__ import annotations

from sere_autotune import planner
from sere_autotune.study.run import Run
from sere_autotune.study.schema import PACE


def reserve_s(run: Run) -> float:
    """Seconds that are kept for certifying the ladder: for as many of its candidates as half of the budget pays for, at least one, and for the edges of one."""
    pace = run.study.get(PACE)
    one_s = planner.candidate_seconds(run.spec, pace, len(run.spec.workload.load.levels)) * 1.15 + 5
    candidates = max(1, min(planner.planned_candidates(run.spec, pace), int(planner.budget_seconds(run.spec) / 2 / one_s)))
    return one_s * candidates + planner.edges_seconds(run.spec, pace)


def longest_trial_seconds(run: Run) -> float:
    """The longest of the trials so far but the first, which has exact routing answer every search item; an estimate before the second."""
    times = [t.user_attrs["seconds"] for t in run.study.complete() if "seconds" in t.user_attrs]
    return float(max(times[1:])) if times[1:] else planner.estimated_trial_seconds(run.spec, run.study.get(PACE))


def time_left_s(run: Run) -> float:
    """Estimate for the live table, in seconds: trials to come and certification."""
    trials = max(0, run.spec.search.trials - len(run.study.complete()))
    levels = len(run.spec.workload.load.levels)
    pace = run.study.get(PACE)
    candidates = planner.planned_candidates(run.spec, pace, run.cert_items)
    certificates = candidates * planner.candidate_seconds(run.spec, pace, levels, run.cert_items) + planner.edges_seconds(
        run.spec, pace
    )
    return max(0.0, min(trials * longest_trial_seconds(run) + certificates, run.left_s()))
