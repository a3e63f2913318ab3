"""The search space: per batch-size bucket a kind, S and rho. Pure.

Optuna sees one flat space of fixed shape (`b0.kind`, `b0.S`, `b0.rho`, `b1.kind`, ...), so that every sampler can
work on it; rho is ignored where the kind has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from sere_ext.policy import MAX_TOKENS, Bucket, Kind, Policy

from sere_autotune.spec import BucketEdges

RHO_STEP = 0.05
RHO_MAX = 0.95

# arXiv 2602.07616's evaluation configurations and the settings of its README.
PAPER_SETTINGS = ((2, 0.1), (2, 0.0), (1, 0.1))


@dataclass(frozen=True)
class Choice:
    """What one bucket does."""

    kind: Kind
    S: int = 1
    rho: float = 0.0

    def describe(self) -> str:
        return Bucket(min_tokens=1, kind=self.kind, S=self.S, rho=self.rho).describe().split(" from ")[0].split(" for ")[0]


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

    def choices(self) -> list[Choice]:
        """Every choice of one bucket, exact first."""
        found = [EXACT]
        rhos = [round(i * RHO_STEP, 2) for i in range(round(RHO_MAX / RHO_STEP) + 1)]
        for kind in self.kinds:
            for S in range(1, self.top_k):
                found += [Choice(kind, S, rho) for rho in (rhos if kind is Kind.SERE else [0.0])]
        return found

    def distributions(self) -> dict[str, optuna.distributions.BaseDistribution]:
        names = [kind.value for kind in (Kind.EXACT, *self.kinds)]
        found: dict[str, optuna.distributions.BaseDistribution] = {}
        for index in range(len(self.edges)):
            found[f"b{index}.kind"] = optuna.distributions.CategoricalDistribution(names)
            found[f"b{index}.S"] = optuna.distributions.IntDistribution(1, max(1, self.top_k - 1))
            found[f"b{index}.rho"] = optuna.distributions.FloatDistribution(0.0, RHO_MAX, step=RHO_STEP)
        return found

    def params(self, table: Table) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for index, choice in enumerate(table):
            found |= {f"b{index}.kind": choice.kind.value, f"b{index}.S": choice.S, f"b{index}.rho": choice.rho}
        return found

    def table(self, params: dict[str, Any]) -> Table:
        found = []
        for index in range(len(self.edges)):
            kind = Kind(params[f"b{index}.kind"])
            rho = round(float(params[f"b{index}.rho"]), 2) if kind is Kind.SERE else 0.0
            found.append(EXACT if kind is Kind.EXACT else Choice(kind, int(params[f"b{index}.S"]), rho))
        return tuple(found)

    def policy(self, table: Table) -> Policy:
        buckets = tuple(
            Bucket(min_tokens=edge.min_tokens, max_tokens=edge.max_tokens, kind=c.kind, S=c.S, rho=c.rho)
            for edge, c in zip(self.edges, table, strict=True)
            if c.kind is not Kind.EXACT
        )
        needs = any(c.kind is Kind.SERE for c in table)
        return Policy(buckets=buckets, similarity_digest=self.similarity_digest if needs else None)

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
