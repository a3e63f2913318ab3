"""Where the most load lies that a certified policy holds at the latency of exact routing: which load to try next. Pure.

The search brackets the load between one at which the policy keeps the latency and one at which it does not, on a grid of loads
that begins with the tuned one. It begins at the top; then it tries the load at which TPOT, as a power of the load between the
two ends of the bracket, reaches exact routing's, and from the third load on the middle of the bracket, so that a made-up shape
of the curve costs no more than a bisection. What it finds is a guess from single blocks: `closing.py` confirms it in pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from sere_autotune.certify import latency
from sere_autotune.study.schema import LoadProbe, MeasuredBlock, MostLoad
from sere_autotune.words import bracketed

STEP = 1.12  # of the grid, at most: the load that is found is within so much of the most
TIMES = 4.0  # the tuned load, at most
_INTERPOLATED = 2  # loads that are tried where a straight line on the log scale crosses, before halving begins
_WAITING_MORE = 0.1  # share of a request's time that it may wait longer for its first token, without a limit on TTFT


def grid(tuned: float, most: float | None, *, whole: bool) -> list[float]:
    """The tuned load and greater ones, each at most `STEP` times the one before, up to `TIMES` as much or what the engine runs.

    Args:
        tuned: requests at a time, or requests/s.
        most: what the engine can run at once, in the same unit; None where nobody knows.
        whole: whether loads are whole numbers of requests.

    Returns:
        The tuned load alone where the engine can run no more.
    """
    top = tuned * TIMES if most is None else min(tuned * TIMES, most)
    if top <= tuned:
        return [tuned]
    steps = max(1, math.ceil(math.log(top / tuned) / math.log(STEP)))
    loads = [tuned * (top / tuned) ** (index / steps) for index in range(steps + 1)]
    return sorted({float(round(load)) for load in loads}) if whole else loads


def next_load(loads: Sequence[float], tuned_ms: float, target_ms: float, probes: Sequence[LoadProbe]) -> float | None:
    """The load to try next, None once the greatest that holds is known to a step of the grid.

    Args:
        loads: the grid, ascending; its first is the tuned load, which holds.
        tuned_ms: mean TPOT of the policy at the tuned load.
        target_ms: mean TPOT of exact routing at the tuned load.
        probes: loads of the grid that were tried so far.
    """
    seen = {probe.load: probe for probe in probes}
    if len(loads) > 1 and loads[-1] not in seen:
        return loads[-1]
    low, high = _bracket(loads, probes)
    if high - low < 2:
        return None
    middle, failed = (low + high) // 2, seen[loads[high]]
    held_ms = seen[loads[low]].tpot_ms if low else tuned_ms
    # Where another limit than the latency broke, the curve of TPOT crosses nothing.
    if len(probes) > _INTERPOLATED or not 0 < held_ms <= target_ms < failed.tpot_ms:
        return loads[middle]
    part = math.log(target_ms / held_ms) / math.log(failed.tpot_ms / held_ms)
    crossing = math.log(loads[low]) + part * math.log(loads[high] / loads[low])
    below = sum(math.log(load) <= crossing for load in loads) - 1
    return loads[min(max(below, low + 1), high - 1)]


def found(loads: Sequence[float], probes: Sequence[LoadProbe]) -> list[float]:
    """The loads to confirm, the greatest that held first and then those below it; none where the tuned load is the most."""
    low, _ = _bracket(loads, probes)
    return list(reversed(loads[1 : low + 1]))


def _bracket(loads: Sequence[float], probes: Sequence[LoadProbe]) -> tuple[int, int]:
    """Indices of the greatest load that held below the least that did not, and of that one; the length of `loads` where all held."""
    failed = {probe.load for probe in probes if not probe.holds}
    held = {probe.load for probe in probes if probe.holds}
    high = next((index for index, load in enumerate(loads) if load in failed), len(loads))
    low = max((index for index, load in enumerate(loads[:high]) if load in held), default=0)
    return low, high


def broken(
    blocks: Sequence[MeasuredBlock], exact: Sequence[MeasuredBlock], limits: Sequence[tuple[str, str, float]], max_failures: float
) -> str:
    """What a greater load breaks besides mean TPOT, in words; empty where it breaks nothing.

    Requests that wait for a place in the engine are not held by it, and their TPOT does not show it. So the part of a
    request's time before its first token may not grow much.

    Args:
        blocks: of the policy at the greater load.
        exact: of exact routing at the tuned load.
        limits: (metric, statistic, milliseconds) of the SLO; judged by the measured statistic.
        max_failures: share of requests that may fail.
    """
    measured, before = latency.table(blocks), latency.table(exact)
    failed = sum(block.failures for block in blocks) / max(1, sum(block.requests for block in blocks))
    if failed > max_failures:
        return f"{failed:.1%} of requests failed"
    for metric, name, bound in limits:
        if not measured[metric][name] <= bound:
            return f"{metric.upper()} {name} was {measured[metric][name]:.1f} ms, above the limit of {bound:g} ms"
    waiting, waited = (table["ttft"]["mean"] / table["e2el"]["mean"] for table in (measured, before))
    if waiting > waited + _WAITING_MORE:
        return f"requests waited {waiting:.0%} of their time for the first token, {waited:.0%} under exact routing"
    return ""


def sentence(most: MostLoad) -> str:
    """What was found, or why nothing was measured, for people."""
    unit = "requests/s" if most.open_loop else "requests at a time"
    if most.load is None:
        return f"not measured: {most.reason}"
    if most.ratio is None:
        return f"no more than the tuned {most.tuned:g} {unit} was shown: {most.reason}"
    return (
        f"{'at least ' if most.at_least else ''}{most.load:.4g} {unit} ({most.times:.2f}x) at mean TPOT {most.tpot_ms['chosen']:.1f} ms, "
        f"where exact routing has {most.tpot_ms['exact']:.1f} ms at {most.tuned:g} (exact / chosen {most.ratio.value:.2f}{bracketed(most.ratio.low, most.ratio.high)}, "
        f"{most.ratio.pairs} pairs); accuracy is certified at {most.tuned:g} {unit}"
    )
