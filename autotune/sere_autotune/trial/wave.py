"""The time of decode steps of one size, taken from a wave: requests that start together and are decoded to the same length. Pure.

A step of a wave carries no prompt once every request has its first token, and it has all requests until the first of them
ends. Steps between these two moments are timed by the arrivals of one request's tokens at the engine's client.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from sere_ext.contract.state import CounterRow, total

LEAST_STEPS = 4  # a shorter stretch of decode steps is not timed


@dataclass(frozen=True)
class Trace:
    """When the tokens of one request arrived."""

    prompt_tokens: int
    arrivals: tuple[tuple[float, int], ...]  # (seconds on the caller's clock, tokens so far), in order; at least one


@dataclass(frozen=True)
class Wave:
    """What one wave showed.

    Attributes:
        prompt_tokens: of a request, mean.
        prompt_s: seconds from the wave's begin until every request had its first token.
        step_s: median seconds of a decode step with all requests and no prompt (the median, since a machine that is shared
            stalls now and then); None where no such stretch was long enough.
        active: mean active experts of a router call in the steps that were counted; None where none was.
        slots: mean experts that compute a token in such a call; None where none was counted.
    """

    prompt_tokens: float
    prompt_s: float
    step_s: float | None
    active: float | None = None
    slots: float | None = None


def timed(began: float, traces: Sequence[Trace], counted: Iterable[CounterRow]) -> Wave:
    """The figures of a wave.

    Args:
        began: when the requests were sent, on the clock of the traces.
        counted: what the routers counted in the wave's decode steps, over all MoE layers.
    """
    last = max(traces, key=lambda trace: trace.arrivals[0][0])  # of all requests the one whose first token came last
    first_end = min(trace.arrivals[-1][0] for trace in traces)
    within = [arrival for arrival in last.arrivals if arrival[0] <= first_end]
    # Tokens that arrived together share the time since the ones before.
    gaps = [
        (later[0] - sooner[0]) / (later[1] - sooner[1]) for sooner, later in pairwise(within) for _ in range(later[1] - sooner[1])
    ]
    rows = total(row.model_copy(update={"digest": "", "layers": None, "bucket": ""}) for row in counted)
    row = rows[0] if rows and rows[0].calls and rows[0].tokens else None
    return Wave(
        prompt_tokens=sum(trace.prompt_tokens for trace in traces) / len(traces),
        prompt_s=last.arrivals[0][0] - began,
        step_s=median(gaps) if len(gaps) >= LEAST_STEPS else None,
        active=row.active_after / row.calls if row else None,
        slots=(row.slots - row.merged) / row.tokens if row else None,
    )
