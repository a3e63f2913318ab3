"""The deciding stage: each candidate of the frozen ladder against exact routing on held-out items, both run for it.

Exact routing and the candidate alternate in pairs of blocks on one engine (order random, same items and arrivals, drained
between), so that drift cancels. The number of items is declared before the held-out items are opened and kept in the
study; every finished block is kept too, so a killed tuner loses at most the block in flight.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from sere_autotune import planner
from sere_autotune.certify import edges
from sere_autotune.certify.verdict import Rules, judge, walk
from sere_autotune.search.baseline import check_baseline, too_bad
from sere_autotune.study.ledger import Ledger, spent_alpha
from sere_autotune.study.run import Run
from sere_autotune.study.schema import (
    LADDER_ENDED,
    OPENING,
    PACE,
    Candidate,
    MeasuredBlock,
    Opening,
    Verdict,
    block_key,
    verdict_key,
)
from sere_autotune.study.study import study_id
from sere_autotune.trial import stats
from sere_autotune.trial.engine import BlockReport
from sere_autotune.trial.items import Item
from sere_autotune.trial.measures import METRICS, answers, values
from sere_autotune.words import duration
from sere_ext.contract.errors import (
    BudgetExhaustedError,
    CannotCertifyError,
    EngineCrashError,
    PolicyError,
    SereError,
    UnsupportedError,
)
from sere_ext.contract.policy import EXACT_POLICY, Policy

_HOPELESS = 0.05  # probability to certify below which the held-out items are not opened
_ATTEMPTS = 2  # at one block; an engine that dies of a policy twice dies of it always


class _CandidateCrashError(SereError):
    """The engine died or hung in every attempt at a block under a candidate."""


def certify(run: Run, ladder: Sequence[Candidate], ledger: Ledger) -> tuple[int | None, list[Verdict]]:
    """Walk the ladder. Returns the chosen candidate's index, or None, and the verdicts on those that were measured.

    Raises:
        CannotCertifyError: with the differences seen in the search the items cannot certify (they stay unopened).
        BudgetExhaustedError: a budget ran out before any candidate passed.
    """
    study = run.study
    opening = study.get(OPENING)
    if opening is None:
        _check_power(run, ladder)
        earlier = ledger.open([item.digest for item in run.cert[: run.cert_items]], study_id(study.out) or "")
        opening = Opening(earlier, spent_alpha(run.spec.accuracy.alpha, earlier))
        study.put(OPENING, opening)
    rules = Rules(
        limits=run.spec.slo.limits(), max_drop=run.max_drop, alpha=opening.alpha, max_failures=run.spec.slo.max_failure_share,
        candidates=len(ladder), loads=[run.spec.workload.load.condition(level) for level in run.spec.workload.load.levels],
        tasks={item.digest: Path(item.task.file).name for item in run.cert},
    )  # fmt: skip
    verdicts: list[Verdict] = []
    for index, candidate in enumerate(ladder):
        verdict = study.get(verdict_key(index))
        try:
            verdict = verdict or _try_candidate(run, index, candidate, rules, len(ladder) - index - 1)
        except BudgetExhaustedError:
            if walk(verdicts)[0] is None:
                raise
            study.put(LADDER_ENDED, f"{run.budget.which(time.monotonic())} ran out at candidate {index + 1}")
            break
        study.put(verdict_key(index), verdict)
        verdicts.append(verdict)
        run.report.step(f"candidate {index + 1} of {len(ladder)}: {verdict.verdict}, {verdict.reason}", 0.0)
        if walk(verdicts)[1]:
            break
    return edges.without_harm(run, ladder, verdicts), verdicts


def _check_power(run: Run, ladder: Sequence[Candidate]) -> None:
    """Refuse before the held-out items are opened where no candidate has a fair chance with the discordance that the search saw."""
    if run.advisory or not ladder or max(candidate.power for candidate in ladder) >= _HOPELESS:
        return
    best = max(ladder, key=lambda candidate: candidate.power)
    needed = stats.items_needed(best.discordance, best.drop, run.max_drop, run.alpha)
    wanted = f"about {needed:,} items are needed" if needed else "no number of items is enough at this drop"
    raise CannotCertifyError(
        f"the search saw {best.discordance:.1%} of items differ under {best.describe}, with a drop near {best.drop * 100:.2f} "
        f"points: {run.cert_items:,} held-out items certify {run.max_drop * 100:g} points with a chance of {best.power:.0%} only, "
        f"{wanted}. They were left unopened; give more items, widen accuracy.maxDropPoints, or add --advisory"
    )


def block_items(cert: Sequence[Item], candidate: Candidate, pair: int, level: int, levels: int) -> list[Item]:
    """The labelled items of one block: consecutive, wrapping around the declared ones (repeats are not counted again)."""
    start = (pair * levels + level) * candidate.per_block
    return [cert[(start + i) % candidate.items] for i in range(candidate.per_block)]


def _try_candidate(run: Run, index: int, candidate: Candidate, rules: Rules, later: int) -> Verdict:
    """Measure a candidate's blocks that the study does not have yet, and judge them all.

    Args:
        later: candidates after it on the ladder, whose blocks must stay affordable.

    Raises:
        BudgetExhaustedError: a budget cannot pay for all blocks.
        SereError: the engine keeps failing under exact routing.
    """
    pairs, each = run.spec.certify.pairs, 2 * len(run.spec.workload.load.levels)
    more = _blocks_to_measure(run, index, range(pairs, 2 * pairs))
    run.report.stage(f"certify candidate {index + 1}: {candidate.describe}", pairs * each)
    try:
        blocks = _measure_pairs(run, index, candidate, [], pairs)
        rules = replace(rules, baseline=_baseline(run, blocks))
        verdict = judge(blocks, rules)
        # An undecided speed gets as many pairs again, once, if the candidates after it stay affordable. A killed run that had
        # begun with them goes on with them: what they cost is spent already.
        if verdict.verdict == "undecided" and run.left_s() > (more + later * pairs * each) * _block_seconds(run, blocks):
            run.report.stage(f"certify candidate {index + 1}: {verdict.reason}, more pairs", 2 * pairs * each, len(blocks))
            verdict = judge(_measure_pairs(run, index, candidate, blocks, 2 * pairs), rules)
    except (_CandidateCrashError, PolicyError, UnsupportedError) as error:
        return Verdict("crashed", f"the engine failed under it: {error}")
    return verdict


def _blocks_to_measure(run: Run, index: int, pairs: Iterable[int]) -> int:
    """How many blocks of a candidate's pairs the study does not have yet."""
    levels = range(len(run.spec.workload.load.levels))
    keys = (block_key(index, pair, level, routing) for pair in pairs for level in levels for routing in ("exact", "chosen"))
    return sum(run.study.get(key) is None for key in keys)


def _baseline(run: Run, blocks: Sequence[MeasuredBlock]) -> str:
    """Why exact routing answers the held-out items too badly for a drop to mean something; empty where it does not.

    Only a run that goes on without a certificate comes here with such a reason: any other ends at its first block.
    """
    items = {item.digest: item for item in run.cert}
    for block in (block for block in blocks if block.routing == "exact" and block.pair == 0):
        right = {item: answer == "1" for item, answer in zip(block.items, block.right, strict=True) if answer != "x"}
        if why := too_bad(right, [items[item] for item in right], run.max_drop, "held-out items"):
            return why
    return ""


def _measure_pairs(run: Run, index: int, candidate: Candidate, done: Sequence[MeasuredBlock], pairs: int) -> list[MeasuredBlock]:
    """All blocks of the first `pairs` pairs, of which `done` are the first ones; those that the study has are not run again."""
    levels, policy = run.spec.workload.load.levels, Policy.parse(candidate.policy)
    blocks, total = list(done), pairs * len(levels) * 2
    for pair in range(len(done) // (2 * len(levels)), pairs):
        for level in range(len(levels)):
            order = ["exact", "chosen"]
            random.Random(f"{run.spec.workload.seed} {index} {pair} {level}").shuffle(order)
            for routing in order:
                key = block_key(index, pair, level, routing)
                block = run.study.get(key)
                if block is None:
                    _check_budget(run, blocks, total - len(blocks))
                    block = _measure_block(run, pair, level, policy if routing == "chosen" else EXACT_POLICY, candidate)
                    run.study.put(key, block)
                    run.study.note_spent(run.budget)
                blocks.append(block)
                left = total - len(blocks)
                run.report.step(f"block {len(blocks)} of {total} done", left * _block_seconds(run, blocks))
    return blocks


def _block_seconds(run: Run, blocks: Sequence[MeasuredBlock]) -> float:
    """Seconds that the candidate's next block will take at most, from its blocks so far, else from the pace."""
    if blocks:
        return max(block.wall_s for block in blocks)
    return planner.candidate_seconds(run.spec, run.study.get(PACE), 1) / (2 * run.spec.certify.pairs)


def _check_budget(run: Run, blocks: Sequence[MeasuredBlock], blocks_left: int) -> None:
    """A candidate that cannot be measured to the end is worth nothing, so it is given up before it eats the budget."""
    left, each = run.left_s(), _block_seconds(run, blocks)
    if left < blocks_left * each * 0.9 or left < each:
        needed = duration(blocks_left * each)
        raise BudgetExhaustedError(
            f"{run.budget.which(time.monotonic())} cannot pay for the {blocks_left} blocks still needed to certify (about {needed}, "
            f"{max(left, 0):.0f} s left); raise it and run the same line again, which goes on from here"
        )


def _measure_block(run: Run, pair: int, level: int, policy: Policy, candidate: Candidate) -> MeasuredBlock:
    levels = run.spec.workload.load.levels
    items = block_items(run.cert, candidate, pair, level, len(levels))
    began = time.monotonic()
    pace = run.study.get(PACE)
    assert pace is not None
    for attempt in range(_ATTEMPTS):
        try:
            run.engine.apply(policy)
            # Both routings of a pair get the same arrivals; three residences are sent before anything counts.
            load = run.load(levels[level], planner.WARMUP_RESIDENCES, pace.residence_s, seed=run.spec.workload.seed + 1000 * pair)
            requests = run.traffic.requests(items, offset=pair * len(items))
            fillers = run.traffic.requests(run.search[: max(64, 4 * levels[level])])
            # The budget cuts a block; long before that, a block that takes a few times its length has a hung engine.
            expected = len(requests) / pace.rate_per_s + (planner.WARMUP_RESIDENCES + 2) * pace.residence_s
            report = run.engine.block(requests, load, fillers, max(1.0, run.left_s()), expected_s=expected)
            break
        except EngineCrashError as error:
            if attempt + 1 == _ATTEMPTS and policy != EXACT_POLICY:
                raise _CandidateCrashError(str(error)) from error
            if attempt + 1 == _ATTEMPTS:
                raise SereError(f"the engine keeps failing while certifying {policy.describe()}: {error}") from error
    if report.block.stopped or len(report.block.sent) < len(requests):
        raise BudgetExhaustedError(
            f"{run.budget.which(time.monotonic())} ran out in the middle of a block; raise it and run again"
        )
    if policy == EXACT_POLICY and pair == 0 and not run.advisory:
        check_baseline(answers(report.block.sent), items, run.max_drop, "held-out items")
    routing = "exact" if policy == EXACT_POLICY else "chosen"
    return pack(report, pair, level, routing, run.traffic.timed, time.monotonic() - began)


def pack(report: BlockReport, pair: int, level: int, routing: str, timed: str, wall_s: float) -> MeasuredBlock:
    """A block as it is kept: per labelled item right or wrong and a digest of the answer; latencies in 0.001 ms."""
    block = report.block
    labelled = [s for s in block.sent if s.item is not None]
    measured = [s for s in block.sent if timed == "all" or s.item is None]
    return MeasuredBlock(
        pair=pair, level=level, routing=routing,
        items=[s.item for s in labelled if s.item is not None],
        right="".join("x" if s.error is not None else "1" if s.correct else "0" for s in labelled),
        said=[hashlib.sha256(s.text.encode()).hexdigest()[:6] for s in labelled],
        latency_ms={m: [round(float(v), 3) for v in values(measured, m)] for m in METRICS},
        seconds=block.seconds, wall_s=wall_s, batch=block.batch, requests=len(block.sent),
        failures=sum(s.error is not None for s in block.sent),
        tokens=float(np.mean([s.tokens for s in block.sent])),
        active_before=report.active_before, active_after=report.active_after, covered=report.covered,
    )  # fmt: skip
