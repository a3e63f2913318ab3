"""What an engine is to the tuner: the facts of it and what a load block reports. No vLLM, no Ray."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from sere_autotune.trial.load import Block
from sere_autotune.trial.measures import Answer
from sere_ext.contract.policy import MAX_BUCKETS, MAX_TOKENS, Bucket, Kind, Policy
from sere_ext.contract.state import CounterRow

# Exact routing whose steps are counted by their size, in powers of two. Its digest is that of exact routing.
EXACT_BY_SIZE = Policy(
    buckets=tuple(
        Bucket(min_tokens=1 << n, max_tokens=(2 << n) - 1 if n + 1 < MAX_BUCKETS else MAX_TOKENS, kind=Kind.EXACT)
        for n in range(MAX_BUCKETS)
    )
)


def median_step(rows: Iterable[CounterRow]) -> float | None:
    """Tokens of the median step under `EXACT_BY_SIZE`: the mean size of those steps that are as large to a power of two.

    Args:
        rows: what was counted under it; steps without a token are left out.
    """
    sized = sorted((row.tokens / row.calls, row.calls) for row in rows if row.calls and row.tokens)
    before, half = 0, sum(calls for _, calls in sized) / 2
    for size, calls in sized:
        before += calls
        if before >= half:
            return size
    return None


@dataclass(frozen=True)
class Reject:
    """End a block early once the candidate is worse than exact by more than `limit` (a share)."""

    limit: float
    alpha: float
    exact: dict[str, Answer]


@dataclass
class BlockReport:
    """A block's results with what the routers counted meanwhile."""

    block: Block
    active_before: float | None = None  # mean experts per layer and step in the policy's buckets
    active_after: float | None = None
    covered: float | None = None  # share of router calls inside the policy's buckets
    step_tokens: float | None = None  # size of the median step under exact routing, drafts that were verified among its tokens


@dataclass(frozen=True)
class EngineFacts:
    """What runs: for the profile's key and the space's bounds."""

    key: dict[str, Any]
    top_k: int
    layers: tuple[int, ...] = ()  # model layer numbers of the MoE layers
    experts: int = 0  # of each of them; 0 where nobody said
    most_requests: int = 0  # that it runs at once; 0 where nobody said
