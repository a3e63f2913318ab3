"""Blocks of one policy on a trial's items, at every load level."""

from __future__ import annotations

from collections.abc import Sequence

from sere_autotune.study.run import Run
from sere_autotune.study.schema import PACE
from sere_autotune.trial.engine import BlockReport, Reject
from sere_autotune.trial.items import Item
from sere_autotune.trial.load import Load, Request
from sere_autotune.trial.measures import LevelResult, answers, summarise
from sere_ext.contract.errors import EngineCrashError
from sere_ext.contract.policy import EXACT_POLICY, Policy


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


def measure(
    run: Run, policy: Policy, items: Sequence[Item], *, number: int, seconds: float, reject: bool, reference: bool = True
) -> list[LevelResult]:
    """One policy at every load level on the given items; stops at the first level that rejects it.

    Args:
        number: of the trial; the arrival of requests is seeded by it.
        seconds: longest block.
        reject: end a block early whose policy is worse than the limit allows.
        reference: measure exact routing right after a policy, on a part of the items.

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
        report = block(run, policy, requests, load, run.traffic.requests(items[: max(level * 2, 8)]), seconds, against)
        result = summarise(index, report.block, exact, run.traffic.timed)
        result.active_before, result.active_after = report.active_before, report.active_after
        result.step_tokens = report.step_tokens
        found.append(result)
        if policy == EXACT_POLICY and not exact:
            run.study.put_exact_answers(index, answers(report.block.sent))
        if result.stopped and result.stopped.startswith("accuracy"):
            return found
    if reference and policy != EXACT_POLICY:
        _reference(run, found, items, number, seconds)
    return found


def block(
    run: Run, policy: Policy, requests: Sequence[Request], load: Load, fillers: Sequence[Request], seconds: float,
    against: Reject | None,
) -> BlockReport:  # fmt: skip
    """One block under `policy`; once more, on a new engine, where the engine dies of it or hangs.

    Raises:
        EngineCrashError: the engine died of it twice.
    """
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
