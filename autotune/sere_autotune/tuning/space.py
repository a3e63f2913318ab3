"""The search space: for each range of batch sizes a kind of routing, S, rho and minShare. Pure.

Optuna sees one flat space of fixed shape (`b0.kind`, `b0.S`, `b0.rho`, `b1.kind`, ...), so that every sampler can
work on it. Values that a kind does not use are ignored: rho of kinds without similarity, and minShare at S = 1, where a token
keeps its one expert anyway.

S moves in quarters, since most of what one point of accuracy can buy lies between S and S + 1: 2.25 means S = 3 in a quarter of
the MoE layers and S = 2 in the rest. Which layers come first for the larger S is the `order` of a space: the model's own order,
until a search has measured a better one (`search/layer_order.py`). Every table is measured and certified, whatever the order.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna

from sere_autotune.tuning.spec import BucketEdges
from sere_ext.contract.errors import UsageError
from sere_ext.contract.policy import MAX_TOKENS, Bucket, Kind, LayerGroup, Policy

RHO_STEP = 0.05
RHO_MAX = 0.95
S_STEPS = 4  # steps of the search between S and S + 1

# Kind, S and rho of the tables that a search tries before it knows anything. Kind oea at S = 2 comes first, since it loses the least
# for the experts that it touches (docs/policies.md); then the settings of arXiv 2602.07616, which are of kind sere.
FIRST_SETTINGS = ((Kind.OEA, 2, 0.0), (Kind.SERE, 2, 0.1), (Kind.SERE, 2, 0.0), (Kind.SERE, 1, 0.1))


@dataclass(frozen=True)
class Choice:
    """The routing of one range of batch sizes."""

    kind: Kind
    S: float = 1  # top experts kept; a fraction is split over the layers
    rho: float = 0.0
    share: float = 0.0  # minShare: least share of the largest weight that an expert of the top S must have to be kept


EXACT = Choice(Kind.EXACT)
Table = tuple[Choice, ...]  # one per bucket


def spared_layers(choice: Choice, order: Sequence[int]) -> Sequence[int]:
    """The layers in which a choice keeps one expert more than in the others: as many as its fraction of S asks for.

    Args:
        order: the positions of all MoE layers among the MoE layers; those that get the larger S first come first.
    """
    return order[: round((choice.S - int(choice.S)) * len(order))]


def auto_buckets(
    levels: Sequence[int], batches: Sequence[float], steps: Sequence[float | None] = (), least: float = 1.0
) -> tuple[BucketEdges, ...]:
    """One range of step sizes for each load level: up to four times what its steps have, with neighbours meeting in between.

    A step has a token for every request, and one more for every draft that is verified, so it may have several times as many
    tokens as requests. The lowest range begins at half of the requests, since a step may be without drafts; at fewer where the
    fastest policy leaves fewer in flight in the open loop.

    Args:
        levels: concurrencies; 0 stands for the open loop.
        batches: mean requests in flight that exact routing had at each level (used for the open loop).
        steps: tokens of its median step at each level; None, or nothing at all, where that was not counted.
        least: requests in flight under the fastest policy over those under exact routing; below 1 in the open loop alone.
    """
    requests = [level or max(1, round(batch)) for level, batch in zip(levels, batches, strict=True)]
    sizes: list[int] = []
    for count, tokens in zip(requests, steps or [None] * len(requests), strict=True):
        sizes.append(max(count, round(tokens or 0), sizes[-1] + 1 if sizes else 1))
    edges: list[BucketEdges] = []
    for index, size in enumerate(sizes):
        low = max(1, min(requests[0] // 2, int(requests[0] * least))) if index == 0 else edges[-1].max_tokens + 1
        last = index + 1 == len(sizes)
        high = max(size * 4, 64) if last else max(size, round((size * sizes[index + 1]) ** 0.5))
        # A step that also prefills sees more tokens; past the last edge the union of a batch covers nearly all experts.
        edges.append(BucketEdges(min_tokens=low, max_tokens=min(max(high, low), MAX_TOKENS)))
    return tuple(edges)


@dataclass(frozen=True)
class Space:
    """All tables that a search may try."""

    edges: tuple[BucketEdges, ...]
    kinds: tuple[Kind, ...]
    top_k: int
    similarity_digest: str | None = None
    layers: tuple[int, ...] = ()  # model layer numbers of the MoE layers; () searches whole numbers of S alone
    shares: tuple[float, ...] = (0.0,)  # values of minShare to try; 0 keeps all of the top S
    s_values: tuple[float, ...] = ()  # values of S to try; () tries all
    order: tuple[
        int, ...
    ] = ()  # positions in `layers`; those that get the larger S first come first. () is the model's own order

    def __post_init__(self) -> None:
        """Raises UsageError where a value of S cannot be tried on this model."""
        assert list(self.layers) == sorted(self.layers)
        assert not self.order or sorted(self.order) == list(range(len(self.layers)))
        if unknown := [S for S in self.s_values if S not in self._grid()]:
            shown = ", ".join(f"{S:g}" for S in self._grid())
            raise UsageError(f"search.sValues: {unknown[0]:g} cannot be tried on this model; take some of {shown}")

    @property
    def step(self) -> float:
        """Step of S in the search: a quarter, or 1 where there are too few layers to split."""
        return 1 / S_STEPS if len(self.layers) >= S_STEPS else 1.0

    def _grid(self) -> list[float]:
        """Every value of S that the model allows."""
        found: list[float] = np.arange(1.0, self.top_k, self.step).tolist()
        return found

    def choices(self) -> list[Choice]:
        """Every choice for one range of batch sizes, exact routing first."""
        found = [EXACT]
        rhos = [round(i * RHO_STEP, 2) for i in range(round(RHO_MAX / RHO_STEP) + 1)]
        for kind in self.kinds:
            for S in self.s_values or self._grid():
                for rho in rhos if kind.needs_similarity else [0.0]:
                    found += [Choice(kind, S, rho, share) for share in (self.shares if S > 1 else (0.0,))]
        return found

    def distributions(self) -> dict[str, optuna.distributions.BaseDistribution]:
        """Optuna's parameters and their ranges."""
        names = [kind.value for kind in (Kind.EXACT, *self.kinds)]
        found: dict[str, optuna.distributions.BaseDistribution] = {}
        for index in range(len(self.edges)):
            found[f"b{index}.kind"] = optuna.distributions.CategoricalDistribution(names)
            found[f"b{index}.S"] = (
                optuna.distributions.CategoricalDistribution(self.s_values)
                if self.s_values
                else optuna.distributions.FloatDistribution(1.0, max(1.0, self.top_k - self.step), step=self.step)
            )
            found[f"b{index}.rho"] = optuna.distributions.FloatDistribution(0.0, RHO_MAX, step=RHO_STEP)
            if self.shares != (0.0,):
                found[f"b{index}.share"] = optuna.distributions.CategoricalDistribution(self.shares)
        return found

    def params(self, table: Table) -> dict[str, Any]:
        """A table as the values of Optuna's parameters."""
        found: dict[str, Any] = {}
        for index, choice in enumerate(table):
            S = choice.S if not self.s_values or choice.S in self.s_values else self.s_values[0]  # exact routing has none
            found |= {f"b{index}.kind": choice.kind.value, f"b{index}.S": S, f"b{index}.rho": choice.rho}
            if self.shares != (0.0,):
                found[f"b{index}.share"] = choice.share if choice.share in self.shares else self.shares[0]
        return found

    def table(self, params: dict[str, Any]) -> Table:
        """The table that values of Optuna's parameters stand for."""
        found = []
        for index in range(len(self.edges)):
            kind, S = Kind(params[f"b{index}.kind"]), float(params[f"b{index}.S"])
            rho = round(float(params[f"b{index}.rho"]), 2) if kind.needs_similarity else 0.0
            share = float(params.get(f"b{index}.share", 0.0)) if S > 1 else 0.0
            found.append(EXACT if kind is Kind.EXACT else Choice(kind, S, rho, share))
        return tuple(found)

    def policy(self, table: Table) -> Policy:
        """The policy that an engine is given for a table."""
        needs = any(c.kind.needs_similarity for c in table)
        positions = range(len(self.layers))
        order = self.order or positions
        tables = [self._buckets(table, order, position) for position in positions]
        # Where the larger S comes last there is none, so that layer has what the policy's own table says of the rest.
        rest = tables[order[-1]] if tables else self._buckets(table, order, 0)
        groups = []
        for buckets, found in itertools.groupby(positions, tables.__getitem__):
            alike = [self.layers[position] for position in found]
            if buckets != rest:
                groups.append(LayerGroup(first_layer=alike[0], last_layer=alike[-1], buckets=buckets))
        return Policy(
            buckets=rest,
            layer_groups=tuple(groups),
            similarity_digest=self.similarity_digest if needs else None,
        )

    def _buckets(self, table: Table, order: Sequence[int], position: int) -> tuple[Bucket, ...]:
        """The buckets of the MoE layer at a position in `layers`."""
        found = []
        for edge, c in zip(self.edges, table, strict=True):
            if c.kind is not Kind.EXACT:
                S = int(c.S) + (position in spared_layers(c, order))
                share = c.share if c.share and S > 1 else None
                low, high = edge.min_tokens, edge.max_tokens
                found.append(Bucket(min_tokens=low, max_tokens=high, kind=c.kind, S=S, min_share=share, rho=c.rho))
        return tuple(found)

    def exact(self) -> Table:
        """Exact routing at every batch size."""
        return (EXACT,) * len(self.edges)

    def first_trials(self, trials: int) -> list[Table]:
        """The tables of the first trials: exact routing, then FIRST_SETTINGS, which are at most a third of all trials, at least one.

        A setting of kind oea has the least minShare above 0 that is searched. Where none of FIRST_SETTINGS is searched, the first kind that
        is takes their place, with their S or with those that are searched.
        """
        share = next((share for share in self.shares if share > 0), 0.0)
        settings = [
            Choice(kind, S, rho, share if kind is Kind.OEA else 0.0)
            for kind, S, rho in FIRST_SETTINGS
            if S < self.top_k and kind in self.kinds and (not self.s_values or S in self.s_values)
        ]
        if not settings:
            given = self.s_values or tuple(S for _, S, _ in FIRST_SETTINGS if S < self.top_k)
            settings = [Choice(self.kinds[0], S) for S in given]
        distinct = list(dict.fromkeys(settings))[: max(1, trials // 3)]
        return [self.exact(), *((choice,) * len(self.edges) for choice in distinct)][:trials]
