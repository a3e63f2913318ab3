"""What an engine is to the tuner: the facts of it and what a load block reports. No vLLM, no Ray."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sere_autotune.trial.load import Block
from sere_autotune.trial.measures import Answer


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


@dataclass(frozen=True)
class EngineFacts:
    """What runs: for the profile's key and the space's bounds."""

    key: dict[str, Any]
    top_k: int
    ranks: int
    layers: tuple[int, ...] = ()  # model layer numbers of the MoE layers
    experts: int = 0  # of each of them; 0 where nobody said
