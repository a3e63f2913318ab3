"""What an engine needs of a model whose every choice has a known drop and step time, and the engine that serves it to the tuner.

`worlds.py` makes such models up; `replayed.py` has one whose answers a real model gave.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from sere_autotune.trial.engine import BlockReport, EngineFacts, Reject
from sere_autotune.trial.load import Block, Load, Request, Sent
from sere_autotune.trial.routing import Routing
from sere_autotune.trial.stats import DropRejector
from sere_autotune.trial.wave import Wave
from sere_autotune.tuning.space import Choice, Space
from sere_autotune.tuning.spec import BucketEdges
from sere_ext.contract.policy import EXACT_POLICY, Kind, Policy

BATCH = 16  # requests of a step
KINDS = (Kind.SERE, Kind.TOPK, Kind.OEA)
EDGES = (BucketEdges(min_tokens=8, max_tokens=64),)
TPOT_MS = 20.0
KEY = {
    "modelName": "world", "configDigest": "sha256:0", "engineVersion": "0", "pluginVersion": "0", "device": "cpu",
    "tensorParallelSize": 1,
}  # fmt: skip


class Truth(ABC):
    """A model whose every choice has a known drop and step time.

    Attributes:
        law: name of the kind of world.
        scatter: of a block's mean time, on the log scale.
        tpot_ms: a step's time under exact routing.
        similarity: of the experts, [E, E] for every MoE layer.
        seen: router calls that the tuner records.
        space: every choice that a search may try.
    """

    law: str
    seed: int
    scatter: float
    experts: int
    top_k: int
    layers: int
    tpot_ms: float = TPOT_MS
    similarity: list[NDArray[np.float32]]
    seen: Routing
    space: Space

    @abstractmethod
    def drop(self, choice: Choice) -> float:
        """True share of items lost, net of those gained."""

    @abstractmethod
    def time(self, choice: Choice) -> float:
        """True time of a step, exact routing = 1."""

    @abstractmethod
    def counts(self, choice: Choice) -> tuple[float, float]:
        """Active experts of a router call, and experts that compute a token in it."""

    @abstractmethod
    def discordance(self, choice: Choice) -> tuple[float, float]:
        """Shares of all items that exact routing alone answers right, and that the choice alone does, in one block of each."""

    @abstractmethod
    def right(self, prompts: Sequence[str], choice: Choice, source: np.random.Generator) -> NDArray[np.bool_]:
        """Which prompts are answered right in one block."""

    @abstractmethod
    def choice_of(self, policy: Policy) -> Choice:
        """The choice whose policy this is, exact routing included."""

    def candidates(self) -> Iterator[Choice]:
        """Every choice that a study may end with."""
        yield from self.space.choices()

    def best(self, max_drop: float) -> tuple[Choice, float]:
        """The fastest choice that truly keeps the limit, and its speed-up."""
        feasible = [choice for choice in self.candidates() if self.drop(choice) <= max_drop]
        found = min(feasible, key=self.time)
        return found, 1 / self.time(found)


class WorldEngine:
    """A model of known truth behind the tuner's engine protocol. Blocks take no time; the engine seconds that they would take are summed."""

    def __init__(self, world: Truth, seed: int) -> None:
        self.world, self.policy = world, EXACT_POLICY
        self.start_seconds, self.seconds = 0.01, 0.0
        self.random = np.random.default_rng([world.seed, seed, 7])
        self.drift = 0.0

    def limit(self, left_s: Callable[[], float]) -> None:
        pass

    def start(self) -> EngineFacts:
        world = self.world
        return EngineFacts(key=KEY, top_k=world.top_k, layers=tuple(range(world.layers)), experts=world.experts)

    def apply(self, policy: Policy) -> None:
        self.policy = policy

    def record(self) -> None:
        pass

    def recorded(self) -> Routing | None:
        return self.world.seen

    def stop(self) -> None:
        pass

    def wave(self, requests: Sequence[Request], tokens: int, bucket: str) -> Wave:
        """A decode step under `topk`, which the world knows for its own batch size alone."""
        choice = Choice(Kind.TOPK, float(self.policy.buckets[0].S or self.world.top_k))
        exact_s = self.world.tpot_ms / 1e3
        time = exact_s * self.world.time(choice) * math.exp(0.05 * self.random.normal())
        self.seconds += tokens * time
        return Wave(10.0, exact_s, time, *self.world.counts(choice))

    def block(self, requests: Sequence[Request], load: Load, fillers: Sequence[Request] = (), deadline_s: float | None = None,
              reject: Reject | None = None, expected_s: float | None = None) -> BlockReport:  # fmt: skip
        world, choice, n = self.world, self.world.choice_of(self.policy), len(requests)
        time = world.time(choice)
        right = world.right([request.prompt for request in requests], choice, self.random)
        self.drift = 0.8 * self.drift + 0.02 * self.random.normal()
        pace = world.tpot_ms * time * math.exp(self.drift + world.scatter * self.random.normal() * 0.4)
        tpots = pace * np.exp(0.1 * self.random.normal(size=n))
        rejector = DropRejector(reject.limit, reject.alpha) if reject else None
        sent, stopped, step = [], None, 15 * world.tpot_ms / 1e3 / BATCH
        for index, request in enumerate(requests):
            assert request.item is not None
            good = bool(right[index])
            tpot = float(tpots[index])
            sent.append(Sent(request.item.digest, good, "yes" if good else "no", 16, 50.0, 50.0 + 15 * tpot, index * step,
                             index * step + 0.35))  # fmt: skip
            exact = reject.exact.get(request.item.digest) if reject else None
            if rejector is not None and exact is not None and rejector.update(exact.correct, good):
                stopped = f"accuracy: rejected after {rejector.items} items"
                break
        self.seconds += len(sent) * step * time
        return BlockReport(Block(sent, len(sent) * step, 0.35, float(BATCH), stopped), 40.0, 40.0 * time, 1.0)
