"""What a study keeps beside its trials: one typed record for each key of the journal, and the keys themselves.

Every value that is not part of one trial is stored under a `Key`, which knows the value's type, so that a module that
reads a key gets the record that another module wrote, or a validation error, and never a dictionary of unknown shape.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter

from sere_autotune.doctor.finding import Finding
from sere_autotune.outcome import Outcome
from sere_autotune.tuning.spec import BucketEdges
from sere_autotune.words import bracketed, percent

T = TypeVar("T")


@dataclass(frozen=True)
class Pace:
    """How fast the engine answered in the exact trial; what time estimates rest on."""

    rate_per_s: float  # answered requests per second
    residence_s: float  # mean time of a request in the engine
    start_s: float  # of the engine

    def to_dict(self) -> dict[str, float]:
        """The pace as summary.json has it."""
        return {"rate": self.rate_per_s, "residence": self.residence_s, "startSeconds": self.start_s}


@dataclass(frozen=True)
class NoiseFloor:
    """Exact routing against itself on the same items under the same load."""

    items: int
    differ: float  # share of items whose answer text differs
    discordant: float  # share of items that are right once and wrong once


@dataclass(frozen=True)
class CountedChoices:
    """What every choice of a bucket does to steps, in the order of `Space.choices`; exact routing first.

    In a closed loop the steps are the recorded ones, in an open loop they have as many of their tokens as the choice leaves in
    flight (`search.open_loop`).
    """

    active: list[float]  # active experts of a step and MoE layer
    slots: list[float]  # of a token
    moved: list[float]  # share of router weight that another expert gets, or none
    size: list[float]  # tokens of a step over those of exact routing's; 1 in a closed loop


@dataclass(frozen=True)
class Spent:
    """Time charged so far, over all restarts of the tuner."""

    device_s: float = 0.0  # engine seconds times devices
    wall_s: float = 0.0


@dataclass(frozen=True)
class Made:
    """When the profile was made and what had been spent then: kept, so that a profile that is written again has the same digest."""

    created: str  # RFC 3339
    device_s: float  # engine seconds times devices


@dataclass(frozen=True)
class Candidate:
    """A policy of the frozen ladder, with what the search predicts of it (posterior means)."""

    policy: dict[str, Any]
    describe: str
    drop: float  # share of items
    discordance: float  # share of items, noise floor included
    speedup: float
    power: float  # probability that its certificate passes on `items`
    items: int  # distinct held-out items that its certificate uses with each routing; declared here
    per_block: int  # labelled items of each block
    slots: tuple[float, ...] = ()  # of a token in each bucket's counted steps; empty where nothing was counted

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Opening:
    """That the held-out items were opened, and the significance level that this study may spend on them."""

    earlier: int  # studies that opened these items before
    alpha: float


@dataclass(frozen=True)
class MeasuredBlock:
    """One certification block: exact routing or the candidate, at one load level, in one pair of blocks."""

    pair: int
    level: int  # index into the load levels
    routing: str  # "exact" | "chosen"
    items: list[str]  # digests of the labelled items, in dispatch order
    right: str  # one character per item: "1" right, "0" wrong, "x" where the request failed
    said: list[str]  # short digest of each item's answer
    latency_ms: dict[str, list[float]]  # metric -> one value per timed request
    seconds: float  # from the first counted dispatch to the last counted answer
    requests: int
    failures: int
    tokens: float  # mean output tokens
    wall_s: float = 0.0  # of the whole block, warm-up included
    batch: float = 0.0  # mean requests in flight
    active_before: float | None = None  # mean experts per layer and step, as the router asked for them
    active_after: float | None = None  # and as the policy let them be used
    covered: float | None = None  # share of router calls inside the policy's buckets


@dataclass(frozen=True)
class Interval:
    """exact / candidate with its t interval over pairs of blocks; no limits where one pair is all there is."""

    value: float
    low: float | None
    high: float | None
    pairs: int


@dataclass(frozen=True)
class SpeedVerdict:
    """Whether a candidate is faster than exact routing: by the mean TPOT of each pair of blocks."""

    verdict: str  # "faster" | "slower" | "undecided"
    value: float  # exact / candidate
    low: float | None  # one-sided limits, each at `alpha`; None where one pair is all there is
    high: float | None
    pairs: int
    alpha: float

    def __str__(self) -> str:
        limits = bracketed(self.low, self.high)
        return f"{self.value:.2f}x{limits}" + (f" at {percent(1 - self.alpha)}" if limits else "")


@dataclass(frozen=True)
class Part:
    """The drop at one load, in one task, or at an edge of what the policy applies to, and whether harm is shown there."""

    kind: str  # "load" | "task" | "edge"
    name: str
    items: int
    losses: int
    gains: int
    p_value: float  # of the test that the drop is at most the limit; small values show harm
    harmed: bool  # shown over all loads and tasks, or all edges, together (Holm)

    @property
    def drop(self) -> float:
        """A share of items; positive is a loss."""
        return (self.losses - self.gains) / max(self.items, 1)


@dataclass
class Verdict:
    """What certification found of one candidate."""

    verdict: str  # "passed" | "failures" | "slo" | "slower" | "undecided" | "accuracy" | "crashed"
    reason: str
    p_value: float = 1.0
    alpha: float = 0.0
    items: int = 0
    losses: int = 0
    gains: int = 0
    differ: int = 0
    left_out: int = 0  # items that one of the two routings, or both, did not answer
    design_effect: float = 1.0  # of losses less gains, over blocks
    exact_accuracy: float = 0.0
    chosen_accuracy: float = 0.0
    upper_bound: float = 1.0  # of the drop, share
    speed: SpeedVerdict | None = None
    parts: list[Part] = field(default_factory=list)  # one for each load and task where there are several, and for each edge
    slo: list[dict[str, Any]] = field(default_factory=list)
    speedup: dict[str, Interval] = field(default_factory=dict)  # TPOT statistic -> ratio
    latency_ms: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)  # routing -> metric -> statistic
    active_before: float | None = None
    active_after: float | None = None
    tokens: dict[str, float] = field(default_factory=dict)

    @property
    def drop(self) -> float:
        """Measured drop, a share of items; positive is a loss."""
        return self.exact_accuracy - self.chosen_accuracy

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class LoadProbe:
    """One block of the chosen policy at a greater load than the tuned one."""

    load: float  # requests at a time, or requests/s
    tpot_ms: float  # mean
    broken: str = ""  # what did not hold there, in words

    @property
    def holds(self) -> bool:
        return not self.broken


@dataclass(frozen=True)
class MostLoad:
    """The most load that the chosen policy was shown to hold at exact routing's mean TPOT at the tuned load.

    Attributes:
        tuned: the highest tuned load: requests at a time, or requests/s where `open_loop`.
        load: the most in the same unit, the tuned load where no greater one was shown; None where it was not measured.
        at_least: no greater load could be tried.
        ratio: exact / chosen mean TPOT of the confirming pairs; None where no greater load was shown.
        tpot_ms: "exact" at the tuned and "chosen" at the most load, mean of the same pairs.
        probes: loads that were tried to find it.
        reason: why it was not measured, or no greater load was shown.
    """

    tuned: float
    open_loop: bool
    load: float | None = None
    at_least: bool = False
    ratio: Interval | None = None
    tpot_ms: dict[str, float] = field(default_factory=dict)
    probes: list[LoadProbe] = field(default_factory=list)
    reason: str = ""

    @property
    def times(self) -> float | None:
        """The most load over the tuned one."""
        return None if self.load is None else self.load / self.tuned


class Key(Generic[T]):
    """A name in the study and the type of its value."""

    def __init__(self, name: str, kind: Any) -> None:
        self.name = name
        self._adapter: TypeAdapter[T] = TypeAdapter(kind)

    def encode(self, value: T) -> Any:
        """The value as JSON."""
        return self._adapter.dump_python(value, mode="json")

    def decode(self, value: Any) -> T:
        return self._adapter.validate_python(value)


FINGERPRINT: Key[str] = Key("fingerprint", str)  # of everything that the study's trials must have in common
SPENT: Key[Spent] = Key("spent", Spent)
SECONDS: Key[dict[str, float]] = Key("seconds", dict[str, float])  # of each stage, over all restarts
ENGINE: Key[dict[str, Any]] = Key("key", dict[str, Any])  # what was measured on, as the profile's key
CEILING: Key[Finding] = Key("ceiling", Finding)  # what could be gained at most, found before the first trial
ENQUEUED: Key[bool] = Key("enqueued", bool)  # the first trials are planned
PACE: Key[Pace] = Key("pace", Pace)
EDGES: Key[list[BucketEdges]] = Key("edges", list[BucketEdges])  # bucket edges, frozen after the exact trial
LAYER_ORDER: Key[list[int]] = Key("layerOrder", list[int])  # of the space, frozen before a policy is tried; [] is the model's own
NOISE: Key[NoiseFloor] = Key("noise", NoiseFloor)  # as measured right after the exact trial
SIMILARITY: Key[str] = Key("similarity", str)  # digest of the similarity artefact that every trial used
SEARCH_ENDED: Key[str] = Key("searchEnded", str)  # why the search was cut short; empty where it was not
LADDER: Key[list[Candidate]] = Key("ladder", list[Candidate])  # frozen before the held-out items are opened
OPENING: Key[Opening] = Key("opening", Opening)
LADDER_ENDED: Key[str] = Key("ladderEnded", str)  # why later candidates were left out
OUTCOME: Key[Outcome] = Key("outcome", Outcome)
MADE: Key[Made] = Key("made", Made)  # when the profile was first written
MOST_LOAD: Key[MostLoad] = Key("mostLoad", MostLoad)  # measured after the outcome, which it does not change


def exact_answers_key(level: int) -> Key[dict[str, tuple[bool, str]]]:
    """Exact routing's answers to the search items at a load level: item digest -> (right, text)."""
    return Key(f"exactAnswers.{level}", dict[str, tuple[bool, str]])


def counts_key(bucket: int) -> Key[CountedChoices]:
    return Key(f"counts.{bucket}", CountedChoices)


def block_key(candidate: int, pair: int, level: int, routing: str) -> Key[MeasuredBlock]:
    return Key(f"block.{candidate}.{pair}.{level}.{routing}", MeasuredBlock)


def load_block_key(load: float, pair: int | None, routing: str) -> Key[MeasuredBlock]:
    """A block that measures the most load: of the search for it (no pair), or of a pair that confirms `load`."""
    return Key(f"loadBlock.{load:.6g}.{'probe' if pair is None else pair}.{routing}", MeasuredBlock)


def verdict_key(candidate: int) -> Key[Verdict]:
    return Key(f"verdict.{candidate}", Verdict)
