"""Router calls as an engine made them under exact routing: what a policy's active experts and slots are counted from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sere_autotune.tuning.spec import BucketEdges
from sere_ext.routing import kernel

Matrix = NDArray[np.float32]

# Of the logarithm of an expert's popularity over its rank, fitted to the active experts that arXiv 2511.02237 measured.
ASSUMED_SKEW = 1.1
_ASSUMED_LAYERS, _ASSUMED_CALLS = 4, 4
_ALIKE = 1 / 8  # of a step's tokens, which steps of about the same size may differ by


@dataclass(frozen=True)
class Call:
    """One router call of a step under exact routing: T tokens, k slots, E experts."""

    ids: NDArray[np.int32]  # [T, k]
    weights: Matrix  # [T, k]
    logits: Matrix  # [T, E]

    @classmethod
    def of(cls, logits: Matrix, top_k: int, *, renormalise: bool = True) -> Call:
        """The call of a plain softmax router with these logits [T, E]."""
        scores = np.exp(logits - logits.max(axis=1, keepdims=True))
        scores /= scores.sum(axis=1, keepdims=True)
        ids = np.argsort(-scores, axis=1, kind="stable")[:, :top_k].astype(np.int32)
        weights = np.take_along_axis(scores, ids, axis=1)
        if renormalise:
            weights = weights / weights.sum(axis=1, keepdims=True)
        return cls(ids, np.ascontiguousarray(weights, np.float32), np.ascontiguousarray(logits, np.float32))


@dataclass(frozen=True)
class Routing:
    """Router calls by MoE layer, in the model's order; every layer has the same steps."""

    calls: tuple[tuple[Call, ...], ...]  # [layers][steps]
    renormalise: bool = True  # whether a token's weights add up to 1
    scoring: int = kernel.SOFTMAX

    @property
    def experts(self) -> int:
        return self.calls[0][0].logits.shape[1]

    @property
    def top_k(self) -> int:
        return self.calls[0][0].ids.shape[1]

    @property
    def tokens(self) -> int:
        """Of all steps together."""
        return sum(len(call.ids) for call in self.calls[0])

    @classmethod
    def of(cls, layers: Sequence[dict[str, Any]]) -> Routing | None:
        """What `sere_record` of a worker handed over; None where it kept nothing."""
        if not layers or not all(layer["calls"] for layer in layers):
            return None

        def call(kept: dict[str, Any]) -> Call:
            def array(name: str, kind: str) -> NDArray[Any]:
                return np.frombuffer(kept[name], kind).reshape(kept["tokens"], -1)

            return Call(array("ids", "<i4").copy(), array("weights", "<f4").copy(), array("logits", "<f2").astype(np.float32))

        calls = tuple(tuple(call(kept) for kept in layer["calls"]) for layer in layers)
        return cls(calls, layers[0]["renormalise"], layers[0]["scoring"] or kernel.SOFTMAX)

    def within(self, edge: BucketEdges, typical: float) -> Routing | None:
        """Of the steps whose tokens a bucket takes those about as large as most are; None where the bucket takes none.

        A record has as many steps of the sizes at the beginning and the end of a block as of those that it has nearly always.

        Args:
            typical: tokens of the median step.
        """
        off = {
            i: abs(len(call.ids) - typical)
            for i, call in enumerate(self.calls[0])
            if edge.min_tokens <= len(call.ids) <= edge.max_tokens
        }
        steps = [i for i, tokens in off.items() if tokens <= max(_ALIKE * typical, min(off.values()))]
        return replace(self, calls=tuple(tuple(layer[i] for i in steps) for layer in self.calls)) if steps else None

    def thinned(self, share: float) -> Routing:
        """The same steps with a share of their tokens, evenly spaced, at least one of each step."""

        def few(call: Call) -> Call:
            count = max(1, round(share * len(call.ids)))
            rows = np.arange(count) * len(call.ids) // count
            return Call(call.ids[rows], call.weights[rows], call.logits[rows])

        return replace(self, calls=tuple(tuple(map(few, layer)) for layer in self.calls))

    @classmethod
    def assumed(cls, experts: int, top_k: int, tokens: int) -> Routing:
        """Calls of `tokens` tokens as a model with the published skew would make them."""
        rng = np.random.default_rng(0)
        popular = -ASSUMED_SKEW * np.log(np.arange(1, experts + 1))
        layers = []
        for _ in range(_ASSUMED_LAYERS):
            bias = rng.permutation(popular)
            draws = [bias + rng.gumbel(size=(tokens, experts)) for _ in range(_ASSUMED_CALLS)]
            layers.append(tuple(Call.of(draw.astype(np.float32), top_k) for draw in draws))
        return cls(tuple(layers))
