"""Made-up models for whole tuning studies: experts, routing, output errors and step times, none by the tuner's own formulas.

A world draws experts (their outputs as vectors), router logits of steps, and from the kernel's own re-routing the change of
every layer's output. What that costs in accuracy and what a step takes are laws of the world (`LAWS`):

    knee     accuracy falls along a logistic curve of the summed output error; a step pays for bytes or for arithmetic,
             whichever is more, layer by layer
    cliff    accuracy holds until an error is reached and then falls steeply, early layers count most; experts are paid in tiles
             of four, and the busiest expert sets a layer's time
    ramp     accuracy falls with a power of the error, late layers count most; the first experts lie in a cache, and
             every further one costs less than the one before

The tuner sees other steps than those that its certificate's blocks are made of. The engine that serves a world is in `truth.py`.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sere_autotune.search.layer_order import quarters
from sere_autotune.search.replay import between, layer_states, mix, rerouted
from sere_autotune.trial.routing import Call, Routing
from sere_autotune.tuning.space import EXACT, S_STEPS, Choice, Space, spared_layers
from sere_ext.contract.policy import Bucket, Kind, Policy
from tests.kit.truth import BATCH, EDGES, KINDS, Truth

Floats = NDArray[np.float64]
LAWS = ("knee", "cliff", "ramp")
EXPERTS, TOP_K, LAYERS, WIDTH = 64, 8, 6, 16
SHARES = (0.0, 0.5)  # of minShare, as a search tries by default
EXACT_RIGHT = 0.85


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


_UNIFORMS: dict[str, tuple[float, float]] = {}


def uniforms(prompt: str) -> tuple[float, float]:
    """Two numbers of an item, always the same: whether exact routing is right, and how fragile its answer is."""
    if prompt not in _UNIFORMS:
        digest = hashlib.sha256(f"world {prompt}".encode()).digest()  # no order that the items have by their own digests
        _UNIFORMS[prompt] = (int.from_bytes(digest[:6]) / 2**48, int.from_bytes(digest[6:12]) / 2**48)
    return _UNIFORMS[prompt]


def seeded(law: str, seed: int) -> World:
    """A world with a noise floor, and blocks that scatter, as published models and busy machines show."""
    draw = random.Random(f"{law} {seed}")
    return World(law, seed, noise_floor=draw.choice([0.005, 0.02, 0.04]), scatter=draw.choice([0.05, 0.15, 0.3]))
