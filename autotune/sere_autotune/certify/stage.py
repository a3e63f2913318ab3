"""The deciding stage: each rung of the frozen ladder against exact routing on held-out items, both arms rerun.

Exact and candidate alternate in paired blocks on one engine (order random, same items and arrivals, drained between),
so that drift cancels. The number of items is declared before CERT is opened and kept in the study; every finished
block is kept too, so a killed tuner loses at most the block in flight.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from sere_ext.contract.errors import SereError
from sere_ext.contract.policy import EXACT_POLICY, Policy

from sere_autotune import planner
from sere_autotune.outcome import BudgetExhaustedError
from sere_autotune.search.ladder import ArmBlock, Rung, RungResult, judge_rung, walk
from sere_autotune.study.ledger import Ledger, spent_alpha
from sere_autotune.study.run import Run
from sere_autotune.trial import stats
from sere_autotune.trial.engine import BlockReport, EngineCrashError
from sere_autotune.trial.items import Item, set_digest
from sere_autotune.trial.measures import METRICS, Answer, values

_HOPELESS = 0.05  # probability to certify below which CERT is not opened


def certify(run: Run, ladder: Sequence[Rung], ledger: Ledger, model_digest: str) -> tuple[int | None, list[RungResult]]:
    """Walk the ladder. Returns the chosen rung's index, or None, and the results of the rungs that were run.

    Raises:
        CannotCertifyError: with the differences seen in the search the items cannot certify (CERT stays unopened).
        BudgetExhaustedError: a budget ran out before any rung passed.
    """
    study = run.study
    if study.get("alpha") is None:
        _check_power(run, ladder)
        name = study.get("fingerprint", "")
        openings = ledger.open(model_digest, set_digest(run.cert), f"{run.study.out.resolve()} {name[:19]}")
        study.put("openings", openings)
        study.put("alpha", spent_alpha(run.spec.accuracy.alpha, openings))
    results: list[RungResult] = []
    for index, rung in enumerate(ladder):
        stored = study.get(f"rung.{index}")
        try:
            result = RungResult(**stored) if stored else _run_rung(run, index, rung, float(study.get("alpha")))
        except BudgetExhaustedError:
            if walk([r.verdict for r in results])[0] is None:
                raise
            study.put("ladderEnded", f"{run.budget.which(time.monotonic())} ran out at rung {index + 1}")
            break
        if not stored:
            study.put(f"rung.{index}", result.to_dict())
        results.append(result)
        run.report.step(f"rung {index + 1} of {len(ladder)}: {result.verdict}, {result.reason}", 0.0)
        if walk([r.verdict for r in results])[1]:
            break
    return walk([r.verdict for r in results])[0], results


def _check_power(run: Run, ladder: Sequence[Rung]) -> None:
    """Refuse before CERT is opened where no rung has a fair chance with the discordance that the search saw."""
    if run.advisory or not ladder or max(rung.power for rung in ladder) >= _HOPELESS:
        return
    rung = max(ladder, key=lambda r: r.power)
    needed = stats.items_needed(rung.discordance, rung.drop, run.max_drop, run.alpha)
    wanted = f"about {needed:,} items are needed" if needed else "no number of items is enough at this drop"
    raise planner.CannotCertifyError(
        f"the search saw {rung.discordance:.1%} of items differ under {rung.describe}, with a drop near {rung.drop * 100:.2f} "
        f"points: {run.cert_items:,} held-out items certify {run.max_drop * 100:g} points with a chance of {rung.power:.0%} only, "
        f"{wanted}. They were left unopened; give more items, widen accuracy.maxDropPoints, or add --advisory"
    )


def declare(run: Run, index: int, rung: Rung) -> dict[str, int]:
    """The block plan of a rung, made once and kept: {"items": n, "perBlock": labelled items per block}."""
    kept = run.study.get(f"plan.{index}")
    if kept is not None:
        return dict(kept)
    pace = run.study.get("pace")
    load = run.spec.workload.load
    # The faster arm must fill the block; an open loop's rate is given.
    rate = load.requests_per_second or pace["rate"] * max(1.0, rung.speedup)
    share = run.traffic.labelled_share
    alpha = float(run.study.get("alpha", run.spec.accuracy.alpha))
    needed = stats.items_needed(rung.discordance, rung.drop, run.max_drop, alpha) or run.cert_items
    requests = planner.block_requests(run.spec, rate, pace["residence"], share, min(needed, run.cert_items))
    per_block = max(1, round(requests * share))
    blocks = run.spec.certify.pairs * len(load.levels)
    plan = {"items": min(run.cert_items, per_block * blocks), "perBlock": per_block}
    run.study.put(f"plan.{index}", plan)
    return plan


def block_items(cert: Sequence[Item], plan: dict[str, int], pair: int, level: int, levels: int) -> list[Item]:
    """The labelled items of one block: consecutive, wrapping around the declared ones (repeats are not counted again)."""
    start = (pair * levels + level) * plan["perBlock"]
    return [cert[(start + i) % plan["items"]] for i in range(plan["perBlock"])]


def _run_rung(run: Run, index: int, rung: Rung, alpha: float) -> RungResult:
    plan = declare(run, index, rung)
    levels = run.spec.workload.load.levels
    pairs = run.spec.certify.pairs
    policy = Policy.parse(rung.policy)
    run.report.stage(f"certify rung {index + 1}: {rung.describe}", pairs * len(levels) * 2)
    done = 0
    for pair in range(pairs):
        for level in range(len(levels)):
            arms = ["exact", "chosen"]
            random.Random(f"{run.spec.workload.seed} {index} {pair} {level}").shuffle(arms)
            for arm in arms:
                key = f"block.{index}.{pair}.{level}.{arm}"
                if run.study.get(key) is None:
                    _check_budget(run, index, (pairs * len(levels) * 2 - done))
                    run.study.put(key, _measure_block(run, index, pair, level, policy if arm == "chosen" else EXACT_POLICY, plan))
                    run.study.note_spent(run.budget)
                done += 1
                left = pairs * len(levels) * 2 - done
                run.report.step(f"block {done} of {pairs * len(levels) * 2}", left * _block_seconds(run, index))
    blocks = load_blocks(run, index, plan)
    return judge_rung(blocks, run.spec.slo.limits(), run.max_drop, alpha, run.spec.slo.max_failure_share)


def _block_seconds(run: Run, index: int) -> float:
    attrs = run.study.attrs
    times = [v["wall"] for k, v in attrs.items() if k.startswith(f"block.{index}.")]
    if times:
        return float(max(times))
    pace = run.study.get("pace", {})
    return planner.rung_seconds(run.spec, pace, 1) / (2 * run.spec.certify.pairs)


def _check_budget(run: Run, index: int, blocks_left: int) -> None:
    """A rung that cannot be finished is worth nothing, so it is given up before it eats the budget."""
    left = run.left_s()
    if left < blocks_left * _block_seconds(run, index) * 0.9 or left < _block_seconds(run, index):
        raise BudgetExhaustedError(
            f"{run.budget.which(time.monotonic())} cannot pay for the {blocks_left} blocks still needed to certify (about "
            f"{planner.duration(blocks_left * _block_seconds(run, index))[6:]}, {max(left, 0):.0f} s left); raise it and run the same "
            "line again, which goes on from here"
        )


def _measure_block(run: Run, index: int, pair: int, level: int, policy: Policy, plan: dict[str, int]) -> dict[str, Any]:
    levels = run.spec.workload.load.levels
    items = block_items(run.cert, plan, pair, level, len(levels))
    began = time.monotonic()
    pace = run.study.get("pace")
    for attempt in range(3):
        try:
            run.engine.apply(policy)
            # Same arrivals for both arms of a pair; five residences are sent before anything counts.
            load = run.load(
                levels[level], planner.WARMUP_RESIDENCES, pace["residence"], seed=run.spec.workload.seed + 1000 * pair
            )
            requests = run.traffic.requests(items, offset=pair * len(items))
            fillers = run.traffic.requests(run.search[: max(64, 4 * levels[level])])
            # Past its time a block is cut, so that no budget is exceeded.
            report = run.engine.block(requests, load, fillers, deadline_s=max(1.0, run.left_s()))
            break
        except EngineCrashError as error:
            if attempt == 2:
                raise SereError(f"the engine keeps failing while certifying {policy.describe()}: {error}") from error
    if report.block.stopped or len(report.block.sent) < len(requests):
        raise BudgetExhaustedError(
            f"{run.budget.which(time.monotonic())} ran out in the middle of a block; raise it and run again"
        )
    return pack(report, run.traffic.timed, time.monotonic() - began)


def pack(report: BlockReport, timed: str, wall: float) -> dict[str, Any]:
    """A block as it is kept: per labelled item right or wrong and a digest of the answer; latencies in 0.001 ms."""
    block = report.block
    labelled = [s for s in block.sent if s.item is not None]
    measured = [s for s in block.sent if timed == "all" or s.item is None]
    return {
        "items": [s.item for s in labelled],
        "right": "".join("1" if s.correct else "0" for s in labelled),
        "said": [hashlib.sha256(s.text.encode()).hexdigest()[:6] for s in labelled],
        "latencyMs": {m: [round(float(v), 3) for v in values(measured, m)] for m in METRICS},
        "seconds": block.seconds, "wall": wall, "batch": block.batch, "requests": len(block.sent),
        "failures": sum(s.error is not None for s in block.sent),
        "tokens": float(np.mean([s.tokens for s in block.sent])),
        "active": [report.active_before, report.active_after], "covered": report.covered,
    }  # fmt: skip


def load_blocks(run: Run, index: int, plan: dict[str, int]) -> list[ArmBlock]:
    """All blocks of a rung from the study."""
    found = []
    for key, kept in run.study.attrs.items():
        if not key.startswith(f"block.{index}."):
            continue
        pair, level, arm = key.split(".")[2:]
        answered = zip(kept["items"], kept["right"], kept["said"], strict=True)
        answers: dict[str, Answer] = {}
        for item, right, said in answered:
            answers.setdefault(item, Answer(right == "1", said))
        found.append(ArmBlock(
            pair=int(pair), level=int(level), arm=arm, answers=answers,
            latency_ms={m: np.array(kept["latencyMs"][m]) for m in METRICS}, seconds=kept["seconds"],
            requests=kept["requests"], failures=kept["failures"], tokens=kept["tokens"],
            active_before=kept["active"][0], active_after=kept["active"][1],
        ))  # fmt: skip
    return found
