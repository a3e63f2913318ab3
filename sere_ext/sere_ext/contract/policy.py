"""The routing policy: a small table from batch size to a way of routing. Torch-free; shared by all three packages.

The JSON form uses camelCase like the Kubernetes resources, so that one text serves in a file, in
`PUT /sere/policy`, in a ConfigMap and in a manifest:

    {"buckets": [{"minTokens": 8, "maxTokens": 64, "kind": "sere", "S": 2, "rho": 0.3}],
     "similarityDigest": "sha256:..."}

Outside every bucket routing is exact. A bucket counts the *real* tokens (rows) that a router call sees.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Collection
from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, model_validator

from sere_ext.contract.errors import PolicyError
from sere_ext.contract.record import Record, canonical_json
from sere_ext.contract.validation import explain

EXACT = "exact"  # digest of exact routing, and the word for it in volumes, annotations and commands
MAX_BUCKETS = 16
MAX_LAYER_GROUPS = 8
MAX_TOKENS = 1_048_576  # above any batch vLLM schedules; "no upper edge"


class Kind(StrEnum):
    """How the slots of a token beyond its top S are treated.

    A token's top S are its S experts of most weight; where `minShare` is set, only those with at least that share of the token's
    largest weight. Active experts are those in some token's top S; where `maxExperts` is set, experts of most summed weight are
    added until that many are active.

    exact   as the model routes
    sere    to the most similar active expert, if similarity >= rho (arXiv 2602.07616, Alg. 1)
    topk    dropped: what the model would do with k = S
    oea     dropped, then refilled from the token's own scores among active experts (arXiv 2511.02237)
    budget  kept on active experts, dropped elsewhere; at most `maxExperts` are active unless the top S are more
    hybrid  kept on active experts; elsewhere to the most similar one if similarity >= rho, as sere, else refilled as oea
    """

    EXACT = "exact"
    SERE = "sere"
    TOPK = "topk"
    OEA = "oea"
    BUDGET = "budget"
    HYBRID = "hybrid"

    @property
    def needs_similarity(self) -> bool:
        """Whether the kind sends slots to the most similar expert, and so needs a similarity file and may have rho."""
        return self in (Kind.SERE, Kind.HYBRID)

    @property
    def needs_scores(self) -> bool:
        """Whether the kind needs a token's scores of experts that the router did not choose."""
        return self in (Kind.OEA, Kind.HYBRID)


class Bucket(Record):
    """One row of a policy: how to route steps of `min_tokens` to `max_tokens` real tokens, both inclusive."""

    min_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS, description="fewest real tokens of a step, inclusive")]
    max_tokens: Annotated[
        int, Field(ge=1, le=MAX_TOKENS, description="most real tokens of a step, inclusive. Default: no upper edge.")
    ] = MAX_TOKENS
    kind: Annotated[
        Kind,
        Field(
            description="what becomes of a token's slots beyond its top S; exact: nothing, sere: re-routed to the most similar "
            "active expert, topk: dropped, oea: refilled from the token's own scores among active experts, budget: dropped "
            "outside of the maxExperts active ones, hybrid: re-routed where similarity >= rho, else refilled"
        ),
    ]
    S: Annotated[int | None, Field(ge=1, le=64, alias="S", description="top experts a token always keeps")] = None
    min_share: Annotated[
        float | None,
        Field(
            ge=0.0,
            le=1.0,
            description="of its top S a token keeps those whose weight is at least this share of its largest. Default: all",
        ),
    ] = None
    rho: Annotated[float, Field(ge=0.0, le=1.0, description="least similarity of a stand-in (sere, hybrid)")] = 0.0
    max_experts: Annotated[
        int | None,
        Field(
            ge=1,
            le=512,
            description="active experts of a step and layer: beside every token's top S, those of most summed weight until so many "
            "are active (budget, where S defaults to 1; hybrid, default: none beside the top S)",
        ),
    ] = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_tokens < self.min_tokens:
            raise ValueError(f"maxTokens {self.max_tokens} is below minTokens {self.min_tokens}")
        if self.kind not in (Kind.EXACT, Kind.BUDGET) and self.S is None:
            raise ValueError(f"kind {self.kind.value} needs S, the number of top experts that a token keeps")
        if self.kind is Kind.BUDGET and self.max_experts is None:
            raise ValueError("kind budget needs maxExperts, the number of experts that may be active")
        if self.rho and not self.kind.needs_similarity:
            raise ValueError(f"rho is only meaningful for kinds sere and hybrid, not {self.kind.value}; leave it out")
        if self.min_share is not None and self.kind is Kind.EXACT:
            raise ValueError("minShare is only meaningful for kinds that re-route, not exact; leave it out")
        if self.max_experts is not None and self.kind not in (Kind.BUDGET, Kind.HYBRID):
            raise ValueError(f"maxExperts is only meaningful for kinds budget and hybrid, not {self.kind.value}; leave it out")
        return self

    @property
    def label(self) -> str:
        """The bucket's batch sizes as counters name them: `8-64`, or `65-` without an upper edge."""
        return f"{self.min_tokens}-{'' if self.max_tokens >= MAX_TOKENS else self.max_tokens}"

    def describe(self) -> str:
        """The bucket in words: `sere S=2 rho=0.30 for 8-64 tokens`."""
        what = {
            Kind.EXACT: "exact",
            Kind.SERE: f"sere S={self.S} rho={self.rho:.2f}",
            Kind.TOPK: f"topk {self.S}",
            Kind.OEA: f"oea S={self.S}",
            Kind.BUDGET: f"budget N={self.max_experts} S={self.S or 1}",
            Kind.HYBRID: f"hybrid S={self.S} rho={self.rho:.2f}" + (f" N={self.max_experts}" if self.max_experts else ""),
        }[self.kind] + (f" share={self.min_share:.2f}" if self.min_share else "")
        upper = "" if self.max_tokens >= MAX_TOKENS else str(self.max_tokens)
        return f"{what} for {self.min_tokens}-{upper} tokens" if upper else f"{what} from {self.min_tokens} tokens"


def _check_table(buckets: tuple[Bucket, ...], where: str) -> None:
    for before, after in itertools.pairwise(buckets):
        if after.min_tokens <= before.max_tokens:
            if after.min_tokens < before.min_tokens:
                raise ValueError(f"{where}: buckets must be in ascending order of minTokens")
            if before.max_tokens >= MAX_TOKENS:
                raise ValueError(
                    f"{where}: buckets overlap from {after.min_tokens} tokens on; make the first end at {after.min_tokens - 1}"
                )
            raise ValueError(
                f"{where}: buckets overlap at {after.min_tokens}-{min(before.max_tokens, after.max_tokens)} tokens; "
                f"make the second start at {before.max_tokens + 1}"
            )


class LayerGroup(Record):
    """Buckets of their own for the MoE layers `first_layer..last_layer` (model layer numbers, inclusive)."""

    first_layer: Annotated[int, Field(ge=0, description="model layer number")]
    last_layer: Annotated[int, Field(ge=0, description="model layer number, inclusive")]
    buckets: Annotated[tuple[Bucket, ...], Field(max_length=MAX_BUCKETS, description="in place of the policy's own, ascending")]

    def layers_text(self) -> str:
        """`layer 0` or `layers 1-3`."""
        one = self.first_layer == self.last_layer
        return f"layer {self.first_layer}" if one else f"layers {self.first_layer}-{self.last_layer}"


class Policy(Record):
    """A whole routing policy. An empty table is exact routing."""

    buckets: Annotated[
        tuple[Bucket, ...],
        Field(max_length=MAX_BUCKETS, description="ascending, without overlap; outside of them routing is exact"),
    ] = ()
    layer_groups: Annotated[
        tuple[LayerGroup, ...], Field(max_length=MAX_LAYER_GROUPS, description="layers with buckets of their own, ascending")
    ] = ()
    similarity_digest: Annotated[str | None, Field(description="of the artefact that `sere` buckets were made with")] = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        _check_table(self.buckets, "buckets")
        last = -1
        for group in self.layer_groups:
            if group.last_layer < group.first_layer or group.first_layer <= last:
                raise ValueError("layerGroups must be ascending and must not overlap")
            last = group.last_layer
            _check_table(group.buckets, f"layerGroups {group.first_layer}-{group.last_layer}")
        return self

    @classmethod
    def parse(cls, data: str | bytes | dict[str, Any]) -> Policy:
        """Read a policy from JSON text or a decoded object.

        Raises:
            PolicyError: with one sentence per problem, each naming the field.
        """
        try:
            return cls.model_validate(data) if isinstance(data, dict) else cls.model_validate_json(data)
        except ValidationError as error:
            raise PolicyError("policy: " + explain(error, cls)) from error

    @property
    def digest(self) -> str:
        """Content address: `sere-` and 8 hex digits of the SHA-256 of the canonical JSON; `exact` for exact routing."""
        if not self.uses_rerouting():
            return EXACT
        return "sere-" + hashlib.sha256(canonical_json(self.to_json_dict())).hexdigest()[:8]

    def tables(self) -> list[tuple[Bucket, ...]]:
        """The buckets outside of layer groups, then those of each group."""
        return [self.buckets, *(group.buckets for group in self.layer_groups)]

    def uses_rerouting(self) -> bool:
        """Whether some bucket routes otherwise than the model does."""
        return any(bucket.kind is not Kind.EXACT for table in self.tables() for bucket in table)

    def needs_similarity(self) -> bool:
        """Whether some bucket needs a similarity file."""
        return any(bucket.kind.needs_similarity for table in self.tables() for bucket in table)

    def table_for(self, layer: int) -> tuple[Bucket, ...]:
        """The buckets that are in force in the MoE layer with this model layer number."""
        for group in self.layer_groups:
            if group.first_layer <= layer <= group.last_layer:
                return group.buckets
        return self.buckets

    def layers_label(self, layer: int) -> str | None:
        """Name of a layer's group: `1-3`, or `rest` outside every group; None for a policy without groups."""
        for group in self.layer_groups:
            if group.first_layer <= layer <= group.last_layer:
                return f"{group.first_layer}-{group.last_layer}"
        return "rest" if self.layer_groups else None

    def check_model(self, top_k: int) -> None:
        """Raise PolicyError if some S is above the model's top-k."""
        for table in self.tables():
            for bucket in table:
                if bucket.S is not None and bucket.S > top_k:
                    raise PolicyError(
                        f"policy: S = {bucket.S} in '{bucket.describe()}' is above the model's top-k of {top_k}; "
                        f"use S between 1 and {top_k}"
                    )

    def check_layers(self, layers: Collection[int], what: str = "MoE layers") -> None:
        """Raise PolicyError if a layer group names none of the model's layers: the group would never be in force.

        Args:
            layers: model layer numbers.
            what: noun for these layers in the message.
        """
        for group in self.layer_groups:
            if not any(group.first_layer <= layer <= group.last_layer for layer in layers):
                raise PolicyError(
                    f"policy: layerGroups has buckets for {group.layers_text()}, but this model has {what} {_spans(layers)}; "
                    "layers count from 0, as in the checkpoint"
                )

    def describe(self) -> str:
        """The policy in words: `topk 3 for 8-64 tokens, exact elsewhere; in layers 1-3 topk 2 for 8-64 tokens`."""
        base = ", ".join(bucket.describe() for bucket in self.buckets) + ", exact elsewhere" if self.buckets else "exact"
        groups = (
            f"; in {group.layers_text()} " + (", ".join(bucket.describe() for bucket in group.buckets) or "exact")
            for group in self.layer_groups
        )
        return base + "".join(groups)


def _spans(numbers: Collection[int]) -> str:
    """`0-2, 4, 6-31`."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(f"{a}-{b}" if b > a else f"{a}" for a, b in found)


EXACT_POLICY = Policy()
