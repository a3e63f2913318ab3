"""The state of a running engine and the change that can be asked of the engine: the bodies of live control. Pure.

    GET /sere          `EngineState`: all ranks of all data-parallel engines as one API server reads them
    PUT /sere/policy   `PolicyChange`; the answer is an `EngineState`
    sere_state (RPC)   `RankState`: one rank of one engine, as its worker answers

A reader ignores fields that it does not know, so that an engine of a newer release can be read.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, ValidationError, field_serializer, field_validator

from sere_ext.contract.errors import SereError, UnsupportedError, error_of
from sere_ext.contract.policy import Policy
from sere_ext.contract.profile import ProfileKey
from sere_ext.contract.record import Record
from sere_ext.contract.validation import explain

OTHER = "other"  # bucket of router calls outside every bucket of the policy in force
COUNTED = ("calls", "tokens", "active_before", "active_after", "slots", "rerouted", "merged")  # columns of a kernel's counters

RowKey = tuple[str, str | None, str]


class _Answer(Record):
    model_config = ConfigDict(extra="ignore")


class CounterRow(_Answer):
    """What the routers of one engine counted under one policy in one bucket: sums over MoE layers and steps since its start.

    `active_after / calls` is the mean number of active experts per layer and step.
    """

    digest: Annotated[str, Field(description="of the policy")]
    layers: Annotated[str | None, Field(description="layer group as 1-3, rest outside every group; none without groups")] = None
    bucket: Annotated[str, Field(description="as 8-64 or 65-, other outside every bucket")]
    calls: Annotated[int, Field(description="router calls: one per MoE layer and step")] = 0
    tokens: Annotated[int, Field(description="real tokens, summed over calls")] = 0
    active_before: Annotated[int, Field(description="experts that the router chose, summed over calls")] = 0
    active_after: Annotated[int, Field(description="experts in use after re-routing, summed over calls")] = 0
    slots: Annotated[int, Field(description="routed slots (token and expert)")] = 0
    rerouted: Annotated[int, Field(description="slots that went to another expert")] = 0
    merged: Annotated[int, Field(description="slots that were freed: their expert already serves the token")] = 0

    @property
    def key(self) -> RowKey:
        """What is counted, without the counts."""
        return self.digest, self.layers, self.bucket

    def plus(self, other: CounterRow, sign: int = 1) -> CounterRow:
        """Each count with `sign` times the other row's added."""
        counts = {name: getattr(self, name) + sign * getattr(other, name) for name in COUNTED}
        return self.model_copy(update=counts)

    def since(self, before: CounterRow | None) -> CounterRow:
        """What was counted after `before`, an earlier reading of the same row; None: everything was."""
        return self if before is None else self.plus(before, -1)


def by_key(rows: Iterable[CounterRow]) -> dict[RowKey, CounterRow]:
    """Rows by what they count."""
    return {row.key: row for row in rows}


def total(rows: Iterable[CounterRow]) -> tuple[CounterRow, ...]:
    """One row for each thing counted, summed over the rows given."""
    sums: dict[RowKey, CounterRow] = {}
    for row in rows:
        sums[row.key] = sums[row.key].plus(row) if row.key in sums else row
    return tuple(sums.values())


class ModelShape(_Answer):
    """What of the running model bounds a policy."""

    num_experts: int
    top_k: int
    moe_layers: Annotated[tuple[int, ...], Field(description="model layer numbers")]


class Note(_Answer):
    """Who set the policy in force, and what was wrong with the request; kept by the workers, so that every API server can read it."""

    source: str | None = None
    override: bool = False
    error: str | None = None


class _InForce(_Answer):
    policy_digest: Annotated[str, Field(description="of the policy in force")]
    similarity_digest: Annotated[str | None, Field(description="of the matrices in force")] = None
    generation: Annotated[int, Field(description="number of the last change")]

    @property
    def in_force(self) -> tuple[str, str | None, int]:
        """Policy, similarity and generation, in which no two ranks may differ."""
        return self.policy_digest, self.similarity_digest, self.generation


class _Whole(_InForce):
    policy: Policy
    switches: Annotated[int, Field(description="changes of the policy since the engine's start")]
    error: Annotated[str | None, Field(description="why what was asked for is not in force")] = None
    key: Annotated[ProfileKey, Field(description="what runs here")]
    model: ModelShape
    counters: tuple[CounterRow, ...]

    @field_validator("key", mode="before")
    @classmethod
    def _known_fields(cls, value: Any) -> Any:
        """Leave out fields of a newer release's key; a profile, which is read strictly, cannot ask for them anyway."""
        known = {name for field, info in ProfileKey.model_fields.items() for name in (field, info.alias)}
        return {name: part for name, part in value.items() if name in known} if isinstance(value, dict) else value

    @field_serializer("policy")
    def _plain(self, policy: Policy) -> dict[str, Any]:
        return policy.to_json_dict()


class RankState(_Whole):
    """One rank of one engine."""

    engine: Annotated[int, Field(description="number of the data-parallel engine, set by who asks them")] = 0
    rank: int
    note: Note = Note()
    replaced: Annotated[str | None, Field(description="in an answer to a change: digest of the policy before it")] = None


class RankInForce(_InForce):
    """One rank in `GET /sere`."""

    engine: int = 0
    rank: int

    def to_json_dict(self) -> dict[str, Any]:
        """Every field, with null for an optional field without a value."""
        return self.model_dump(mode="json", by_alias=True)


class EngineState(_Whole):
    """Body of `GET /sere`."""

    ready: Annotated[bool, Field(description="the first policy is applied, and all ranks agree")]
    source: Annotated[str, Field(description="who set the policy in force: static, http or file")]
    override: Annotated[bool, Field(description="the kill switch is on")] = False
    ranks: tuple[RankInForce, ...]

    @classmethod
    def parse(cls, data: bytes | str | dict[str, Any]) -> Self:
        """Read an engine's answer.

        Raises:
            UnsupportedError: it is no state, or of a release that says less.
        """
        try:
            return cls.model_validate(data) if isinstance(data, dict) else cls.model_validate_json(data)
        except ValidationError as error:
            raise UnsupportedError(f"the engine's state cannot be read: {explain(error, cls)}") from error

    def to_json_dict(self) -> dict[str, Any]:
        """Every field, with null for an optional field without a value."""
        said = {"similarityDigest": self.similarity_digest, "error": self.error}
        return {**super().to_json_dict(), **said, "ranks": [rank.to_json_dict() for rank in self.ranks]}

    @property
    def serves(self) -> str | None:
        """Digest of the policy that all ranks apply; None while the engine is not ready or its ranks differ."""
        alike = all(rank.policy_digest == self.policy_digest for rank in self.ranks)
        return self.policy_digest if self.ready and alike else None


class PolicyChange(Record):
    """Body of `PUT /sere/policy`."""

    policy: Policy
    similarity: Annotated[
        str | None,
        Field(min_length=1, description="path of a similarity file where the API server runs, which hands it to workers"),
    ] = None
    generation: Annotated[int | None, Field(le=2**53, description="number of the change, above the one in force")] = None
    clean: Annotated[bool, Field(description="drain and drop the prefix cache first")] = False


class Readiness(Enum):
    """How far a worker is with a change that it does not refuse."""

    READY = "ready"
    LACKS_FILE = "lacksFile"  # hand it the similarity file
    AT_WORK = "atWork"  # on the file that it was handed

    def answer(self) -> dict[str, Any]:
        """The worker's answer."""
        return {"readiness": self.value}

    @classmethod
    def read(cls, answer: dict[str, Any]) -> Readiness:
        """What a worker answered that did not refuse."""
        return cls(answer["readiness"])


class Refusal(Record):
    """A change that a worker refuses, as it travels through an RPC, where an exception would lose its type."""

    type: str
    message: str

    @classmethod
    def of(cls, error: SereError) -> dict[str, Any]:
        """The worker's answer."""
        return {"refused": cls(type=type(error).__name__, message=str(error)).to_json_dict()}

    @classmethod
    def read(cls, answer: dict[str, Any]) -> Refusal | None:
        """The refusal in a worker's answer, None where the worker did what it was asked."""
        return cls.model_validate(answer["refused"]) if "refused" in answer else None

    @property
    def error(self) -> SereError:
        """The error that the worker raised."""
        return error_of(0, self.type, self.message)
