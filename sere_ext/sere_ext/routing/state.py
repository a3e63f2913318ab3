"""What one worker process holds: the policy in force as tables per MoE layer, neighbour lists, counters.

Everything a kernel reads is preallocated and updated in place, so that compiled graphs (and, on CUDA, captured ones)
see a change without being made again. Torch-free: numpy arrays, which the kernel on the CPU reads as they are; for one on
a GPU a `Mirror` keeps copies there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from sere_ext.contract.errors import ConflictError, PolicyError, UnsupportedError
from sere_ext.contract.policy import EXACT_POLICY, MAX_BUCKETS, Bucket, Kind, Policy
from sere_ext.contract.state import COUNTED, OTHER, CounterRow, RowKey
from sere_ext.routing import kernel
from sere_ext.routing.record import Recorder
from sere_ext.similarity.file import Similarity, sorted_neighbours

_MAX_COUNTER_KEYS = 1024  # a tuner tries hundreds of policies in one engine's life; the oldest counters go first


ALL_REAL = 2**31 - 1  # number of real rows that no call has more of


@dataclass(frozen=True)
class Neighbours:
    """A similarity artefact as the kernels read it: each expert's neighbours, sorted.

    Sorting takes milliseconds a layer (seconds for 60 layers of 512 experts), so it is done before a change is applied.
    """

    digest: str
    layers: dict[int, tuple[Any, Any]]  # by model layer number: (uint16 [E, E - 1] others, most similar first; float32 of each)

    @classmethod
    def of(cls, similarity: Similarity, numbers: Iterable[int]) -> Neighbours:
        """Sort the matrices of these model layers."""
        return cls(similarity.meta.digest, {number: sorted_neighbours(similarity.matrices[number]) for number in numbers})


@dataclass
class Sizes:
    """Numbers of rows that a layer's operator was called with on a GPU, until re-routing is proven (`sere_ext.engine.proof`)."""

    captured: set[int] = field(default_factory=set)  # while a CUDA graph was captured
    eager: set[int] = field(default_factory=set)  # outside a capture

    def add(self, rows: int, *, captured: bool) -> None:
        """Note one call."""
        (self.captured if captured else self.eager).add(rows)


@dataclass
class LayerState:
    """One MoE layer. Row `MAX_BUCKETS` of the counters is for calls outside every bucket."""

    number: int  # model layer number
    experts: int
    top_k: int
    renormalise: bool
    scoring: int | None  # kernel.SOFTMAX or SIGMOID; None if the router's scores cannot be recomputed from logits
    freed: int = kernel.REPEAT  # or kernel.MINUS_ONE: what the experts' kernel takes for an unused slot
    constants: tuple[int, ...] = ()  # experts that answer with a constant vector (MoNE), whatever their input
    real: Any = field(default_factory=lambda: np.full(1, ALL_REAL, np.int32))  # real rows of the running step; shared by layers
    slot: int = field(init=False, default=-1)  # the operators' number of this layer, given by `ops.bind`
    table: Any = field(default_factory=lambda: np.zeros((MAX_BUCKETS, kernel.COLUMNS), np.int32))
    limits: Any = field(init=False)  # uint16 [MAX_BUCKETS, E], see csrc/reroute_core.h
    neighbours: Any = field(init=False)  # uint16 [E, E - 1]
    similarities: Any = field(init=False)  # float32 [E, E - 1], of the neighbours; stays on the host
    counters: Any = field(default_factory=lambda: np.zeros((MAX_BUCKETS + 1, len(kernel.COUNTERS)), np.int64))
    _rho: Any = field(default_factory=lambda: np.full(MAX_BUCKETS, np.inf, np.float32))  # of each row; infinite: none needed
    sizes: Sizes | None = field(default_factory=Sizes)  # None once re-routing is proven
    recorder: Recorder | None = None  # of calls on the CPU, while a tuner wants them
    struct: kernel.Layer = field(init=False)  # what the kernel is given; a Mirror puts its own addresses in

    def __post_init__(self) -> None:
        others = max(self.experts - 1, 0)
        self.limits = np.zeros((MAX_BUCKETS, self.experts), np.uint16)
        self.neighbours = np.zeros((self.experts, others), np.uint16)
        self.similarities = np.full((self.experts, others), -np.inf, np.float32)
        self.point_at(*(a.ctypes.data for a in (self.table, self.neighbours, self.limits, self.counters, self.real)))

    def point_at(self, table: int, neighbours: int, limits: int, counters: int, real: int) -> None:
        """Make the kernel read these addresses from now on."""
        self.struct = kernel.Layer(
            table, neighbours, limits, counters, real, self.experts, self.renormalise, self.scoring or 0, self.freed,
            kernel.bits_of(self.constants),
        )  # fmt: skip

    def load_table(self, table: tuple[Bucket, ...]) -> None:
        """Put the policy's buckets into `table`; a row that is all zeros holds for no number of tokens."""
        self.table[len(table) :] = 0
        self._rho[len(table) :] = np.inf
        for row, bucket in enumerate(table):
            self.load_row(
                row,
                (bucket.min_tokens, bucket.max_tokens),
                bucket.kind,
                bucket.S or 1,
                max_experts=bucket.max_experts or 0,
                rho=bucket.rho,
                min_share=bucket.min_share or 0.0,
            )

    def load_row(
        self,
        row: int,
        tokens: tuple[int, int],
        kind: Kind,
        S: int,
        *,
        max_experts: int = 0,
        rho: float = 0.0,
        min_share: float = 0.0,
    ) -> None:
        """Put one bucket into `table`, and how many neighbours of each expert are at least `rho` alike into `limits`."""
        share = np.float32(min_share).view(np.int32)
        self.table[row] = (*tokens, kernel.CODES[kind], S, max_experts, share)
        self._rho[row] = rho if kind.needs_similarity else np.inf
        self._count_alike(row)

    def load_similarity(self, neighbours: Any, similarities: Any) -> None:
        """Take a layer's sorted neighbours (`Neighbours.layers`)."""
        self.neighbours[:], self.similarities[:] = neighbours, similarities
        for row in np.flatnonzero(np.isfinite(self._rho)).tolist():
            self._count_alike(row)

    def _count_alike(self, row: int) -> None:
        self.limits[row] = (self.similarities >= self._rho[row]).sum(1) if np.isfinite(self._rho[row]) else 0


class Mirror(Protocol):
    """Copies of the layers' arrays on a device, and the counters that its kernel adds to."""

    def push(self, *, similarity: bool) -> None:
        """Bring the tables (and the neighbour lists) of all layers to the device, in order with the steps around."""

    def push_real(self, tokens: int) -> None:
        """Let the steps that are launched from now on have so many real rows. Does not wait."""

    def pull(self, *, wait: bool, steps: int = 0) -> int:
        """Move the device's counters into the layers' own.

        Args:
            wait: for all steps that were launched so far. Otherwise the counters are those that arrived last, and steps that
                run meanwhile are never waited for.
            steps: how many steps were launched so far.

        Returns:
            how many of those steps the counters of the layers hold now.
        """


class WorkerState:
    """The policy in force in this process and what it has done. Changed only between two steps, by RPC."""

    def __init__(self, layers: list[LayerState], key: dict[str, Any], mirror: Mirror | None = None) -> None:
        self.layers = layers
        self.mirror = mirror
        self.key = key  # ProfileKey of what runs here
        self.policy = EXACT_POLICY
        self.similarity_digest: str | None = None
        self.generation = -1  # nothing was applied yet; what an engine starts with is generation 0
        self.switches = 0
        self.error: str | None = None  # why the configured policy is not in force
        self.offer: Any = None  # similarity file (`engine.offer.Offer`) that is being prepared for a change
        self.note: dict[str, Any] = {}  # what the source of the policy says of it; kept here for all API servers
        self._folded: OrderedDict[RowKey, Any] = OrderedDict()
        self._asked = np.zeros(len(layers), np.int64)  # folded calls of each layer
        self._steps = 0  # runs of the model that were launched since re-routing was proven
        self._folded_steps = 0  # those of them whose calls are folded
        for layer in layers:
            layer.real = layers[0].real
            if not mirror:
                layer.struct.real = layer.real.ctypes.data

    @property
    def top_k(self) -> int:
        return min(layer.top_k for layer in self.layers)

    def set_real(self, tokens: int) -> None:
        """How many rows of the step that comes are real tokens, counted from the first; the rest pads the batch."""
        if self.mirror:
            self.mirror.push_real(tokens)
        else:
            self.layers[0].real[0] = tokens

    def count_step(self) -> None:
        """The model was launched once, so every layer's router has been asked or will be. Counted after the launch."""
        self._steps += 1

    def check(self, policy: Policy, generation: int | None, similarity_digest: str | None) -> int:
        """Whether a change could be applied now; changes nothing.

        Args:
            generation: of the change; None takes the next one. The same generation may be applied again only with
                the same policy.
            similarity_digest: of the neighbours to use from now on; None keeps those in force.

        Returns:
            the generation that the change would have.

        Raises:
            ConflictError: a newer generation, or another policy under this one, is in force.
            PolicyError: S above top-k, a layer group without a layer, similarity missing or of another digest.
            UnsupportedError: kind oea or hybrid on a router whose scores are not a plain softmax or sigmoid.
        """
        generation = self.generation + 1 if generation is None else generation
        if generation < self.generation or (generation == self.generation and policy != self.policy):
            raise ConflictError(
                f"generation {generation} is stale: {self.generation} is in force with policy {self.policy.digest}; "
                "read GET /sere and send a generation above it, or none to take the next"
            )
        policy.check_model(self.top_k)
        policy.check_layers([layer.number for layer in self.layers])
        digest = similarity_digest or self.similarity_digest
        if policy.needs_similarity():
            if digest is None:
                raise PolicyError(
                    "policy: kinds sere and hybrid need a similarity file; make one with `sere calibrate` and name it"
                )
            if policy.similarity_digest not in (None, digest):
                raise PolicyError(
                    f"policy: it was made with similarity {policy.similarity_digest}, but {digest} is loaded; name that file"
                )
        kinds = {bucket.kind for table in policy.tables() for bucket in table}
        if any(kind.needs_scores for kind in kinds) and any(layer.scoring is None for layer in self.layers):
            raise UnsupportedError(
                "policy: kinds oea and hybrid need a softmax or sigmoid router without a custom function; use sere, topk or budget"
            )
        return generation

    def apply(self, policy: Policy, generation: int | None, similarity: Neighbours | None) -> None:
        """Put a policy in force in all layers, if `check` allows it. `similarity` is None where the neighbours in force stay."""
        generation = self.check(policy, generation, similarity.digest if similarity else None)
        self._fold(wait=True)  # what was counted so far belongs to the policy that ends here
        fresh = similarity if similarity and similarity.digest != self.similarity_digest else None
        for layer in self.layers:
            if fresh:
                layer.load_similarity(*fresh.layers[layer.number])
            layer.load_table(policy.table_for(layer.number))
        if self.mirror:
            self.mirror.push(similarity=fresh is not None)
        if fresh:
            self.similarity_digest = fresh.digest
        self.switches += self.generation >= 0 and policy.digest != self.policy.digest
        self.policy, self.generation, self.error = policy, generation, None

    def counters(self) -> tuple[CounterRow, ...]:
        """What the routers counted since the start, one row for each policy, layer group and bucket, summed over layers.

        A GPU that is busy is not waited for: its counters are then as they were when they were last asked for.
        """
        self._fold(wait=False)
        return tuple(
            CounterRow(digest=digest, layers=layers, bucket=bucket, **dict(zip(COUNTED, map(int, counts), strict=True)))
            for (digest, layers, bucket), counts in self._folded.items()
        )

    def calls(self) -> list[int]:
        """Router calls per MoE layer that were not yet folded; for the proof of a hit after the profile run."""
        self._pull(wait=True)
        return [int(layer.counters[:, kernel.CALLS].sum()) for layer in self.layers]

    def drop_counters(self) -> None:
        """Forget what was counted so far: a profile run is no traffic."""
        self._pull(wait=True)
        for layer in self.layers:
            layer.counters[:] = 0
        self._folded.clear()
        self._asked[:] = 0
        self._steps = self._folded_steps = 0

    def bypassed(self) -> str | None:
        """Which layers were called less often than the model ran, or than other layers: in some step they routed exactly.

        As `counters` last read the layers, so that one reading of a device serves both. Steps that were launched after the
        device's counters were copied are left out. Calls beside the counted steps can hide as many bypassed steps, no more.

        Returns:
            the sentence for the state's error; None if no layer was called too seldom.
        """
        due = max([self._folded_steps, *self._asked.tolist()])
        missed = [layer.number for layer, asked in zip(self.layers, self._asked, strict=True) if asked < due]
        if not missed:
            return None
        which = f"layers {missed}" if len(missed) < len(self.layers) else "all MoE layers"
        return (
            f"Bypassed: {which} routed some steps by themselves, exactly, so no policy holds for those steps; "
            "start with `--enforce-eager`, or serve without sere"
        )

    def _pull(self, *, wait: bool) -> int:
        """Bring the layers' counters up to date; returns how many of the counted steps these hold."""
        return self.mirror.pull(wait=wait, steps=self._steps) if self.mirror else self._steps

    def _fold(self, *, wait: bool) -> None:
        """Move the layers' live counters into the sums of their policy, layer group and bucket."""
        self._folded_steps = self._pull(wait=wait)
        for place, layer in enumerate(self.layers):
            self._asked[place] += layer.counters[:, kernel.CALLS].sum()
            table = self.policy.table_for(layer.number)
            group = self.policy.layers_label(layer.number)
            for index in np.flatnonzero(layer.counters[:, kernel.CALLS]).tolist():
                key = self.policy.digest, group, table[index].label if index < len(table) else OTHER
                counts = self._folded.setdefault(key, np.zeros(len(kernel.COUNTERS), np.int64))
                counts += layer.counters[index]
                self._folded.move_to_end(key)
            layer.counters[:] = 0
        while len(self._folded) > _MAX_COUNTER_KEYS:
            self._folded.popitem(last=False)
