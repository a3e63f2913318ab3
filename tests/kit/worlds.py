"""Made-up models for whole tuning studies: experts, routing, output errors and step times, none by the tuner's own formulas.

A world draws experts (their outputs as vectors), router logits of steps, and from the kernel's own re-routing the change of
every layer's output. What that costs in accuracy and what a step takes are laws of the world (`LAWS`):

    knee     accuracy falls along a logistic curve of the summed output error; a step pays for bytes or for arithmetic,
             whichever is more, layer by layer
    cliff    accuracy holds until an error is reached and then falls steeply, early layers count most; experts are paid in tiles
             of four, and the busiest expert sets a layer's time
    ramp     accuracy falls with a power of the error, late layers count most; the first experts lie in a cache, and
             every further one costs less than the one before

The tuner sees other steps than those that its certificate's blocks are made of. `replayed.py` has a world whose answers a real model
gave; what an engine needs of either is `Truth`.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sere_autotune.search.layer_order import quarters
from sere_autotune.search.replay import between, layer_states, mix, rerouted
from sere_autotune.trial.engine import BlockReport, EngineFacts, Reject
from sere_autotune.trial.load import Block, Load, Request, Sent
from sere_autotune.trial.routing import Call, Routing
from sere_autotune.trial.stats import DropRejector
from sere_autotune.trial.wave import Wave
from sere_autotune.tuning.space import EXACT, S_STEPS, Choice, Space, spared_layers
from sere_autotune.tuning.spec import BucketEdges
from sere_ext.contract.policy import EXACT_POLICY, Bucket, Kind, Policy

Floats = NDArray[np.float64]
LAWS = ("knee", "cliff", "ramp")
EXPERTS, TOP_K, LAYERS, BATCH, WIDTH = 64, 8, 6, 16, 16
KINDS = (Kind.SERE, Kind.TOPK, Kind.OEA)
EDGES = (BucketEdges(min_tokens=8, max_tokens=64),)
SHARES = (0.0, 0.5)  # of minShare, as a search tries by default
EXACT_RIGHT = 0.85
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


@dataclass(frozen=True)
class Placed(Choice):
    """A choice between two whole values of S of which the larger is elsewhere than in the first layers."""

    larger: tuple[int, ...] = ()  # the layers that have it


@dataclass
class World(Truth):
    """A made-up model. `seed` draws its experts, routing and how harmful errors are."""

    law: str
    seed: int
    noise_floor: float = 0.02  # share of items on which exact routing differs from itself
    scatter: float = 0.15  # of a block's mean time, on the log scale
    _rows: dict[Choice, Floats] = field(default_factory=dict)

    experts, top_k, layers = EXPERTS, TOP_K, LAYERS

    def __post_init__(self) -> None:
        rng = np.random.default_rng([LAWS.index(self.law), self.seed])
        centres, alike = rng.normal(size=(12, WIDTH)), rng.uniform(0.0, 1.2)
        self.outputs = [
            centres[rng.integers(12, size=EXPERTS)] * alike + rng.normal(size=(EXPERTS, WIDTH)) for _ in range(LAYERS)
        ]
        skew = rng.uniform(0.8, 1.4)
        self.popular = [rng.permutation(-skew * np.log(np.arange(1, EXPERTS + 1))) for _ in range(LAYERS)]
        self.harm = float(np.exp(rng.normal(0.0, 0.6)))  # of an output error
        self.share = float(rng.uniform(0.45, 0.85))  # of an exact step that experts take
        self.seen, self.true = self._routing(rng, 4), self._routing(rng, 8)
        self.similarity = [self._alike(vectors) for vectors in self.outputs]
        self.space = Space(EDGES, KINDS, TOP_K, None, tuple(range(LAYERS)), SHARES)

    def _routing(self, rng: np.random.Generator, steps: int) -> Routing:
        def call(layer: int) -> Call:
            return Call.of((self.popular[layer] + rng.gumbel(size=(BATCH, EXPERTS))).astype(np.float32), TOP_K)

        return Routing(tuple(tuple(call(layer) for _ in range(steps)) for layer in range(LAYERS)))

    @staticmethod
    def _alike(vectors: Floats) -> NDArray[np.float32]:
        """1 - distance / largest distance of the experts' outputs, as the paper's Frobenius metric; [E, E]."""
        apart = np.linalg.norm(vectors[:, None] - vectors[None], axis=2)
        return (1 - apart / apart.max()).astype(np.float32)

    @cached_property
    def _states(self) -> Any:
        return layer_states(self.true, self.similarity)

    def _layered(self, choice: Choice) -> Floats:
        """[layers, 4]: active experts, slots of a token, tokens of the busiest expert, squared relative output error."""
        if choice not in self._rows:
            S = int(choice.S) if choice.kind is not Kind.EXACT else None
            bucket = Bucket(min_tokens=1, kind=choice.kind, S=S, rho=choice.rho, min_share=choice.share or None)
            rows = np.zeros((LAYERS, 4))
            for layer, (state, calls) in enumerate(zip(self._states, self.true.calls, strict=True)):
                state.load_table((bucket,))
                for call in calls:
                    before, after = mix(call.ids, call.weights, EXPERTS), mix(*rerouted(state, call), EXPERTS)
                    out = before @ self.outputs[layer]
                    error = np.linalg.norm((after - before) @ self.outputs[layer], axis=1) / np.linalg.norm(out, axis=1)
                    used = after != 0
                    rows[layer] += (
                        used.any(axis=0).sum(),
                        used.sum() / BATCH,
                        used.sum(axis=0).max(),
                        np.minimum(error, 2.0).mean() ** 2,
                    )
            self._rows[choice] = rows / len(self.true.calls[0])
        return self._rows[choice]

    def choice_of(self, policy: Policy) -> Choice:
        """The choice whose layers route as the policy's; its kind, rho and minShare must be the same in all of them."""
        if not policy.uses_rerouting():
            return EXACT
        rows = [row for layer in range(LAYERS) for row in policy.table_for(layer)]
        kept = [row.S or 0 for row in rows]
        ways, whole = {(row.kind, row.rho) for row in rows}, min(kept)
        assert len(ways) == 1 and len(rows) == LAYERS and max(kept) <= whole + 1, (
            f"no choice of this world has the policy {policy}"
        )
        (kind, rho), *_ = ways
        larger = tuple(layer for layer, S in enumerate(kept) if S > whole)
        of_steps = {round(step * LAYERS / S_STEPS): step / S_STEPS for step in range(S_STEPS)}
        S = whole + of_steps.get(len(larger), len(larger) / LAYERS)
        found = Choice(kind, S, rho, max(row.min_share or 0.0 for row in rows))
        return found if larger == tuple(spared_layers(found, range(LAYERS))) else self._placed(found, larger)

    def candidates(self) -> Iterator[Choice]:
        """Every choice, with its larger S in the layers that it has under each order of the quarters."""
        orders = [[layer for quarter in order for layer in quarter] for order in itertools.permutations(quarters(LAYERS))]
        for choice in self.space.choices():
            yield choice
            others = {tuple(sorted(spared_layers(choice, order))) for order in orders}
            for larger in sorted(others - {tuple(spared_layers(choice, range(LAYERS)))}):
                yield self._placed(choice, larger)

    @staticmethod
    def _placed(choice: Choice, larger: tuple[int, ...]) -> Placed:
        return Placed(choice.kind, choice.S, choice.rho, choice.share, larger)

    def _between(self, choice: Choice) -> Floats:
        """[layers, 4] of a choice, as `_layered` has them of whole S."""
        larger = choice.larger if isinstance(choice, Placed) else ()
        return between(choice, (*larger, *(layer for layer in range(LAYERS) if layer not in larger)), self._layered)

    def drop(self, choice: Choice) -> float:
        """True share of items lost, net of those gained."""
        error = self._between(choice)[:, 3]
        if self.law == "knee":
            total = self.harm * error.mean()
            return 0.7 / (1 + math.exp(-(math.log(total + 1e-9) - math.log(0.25)) / 0.45)) if total else 0.0
        weight = np.exp(-np.arange(LAYERS) / 2) if self.law == "cliff" else np.linspace(0.3, 1.7, LAYERS)
        total = self.harm * float((weight * error).sum() / weight.sum())
        return 0.7 * (1 - math.exp(-((total / 0.25) ** 2.2))) if self.law == "cliff" else min(0.7, 0.35 * total**1.3)

    def time(self, choice: Choice) -> float:
        """True time of a step, exact routing = 1."""
        return self._step(self._between(choice)) / self._step(self._layered(EXACT))

    def _step(self, rows: Floats) -> float:
        active, slots, busiest = rows[:, 0], rows[:, 1], rows[:, 2]
        exact = self._layered(EXACT)
        if self.law == "knee":
            work = np.maximum(active / exact[:, 0], 0.45 * slots / TOP_K)
        elif self.law == "cliff":
            work = np.ceil(active / 4) * 4 / exact[:, 0] * 0.8 + 0.2 * busiest / exact[:, 2]
        else:
            work = np.maximum(active - 6, 1.0) ** 0.85 / np.maximum(exact[:, 0] - 6, 1.0) ** 0.85 + 0.1 * slots / TOP_K
        return 1 - self.share + self.share * float(work.mean())

    def counts(self, choice: Choice) -> tuple[float, float]:
        active, slots = self._between(choice)[:, :2].mean(axis=0)
        return float(active), float(slots)

    def discordance(self, choice: Choice) -> tuple[float, float]:
        drop = self.drop(choice)
        return drop * 1.15 + self.noise_floor / 2, drop * 0.15 + self.noise_floor / 2

    def right(self, prompts: Sequence[str], choice: Choice, source: np.random.Generator) -> NDArray[np.bool_]:
        """Losses are nested: an item that one choice loses is lost under every choice that loses more."""
        drop = self.drop(choice)
        lost, gained = 1.15 * drop / EXACT_RIGHT, 0.15 * drop / (1 - EXACT_RIGHT)
        item = np.array([uniforms(prompt) for prompt in prompts])
        found = np.where(item[:, 0] < EXACT_RIGHT, item[:, 1] >= lost, item[:, 1] < gained)
        found ^= source.random(len(prompts)) < self.noise_floor / 2
        return found


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
        return EngineFacts(key=KEY, top_k=world.top_k, ranks=1, layers=tuple(range(world.layers)), experts=world.experts)

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


_UNIFORMS: dict[str, tuple[float, float]] = {}


def uniforms(prompt: str) -> tuple[float, float]:
    """Two numbers of an item, always the same: whether exact routing is right, and how fragile its answer is."""
    if prompt not in _UNIFORMS:
        digest = hashlib.sha256(prompt.encode()).digest()
        _UNIFORMS[prompt] = (int.from_bytes(digest[:6]) / 2**48, int.from_bytes(digest[6:12]) / 2**48)
    return _UNIFORMS[prompt]


def seeded(law: str, seed: int) -> World:
    """A world with a noise floor, and blocks that scatter, as published models and busy machines show."""
    draw = random.Random(f"{law} {seed}")
    return World(law, seed, noise_floor=draw.choice([0.005, 0.02, 0.04]), scatter=draw.choice([0.05, 0.15, 0.3]))
