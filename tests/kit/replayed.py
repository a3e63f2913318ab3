"""A world whose answers a real model gave: `benchmarks/recorded.py` wrote them down, item by item, for a grid of choices.

The recorded items are the population: a choice's true drop is its share of right answers below exact routing's, over all of them
and all runs. Every study draws its items from it with replacement, by a hash of the item's prompt and the study's seed, so that
the items of its search and of its certificate are as independent as those of any two benchmarks. In every block each item's answer
comes from a run drawn for it, since a block's batches are never the same twice.

A step takes a + b * active + c * slots, fitted to measured steps of the widened model. Choices off the grid of rho have what the
nearest rho of the grid has; other values of S are not in the world's space, nor are other layers with the larger S than the first.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sere_autotune.search.replay import count
from sere_autotune.trial.routing import Call, Routing
from sere_autotune.tuning.space import EXACT, Choice, Space
from sere_ext.contract.errors import PolicyError
from sere_ext.contract.policy import Kind, Policy
from tests.kit import ROOT
from tests.kit.truth import EDGES, KINDS, Truth

RESULTS = ROOT / "benchmarks" / "results"
LAW = "replayed"
Bools = NDArray[np.bool_]


class Recording:
    """The answers of one model, as the file holds them.

    Args:
        held: the file, decoded.
        cost: a, b and c of a step's milliseconds, a + b * active + c * slots.
    """

    def __init__(self, held: dict[str, Any], cost: tuple[float, float, float]) -> None:
        self.items, self.top_k, self.cost = held["items"], held["topK"], cost
        shape = (held["layers"], held["experts"])
        self.similarity = [matrix.astype(np.float32) for matrix in halves(held["similarity"], (*shape, shape[1]))]
        logits = halves(held["logits"], (held["layers"], held["calls"], -1, held["experts"])).astype(np.float32)
        self.seen = Routing(tuple(tuple(Call.of(call, self.top_k) for call in layer) for layer in logits))
        self.right: dict[Choice, Bools] = {}  # [runs, items]
        self.counts: dict[Choice, tuple[float, float]] = {}  # active experts, slots
        for name, runs in held["cells"].items():
            kind, S, rho = name.split()
            choice = Choice(Kind(kind), float(S), float(rho)) if kind != "exact" else EXACT
            self.right[choice] = np.array([bits(run["right"], self.items) for run in runs])
            means = [float(np.mean([run[key] for run in runs])) for key in ("active", "slots")]
            self.counts[choice] = (means[0], means[1])

    @classmethod
    def read(cls, answers: Path = RESULTS / "recorded-rows_moe.json", steps: Path = RESULTS / "ext.json") -> Recording:
        """The committed recording, with steps as `make bench-ext` measured them."""
        return cls(json.loads(answers.read_text()), step_cost(json.loads(steps.read_text())["widened"]["arms"]))

    @property
    def s_values(self) -> tuple[float, ...]:
        return tuple(sorted({choice.S for choice in self.right if choice.kind is not Kind.EXACT}))

    def nearest(self, choice: Choice) -> Choice:
        """The recorded choice of the same kind and S with the nearest rho, the smaller of two equally near ones."""
        near = [known for known in self.right if known.kind is choice.kind and (known.S == choice.S or choice.kind is Kind.EXACT)]
        if not near:
            raise KeyError(f"{choice} was not recorded")
        return min(near, key=lambda known: (round(abs(known.rho - choice.rho), 9), known.rho))

    @property
    def noise_floor(self) -> float:
        """Share of items on which two runs of exact routing disagree, mean over all pairs of runs."""
        runs = self.right[EXACT]
        pairs = [(a != b).mean() for i, a in enumerate(runs) for b in runs[:i]]
        return float(np.mean(pairs)) if pairs else 0.0


def step_cost(arms: Sequence[dict[str, Any]], concurrency: int = 16) -> tuple[float, float, float]:
    """a, b and c by least squares over the arms with counters: decode steps of `concurrency` requests, in milliseconds."""
    rows = [arm for arm in arms if arm["concurrency"] == concurrency and "active" in arm]
    design = np.array([[1.0, arm["active"], arm["slots"]] for arm in rows])
    a, b, c = np.linalg.lstsq(design, np.array([arm["tpotMs"] for arm in rows]), rcond=None)[0]
    return float(a), float(b), float(c)


def bits(text: str, items: int) -> Bools:
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8), count=items).astype(bool)


def halves(text: str, shape: tuple[int, ...]) -> NDArray[np.float16]:
    return np.frombuffer(base64.b64decode(text), "<f2").reshape(shape)


class Replayed(Truth):
    """One study's view of a recording; `seed` draws its items and how much its blocks scatter."""

    law = LAW

    def __init__(self, recording: Recording, seed: int) -> None:
        self.recording, self.seed = recording, seed
        self.scatter = random.Random(f"{LAW} {seed}").choice([0.05, 0.15, 0.3])
        self.similarity, self.seen = recording.similarity, recording.seen
        self.top_k, self.layers, self.experts = recording.top_k, len(self.seen.calls), self.seen.experts
        self.tpot_ms = self._step_ms(EXACT)
        self.space = Space(EDGES, KINDS, self.top_k, None, tuple(range(self.layers)), s_values=recording.s_values)
        self._rows: dict[str, int] = {}

    def choice_of(self, policy: Policy) -> Choice:
        """The recorded choice whose policy this is.

        Raises:
            PolicyError: it has the larger S in layers that no recorded choice has it in, so that the search keeps to the first layers.
        """
        found = self._choices.get(policy.model_copy(update={"similarity_digest": None}).digest)
        if found is None and policy.layer_groups:
            raise PolicyError(f"nobody recorded {policy.describe()}")
        assert found is not None, f"no choice of this world has the policy {policy}"
        return found

    @cached_property
    def _choices(self) -> dict[str, Choice]:
        return {self.space.policy((choice,)).digest: choice for choice in self.space.choices()}

    def drop(self, choice: Choice) -> float:
        """Over all recorded items."""
        right = self.recording.right
        return float(right[EXACT].mean() - right[self.recording.nearest(choice)].mean())

    def counts(self, choice: Choice) -> tuple[float, float]:
        """Recorded where the choice was, else counted on the router calls that were kept."""
        try:
            return self.recording.counts[self.recording.nearest(choice)]
        except KeyError:
            return self._counted[choice]

    @cached_property
    def _counted(self) -> dict[Choice, tuple[float, float]]:
        """Of `topk` with whole S, which an engine is asked to show what active experts cost."""
        choices = [Choice(Kind.TOPK, float(S)) for S in range(1, self.top_k + 1)]
        found = count(self.seen, self.similarity, choices)
        return {c: (float(a), float(s)) for c, a, s in zip(choices, found.active, found.slots, strict=True)}

    def time(self, choice: Choice) -> float:
        return self._step_ms(choice) / self.tpot_ms

    def _step_ms(self, choice: Choice) -> float:
        a, b, c = self.recording.cost
        active, slots = self.counts(choice)
        return a + b * active + c * slots

    def discordance(self, choice: Choice) -> tuple[float, float]:
        exact, other = self.recording.right[EXACT], self.recording.right[self.recording.nearest(choice)]
        first, second = exact.mean(axis=0), other.mean(axis=0)  # of each item, over its runs
        return float((first * (1 - second)).mean()), float((second * (1 - first)).mean())

    def right(self, prompts: Sequence[str], choice: Choice, source: np.random.Generator) -> Bools:
        """What the model answered: of each prompt's item, in a run drawn for it."""
        known = self.recording.right[self.recording.nearest(choice)]
        return known[source.integers(len(known), size=len(prompts)), [self.item(prompt) for prompt in prompts]]

    def item(self, prompt: str) -> int:
        """The recorded item that stands behind a prompt in this study."""
        if prompt not in self._rows:
            digest = hashlib.sha256(f"{self.seed} {prompt}".encode()).digest()
            self._rows[prompt] = int.from_bytes(digest[:8]) % self.recording.items
        return self._rows[prompt]
