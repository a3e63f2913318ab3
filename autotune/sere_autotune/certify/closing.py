"""The closing bisection: how much more load the certified policy holds at the latency that exact routing has at the tuned load.

It runs after the certificate, which it neither changes nor delays: the caller keeps the outcome first. Single blocks of the
policy at greater loads find where its mean TPOT reaches exact routing's; pairs of blocks, exact routing at the tuned load and
the policy at the greater one in turns, confirm it, or a load of the grid lower where the policy is slower. Requests are search items:
held-out items are not opened again, and nothing is said of accuracy at the greater load. Every block is kept in the study.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sere_autotune import planner
from sere_autotune.certify import latency, most_load
from sere_autotune.certify.stage import pack
from sere_autotune.study.run import Run
from sere_autotune.study.schema import LADDER, Interval, Key, LoadProbe, MeasuredBlock, MostLoad, block_key, load_block_key
from sere_autotune.trial.items import Item
from sere_autotune.trial.load import Load
from sere_autotune.words import bracketed
from sere_ext.contract.errors import BudgetExhaustedError
from sere_ext.contract.policy import EXACT_POLICY, Policy

_LOADS = 3  # that are measured in pairs at most, from the greatest that single blocks found down
_CLEARLY = 0.95  # exact / chosen of the pairs so far, below which further pairs of that load are left out
_LEAST_REQUESTS = 8  # of a block


@dataclass
class _Ground:
    """What every block of the closing bisection has in common.

    Attributes:
        tuned: the highest tuned load: requests at a time, or requests/s.
        residence_s: mean time of a request under exact routing at the tuned load, in seconds.
        exact: the certificate's blocks of exact routing at that load.
    """

    run: Run
    policy: Policy
    tuned: float
    residence_s: float
    exact: list[MeasuredBlock]
    walls: list[float] = field(default_factory=list)  # seconds of the blocks so far
    taken: int = 0  # search items that blocks had so far

    @property
    def open_loop(self) -> bool:
        return self.run.spec.workload.load.requests_per_second is not None

    def at_once(self, load: float) -> float:
        """Requests in flight at a load while a request takes as long as under exact routing at the tuned one."""
        return load * self.residence_s if self.open_loop else load

    def block(self, load: float, key: Key[MeasuredBlock], routing: str, pair: int = 0) -> MeasuredBlock:
        """One block at a load, from the study where it has it.

        Args:
            pair: of which it is a part; the gaps between arrivals of a pair's blocks are drawn from one seed.

        Raises:
            BudgetExhaustedError: the budget does not pay for it.
            SereError: the engine fails.
        """
        run, waves = self.run, planner.load_waves(self.run.spec, self.residence_s)
        count = max(_LEAST_REQUESTS, math.ceil(self.at_once(load)) * waves)
        labelled = math.ceil(count * run.traffic.labelled_share)
        start, self.taken = self.taken, self.taken + labelled
        if (stored := run.study.get(key)) is not None:
            return stored
        needed = max(self.walls) if self.walls else (waves + 2) * self.residence_s
        if run.left_s() < needed:
            raise BudgetExhaustedError(f"{run.budget.which(time.monotonic())} could not pay for it")
        began, warmup = time.monotonic(), math.ceil(self.at_once(load))
        run.engine.apply(self.policy if routing == "chosen" else EXACT_POLICY)
        requests = run.traffic.requests(_cycle(run.search, start, labelled), offset=start)
        fillers = run.traffic.requests(_cycle(run.search, start + labelled, max(64, 2 * warmup)))
        how = Load(concurrency=round(load), warmup=warmup)
        if self.open_loop:
            how = Load(rate=load, seed=run.spec.workload.seed + 1000 * pair, warmup=warmup)
        expected = (waves + 2) * self.residence_s * load / self.tuned
        report = run.engine.block(requests, how, fillers, max(1.0, run.left_s()), expected_s=expected)
        if report.block.stopped or len(report.block.sent) < len(requests):
            raise BudgetExhaustedError(f"{run.budget.which(time.monotonic())} ran out in the middle of a block")
        level = len(run.spec.workload.load.levels) - 1
        block = pack(report, pair, level, routing, run.traffic.timed, time.monotonic() - began)
        run.study.put(key, block)
        run.study.note_spent(run.budget)
        self.walls.append(block.wall_s)
        return block

    def words(self, load: float) -> str:
        return f"{load:.4g} requests/s" if self.open_loop else f"{load:g} requests at a time"

    def broken(self, blocks: Sequence[MeasuredBlock]) -> str:
        slo = self.run.spec.slo
        return most_load.broken(blocks, self.exact, slo.limits(), slo.max_failure_share)


def measure(run: Run, index: int) -> MostLoad:
    """Find and confirm the most load of the chosen candidate.

    Args:
        index: of the candidate on the ladder; its certificate is complete.

    Raises:
        BudgetExhaustedError: a budget ran out.
        SereError: the engine fails.
    """
    assert run.facts is not None
    ground = _ground(run, index)
    most = float(run.facts.most_requests) or None
    if ground.open_loop and most is not None:
        most /= ground.residence_s
    loads = most_load.grid(ground.tuned, most, whole=not ground.open_loop)
    if len(loads) == 1:
        return unmeasured(run, "the engine runs no more requests at once than the tuned load has")
    run.report.stage(f"most load at the latency of exact routing, up to {ground.words(loads[-1])}", 0)
    probes = _search(ground, loads, latency.table(_certified(run, index, "chosen"))["tpot"]["mean"])
    return _confirm(ground, loads, probes)


def unmeasured(run: Run, reason: str) -> MostLoad:
    """That the most load was not measured, and why."""
    return MostLoad(_tuned(run), run.spec.workload.load.requests_per_second is not None, reason=reason)


def _ground(run: Run, index: int) -> _Ground:
    ladder = run.study.get(LADDER)
    assert ladder is not None
    exact = _certified(run, index, "exact")
    residence = float(np.concatenate(latency.samples(exact, "e2el")).mean()) / 1e3
    return _Ground(run, Policy.parse(ladder[index].policy), _tuned(run), residence, exact)


def _tuned(run: Run) -> float:
    """The highest load level."""
    load = run.spec.workload.load
    return float(load.requests_per_second or load.levels[-1])


def _certified(run: Run, index: int, routing: str) -> list[MeasuredBlock]:
    """The certificate's blocks of one routing at the highest load level."""
    level = len(run.spec.workload.load.levels) - 1
    found = (run.study.get(block_key(index, pair, level, routing)) for pair in range(2 * run.spec.certify.pairs))
    return [block for block in found if block is not None]


def _search(ground: _Ground, loads: Sequence[float], tuned_ms: float) -> list[LoadProbe]:
    """Blocks of the policy at greater loads until the greatest that holds is known to a step of the grid.

    Args:
        tuned_ms: mean TPOT of the policy at the tuned load.
    """
    target_ms = latency.table(ground.exact)["tpot"]["mean"]
    probes: list[LoadProbe] = []
    while (load := most_load.next_load(loads, tuned_ms, target_ms, probes)) is not None:
        block = ground.block(load, load_block_key(load, None, "chosen"), "chosen")
        tpot_ms = latency.table([block])["tpot"]["mean"]
        slower = "" if tpot_ms <= target_ms else f"mean TPOT was {tpot_ms:.1f} ms, {target_ms:.1f} ms under exact routing"
        probes.append(LoadProbe(load, tpot_ms, slower or ground.broken([block])))
        ground.run.report.step(f"{ground.words(load)}: " + (probes[-1].broken or f"held at mean TPOT {tpot_ms:.1f} ms"), 0.0)
    return probes


def _confirm(ground: _Ground, loads: Sequence[float], probes: list[LoadProbe]) -> MostLoad:
    """Pairs of blocks at the load that was found, and at lower ones where the policy does not hold it."""
    lowest = min((probe for probe in probes if not probe.holds), key=lambda probe: probe.load, default=None)
    reason = f"at {ground.words(lowest.load)} {lowest.broken}" if lowest else ""
    for load in most_load.found(loads, probes)[:_LOADS]:
        exact, chosen = list[MeasuredBlock](), list[MeasuredBlock]()
        for pair in range(2 * planner.LOAD_PAIRS):
            for routing in ("exact", "chosen") if pair % 2 == 0 else ("chosen", "exact"):
                at, blocks = (ground.tuned, exact) if routing == "exact" else (load, chosen)
                blocks.append(ground.block(at, load_block_key(load, pair, routing), routing, pair))
            ratio = latency.speedup(exact, chosen, "mean")
            if ratio is None or ratio.value < _CLEARLY:
                break
            if pair + 1 == planner.LOAD_PAIRS and (_as_fast(ratio) or ratio.value < 1):
                break  # where it looks as fast and is not shown to be, as many pairs again
        broken = ground.broken(chosen)
        if ratio is not None and _as_fast(ratio) and not broken:
            tpot_ms = {"exact": _geometric_mean(exact), "chosen": _geometric_mean(chosen)}
            whole = load == loads[-1]
            return MostLoad(ground.tuned, ground.open_loop, load, whole, ratio, tpot_ms, probes)
        if not broken:
            broken = (
                "no TPOT was measured"
                if ratio is None
                else f"the policy was not shown to be as fast, exact / chosen {ratio.value:.2f}{bracketed(ratio.low, ratio.high) or ' in one pair'}"
            )
        reason = f"at {ground.words(load)} {broken}"
        ground.run.report.step(f"{reason}; a lower load is tried", 0.0)
    return MostLoad(ground.tuned, ground.open_loop, ground.tuned, probes=probes, reason=reason)


def _as_fast(ratio: Interval) -> bool:
    """Whether the policy at the greater load is shown to be as fast as exact routing at the tuned one."""
    return ratio.low is not None and ratio.low >= 1


def _geometric_mean(blocks: Sequence[MeasuredBlock]) -> float:
    """Mean TPOT in milliseconds over blocks, as the ratio of pairs takes it."""
    return math.exp(float(np.mean([math.log(latency.table([block])["tpot"]["mean"]) for block in blocks])))


def _cycle(items: Sequence[Item], start: int, count: int) -> list[Item]:
    return [items[(start + index) % len(items)] for index in range(count)]
