"""What one worker process holds: the policy in force as tables per MoE layer, neighbour lists, counters.

Everything a kernel reads is preallocated and updated in place, so that compiled graphs (and, on CUDA, captured ones)
see a change without being made again. Torch-free: numpy arrays, which kernels on the CPU read as they are.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sere_ext import kernel
from sere_ext.artifact import Similarity, sorted_neighbours
from sere_ext.errors import ConflictError, PolicyError, UnsupportedError
from sere_ext.policy import EXACT_POLICY, MAX_BUCKETS, MAX_TOKENS, Bucket, Kind, Policy

_KIND_CODES = {Kind.EXACT: kernel.EXACT, Kind.SERE: kernel.SERE, Kind.TOPK: kernel.TOPK, Kind.OEA: kernel.OEA}
_MAX_COUNTER_KEYS = 1024  # a tuner tries hundreds of policies in one engine's life; the oldest counters go first
OTHER = "other"  # counter label of calls outside every bucket


@dataclass
class LayerState:
    """One MoE layer. Row `MAX_BUCKETS` of the counters is for calls outside every bucket."""

    number: int  # model layer number
    experts: int
    top_k: int
    renormalise: bool
    scoring: int | None  # kernel.SOFTMAX or SIGMOID; None if the router's scores cannot be recomputed from logits
    rows: list[tuple[int, int, int, int]] = field(default_factory=list)  # min, max tokens, kind code, S
    rho: list[Any] = field(default_factory=list)  # numpy float32 per row
    neighbours: Any = None  # [E, E - 1] int32
    similarities: Any = None  # [E, E - 1] float32
    counters: Any = field(default_factory=lambda: np.zeros((MAX_BUCKETS + 1, len(kernel.COUNTERS)), np.int64))

    def __post_init__(self) -> None:
        others = max(self.experts - 1, 0)
        self.neighbours = np.zeros((self.experts, others), np.int32)
        self.similarities = np.full((self.experts, others), -np.inf, np.float32)

    def bucket(self, tokens: int) -> int:
        """Index of the row that holds for `tokens` real rows, or MAX_BUCKETS."""
        for index, (low, high, _, _) in enumerate(self.rows):
            if low <= tokens <= high:
                return index
        return MAX_BUCKETS

    def load_table(self, table: tuple[Bucket, ...]) -> None:
        self.rows[:] = [(b.min_tokens, b.max_tokens, _KIND_CODES[b.kind], b.S or 1) for b in table]
        self.rho[:] = [np.float32(b.rho) for b in table]


def bucket_label(bucket: Bucket) -> str:
    """`8-64`, or `65-` where a bucket has no upper edge."""
    return f"{bucket.min_tokens}-{'' if bucket.max_tokens >= MAX_TOKENS else bucket.max_tokens}"


class WorkerState:
    """The policy in force in this process and what it has done. Changed only between two steps, by RPC."""

    def __init__(self, layers: list[LayerState], key: dict[str, Any]) -> None:
        self.layers = layers
        self.key = key  # ProfileKey of what runs here
        self.policy = EXACT_POLICY
        self.similarity_digest: str | None = None
        self.generation = -1  # nothing was applied yet; what an engine starts with is generation 0
        self.switches = 0
        self.error: str | None = None  # why the configured policy is not in force
        self.note: dict[str, Any] = {}  # what the source of the policy says of it; kept here for all API servers
        self.checked: tuple[str, Similarity] | None = None  # path and matrices of a change that was checked and not yet applied
        self._folded: OrderedDict[str, Any] = OrderedDict()

    @property
    def top_k(self) -> int:
        return min(layer.top_k for layer in self.layers)

    def check(self, policy: Policy, generation: int | None, similarity: Similarity | None) -> int:
        """Whether a change could be applied now; changes nothing.

        Args:
            generation: of the change; None takes the next one. The same generation may be applied again only with
                the same policy.
            similarity: matrices to use from now on; None keeps those in force.

        Returns:
            the generation that the change would have.

        Raises:
            ConflictError: a newer generation, or another policy under this one, is in force.
            PolicyError: S above top-k, similarity missing or of another digest.
            UnsupportedError: kind oea on a router whose scores are not a plain softmax or sigmoid.
        """
        generation = self.generation + 1 if generation is None else generation
        if generation < self.generation or (generation == self.generation and policy != self.policy):
            raise ConflictError(
                f"generation {generation} is stale: {self.generation} is in force with policy {self.policy.digest}; "
                "read GET /sere and send a generation above it, or none to take the next"
            )
        policy.check_model(self.top_k)
        digest = similarity.meta.digest if similarity else self.similarity_digest
        if policy.needs_similarity():
            if digest is None:
                raise PolicyError("policy: kind sere needs a similarity file; make one with `sere calibrate` and name it")
            if policy.similarity_digest not in (None, digest):
                raise PolicyError(
                    f"policy: it was made with similarity {policy.similarity_digest}, but {digest} is loaded; name that file"
                )
        if any(b.kind is Kind.OEA for t in policy.tables() for b in t) and any(x.scoring is None for x in self.layers):
            raise UnsupportedError(
                "policy: kind oea needs a softmax or sigmoid router without a custom function; use sere or topk"
            )
        return generation

    def apply(self, policy: Policy, generation: int | None, similarity: Similarity | None) -> None:
        """Put a policy in force in all layers, if `check` allows it."""
        generation = self.check(policy, generation, similarity)
        self._fold()
        if similarity is not None and similarity.meta.digest != self.similarity_digest:
            for layer in self.layers:
                layer.neighbours[:], layer.similarities[:] = sorted_neighbours(similarity.matrices[layer.number])
            self.similarity_digest = similarity.meta.digest
        for layer in self.layers:
            layer.load_table(policy.table_for(layer.number))
        self.switches += self.generation >= 0 and policy.digest != self.policy.digest
        self.policy, self.generation, self.error = policy, generation, None

    def counters(self) -> dict[str, dict[str, int]]:
        """Sums over layers since the start by `<policy digest>|<bucket>`; divide by `calls` for means per layer and step.

        Under a policy with layer groups the names are `<policy digest>|<layers>|<bucket>`, one per group and `rest`.
        """
        self._fold()
        return {name: dict(zip(kernel.COUNTERS, map(int, row), strict=True)) for name, row in self._folded.items()}

    def calls(self) -> list[int]:
        """Router calls per MoE layer that were not yet folded; for the proof of a hit after the profile run."""
        return [int(layer.counters[:, kernel.CALLS].sum()) for layer in self.layers]

    def drop_counters(self) -> None:
        """Forget what was counted so far: a profile run is no traffic."""
        for layer in self.layers:
            layer.counters[:] = 0
        self._folded.clear()

    def _fold(self) -> None:
        """Move the layers' live counters under their names."""
        for layer in self.layers:
            table = self.policy.table_for(layer.number)
            group = self.policy.layers_label(layer.number)
            for index in np.flatnonzero(layer.counters[:, kernel.CALLS]).tolist():
                label = bucket_label(table[index]) if index < len(table) else OTHER
                name = "|".join((self.policy.digest, *([group] if group else []), label))
                row = self._folded.setdefault(name, np.zeros(len(kernel.COUNTERS), np.int64))
                row += layer.counters[index]
                self._folded.move_to_end(name)
            layer.counters[:] = 0
        while len(self._folded) > _MAX_COUNTER_KEYS:
            self._folded.popitem(last=False)
