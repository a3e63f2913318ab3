"""The search space: per batch-size bucket a kind, S and rho, and minShare where it is searched. Pure.

Optuna sees one flat space of fixed shape (`b0.kind`, `b0.S`, `b0.rho`, `b1.kind`, ...), so that every sampler can
work on it; rho is ignored where the kind has none, minShare at S = 1, where a token keeps its largest weight anyway.

S moves in quarters: 2.25 is S = 3 in the first quarter of the MoE layers and S = 2 in the rest. What is lost in an early
layer is carried through all later ones, and between S and S + 1 lies most of what a budget of a point can buy. That
the early layers are the ones to spare is a guess; whether a table keeps the budget is measured and certified like any.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from sere_ext.contract.policy import MAX_TOKENS, Bucket, Kind, LayerGroup, Policy

from sere_autotune.tuning.spec import BucketEdges

RHO_STEP = 0.05
RHO_MAX = 0.95
S_STEPS = 4  # between S and S + 1

# arXiv 2602.07616's evaluation configurations and the settings of its README.
PAPER_SETTINGS = ((2, 0.1), (2, 0.0), (1, 0.1))


@dataclass(frozen=True)
class Choice:
    """What one bucket does."""

    kind: Kind
    S: float = 1  # whole, or between two whole numbers by layers
    rho: float = 0.0
    share: float = 0.0  # minShare: of its top S a token keeps those with this share of its largest weight


EXACT = Choice(Kind.EXACT)
Table = tuple[Choice, ...]  # one per bucket


def auto_buckets(levels: Sequence[int], batches: Sequence[float]) -> tuple[BucketEdges, ...]:
    """One bucket per load level: from half its batch to four times, neighbours meeting between their batches.

    Args:
        levels: concurrencies; 0 stands for the open loop.
        batches: mean requests in flight that exact routing had at each level (used for the open loop).
    """
    sizes = [level or max(1, round(batch)) for level, batch in zip(levels, batches, strict=True)]
    edges: list[BucketEdges] = []
    for index, size in enumerate(sizes):
        low = max(1, size // 2) if index == 0 else edges[-1].max_tokens + 1
        last = index + 1 == len(sizes)
        high = max(size * 4, 64) if last else max(size, round((size * sizes[index + 1]) ** 0.5))
        # A step that also prefills sees more tokens; past the last edge the union of a batch covers nearly all experts.
        edges.append(BucketEdges(min_tokens=low, max_tokens=min(max(high, low), MAX_TOKENS)))
    return tuple(edges)


@dataclass(frozen=True)
class Space:
    """All tables that may be tried."""

    edges: tuple[BucketEdges, ...]
    kinds: tuple[Kind, ...]
    top_k: int
    similarity_digest: str | None = None
    layers: tuple[int, ...] = ()  # the model's numbers of its MoE layers; () searches whole S alone
    shares: tuple[float, ...] = (0.0,)  # to be tried for minShare; 0 keeps all of the top S

    def __post_init__(self) -> None:
        assert list(self.layers) == sorted(self.layers)

    @property
    def step(self) -> float:
        """Of S: a quarter, or 1 where there are too few layers for quarters."""
        return 1 / S_STEPS if len(self.layers) >= S_STEPS else 1.0

    def choices(self) -> list[Choice]:
        """Every choice of one bucket, exact first."""
        found = [EXACT]
        rhos = [round(i * RHO_STEP, 2) for i in range(round(RHO_MAX / RHO_STEP) + 1)]
        for kind in self.kinds:
            for S in np.arange(1.0, self.top_k, self.step).tolist():
                for rho in rhos if kind.needs_similarity else [0.0]:
                    found += [Choice(kind, S, rho, share) for share in (self.shares if S > 1 else (0.0,))]
        return found

    def distributions(self) -> dict[str, optuna.distributions.BaseDistribution]:
        names = [kind.value for kind in (Kind.EXACT, *self.kinds)]
        found: dict[str, optuna.distributions.BaseDistribution] = {}
        for index in range(len(self.edges)):
            found[f"b{index}.kind"] = optuna.distributions.CategoricalDistribution(names)
            found[f"b{index}.S"] = optuna.distributions.FloatDistribution(1.0, max(1.0, self.top_k - self.step), step=self.step)
            found[f"b{index}.rho"] = optuna.distributions.FloatDistribution(0.0, RHO_MAX, step=RHO_STEP)
            if self.shares != (0.0,):
                found[f"b{index}.share"] = optuna.distributions.CategoricalDistribution(self.shares)
        return found

    def params(self, table: Table) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for index, choice in enumerate(table):
            found |= {f"b{index}.kind": choice.kind.value, f"b{index}.S": choice.S, f"b{index}.rho": choice.rho}
            if self.shares != (0.0,):
                found[f"b{index}.share"] = choice.share if choice.share in self.shares else self.shares[0]
        return found

    def table(self, params: dict[str, Any]) -> Table:
        found = []
        for index in range(len(self.edges)):
            kind, S = Kind(params[f"b{index}.kind"]), float(params[f"b{index}.S"])
            rho = round(float(params[f"b{index}.rho"]), 2) if kind.needs_similarity else 0.0
            share = float(params.get(f"b{index}.share", 0.0)) if S > 1 else 0.0
            found.append(EXACT if kind is Kind.EXACT else Choice(kind, S, rho, share))
        return tuple(found)

    def policy(self, table: Table) -> Policy:
        needs = any(c.kind.needs_similarity for c in table)
        # Layers are cut where some bucket's S steps down; what follows the last cut is the policy's own table.
        cuts = sorted({self._spared(choice) for choice in table} - {0})
        groups = []
        for first, last in itertools.pairwise([0, *cuts]):
            buckets = self._buckets(table, first)
            groups.append(LayerGroup(first_layer=self.layers[first], last_layer=self.layers[last - 1], buckets=buckets))
        return Policy(
            buckets=self._buckets(table, cuts[-1] if cuts else 0),
            layer_groups=tuple(groups),
            similarity_digest=self.similarity_digest if needs else None,
        )

    def _spared(self, choice: Choice) -> int:
        """How many of the first MoE layers keep one expert more than the rest."""
        return 0 if choice.kind is Kind.EXACT else round((choice.S - int(choice.S)) * len(self.layers))

    def _buckets(self, table: Table, index: int) -> tuple[Bucket, ...]:
        """The buckets that hold for the MoE layer at `index`."""
        found = []
        for edge, c in zip(self.edges, table, strict=True):
            if c.kind is not Kind.EXACT:
                S = int(c.S) + (index < self._spared(c))
                share = c.share if c.share and S > 1 else None
                low, high = edge.min_tokens, edge.max_tokens
                found.append(Bucket(min_tokens=low, max_tokens=high, kind=c.kind, S=S, min_share=share, rho=c.rho))
        return tuple(found)

    def exact(self) -> Table:
        return (EXACT,) * len(self.edges)

    def first_trials(self, trials: int) -> list[Table]:
        """Exact routing, then the paper's settings: at most a third of the trials."""
        settings = [
            Choice(Kind.SERE, S, rho) if Kind.SERE in self.kinds else Choice(self.kinds[0], S)
            for S, rho in PAPER_SETTINGS
            if S < self.top_k
        ]
        distinct = list(dict.fromkeys(settings))[: max(1, trials // 3)]
        return [self.exact(), *((choice,) * len(self.edges) for choice in distinct)][:trials]
