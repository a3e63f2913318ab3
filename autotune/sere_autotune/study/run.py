"""What every stage of a tuning works with: the engine, the reporter, and what the run has found so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sere_autotune.study.budget import Budget
from sere_autotune.study.schema import EDGES, LAYER_ORDER
from sere_autotune.study.study import TuningStudy
from sere_autotune.trial.engine import BlockReport, EngineFacts, Reject
from sere_autotune.trial.items import Item
from sere_autotune.trial.load import Load, Request
from sere_autotune.trial.routing import Routing
from sere_autotune.trial.traffic import Traffic
from sere_autotune.trial.wave import Wave
from sere_autotune.tuning.space import Space, auto_buckets
from sere_autotune.tuning.spec import BucketEdges, TuningSpec
from sere_ext.contract.policy import Policy


class Engine(Protocol):
    """What the stages need of an engine; `trial.warm.WarmEngine` is the real one."""

    start_seconds: float

    def limit(self, left_s: Callable[[], float]) -> None: ...  # seconds that the budget still allows: no call outlives it
    def start(self) -> EngineFacts: ...
    def apply(self, policy: Policy) -> None: ...
    def block(
        self,
        requests: Sequence[Request],
        load: Load,
        fillers: Sequence[Request] = (),
        deadline_s: float | None = None,
        reject: Reject | None = None,
        expected_s: float | None = None,
    ) -> BlockReport: ...
    def wave(self, requests: Sequence[Request], tokens: int, bucket: str) -> Wave: ...  # so many together, decoded to one length
    def record(self) -> None: ...  # the router calls of the next block's first steps, under exact routing
    def recorded(self) -> Routing | None: ...  # what was recorded; None where this engine cannot
    def stop(self) -> None: ...


class Reporter(Protocol):
    """Receives what happens in a run; draws the live table and publishes progress."""

    def stage(self, name: str, total: int, done: int = 0) -> None: ...
    def trial(self, row: dict[str, Any]) -> None: ...
    def step(self, text: str, left_s: float) -> None: ...


@dataclass
class Run:
    """Everything a stage works with."""

    spec: TuningSpec
    study: TuningStudy
    engine: Engine
    budget: Budget
    traffic: Traffic
    search: list[Item]
    cert: list[Item]
    report: Reporter
    similarity: Path | None = None  # the artefact that the engine reads
    similarity_digest: str | None = None
    facts: EngineFacts | None = None
    advisory: bool = False
    cert_items: int = 0  # how many items of `cert` the certificate may use, from the plan
    alpha: float = 0.05  # significance level that is left for it after earlier studies opened these items, from the plan

    @property
    def max_drop(self) -> float:
        return self.spec.accuracy.max_drop_points / 100

    def left_s(self) -> float:
        return self.budget.left_s(time.monotonic())

    def load(self, level: int, warmup_residences: float, residence_s: float, seed: int) -> Load:
        """The load of a level, with its warm-up in requests."""
        spec = self.spec.workload.load
        if level:
            return Load(concurrency=level, warmup=round(warmup_residences * level))
        rate = spec.requests_per_second or 1.0
        return Load(rate=rate, seed=seed, warmup=max(5, round(warmup_residences * residence_s * rate)))

    def space(self) -> Space:
        """The space, its bucket edges and order of layers frozen in the study as soon as they are known."""
        assert self.facts is not None
        levels = self.spec.workload.load.levels
        frozen = self.study.get(EDGES)
        if frozen:
            edges = tuple(frozen)
        elif self.spec.search.buckets:
            edges = self.spec.search.buckets
        elif all(levels):
            edges = auto_buckets(levels, levels)  # until exact routing has shown how many tokens its steps have; so below
        else:
            edges = tuple(BucketEdges(min_tokens=1) for _ in levels)
        order = self.study.get(LAYER_ORDER)
        layers = self.facts.layers if self.spec.search.layer_groups else ()
        return Space(
            edges,
            self.spec.search.policies,
            self.facts.top_k,
            self.similarity_digest,
            layers,
            self.spec.search.min_share,
            self.spec.search.s_values or (),
            tuple(order or ()),
        )
