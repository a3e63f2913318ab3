"""The input of a tuning run, as far as tuning.yaml and the SereTuningJob have the same: fields, bounds, defaults, rules.

tuning.yaml and the flags of `sere tune` add paths of files to these models (`sere_autotune.tuning.spec`), the resources add
sources that the operator mounts (`sere_operator.api.tuning`). The descriptions here are the help of both.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import Field, field_validator

from sere_ext.contract.answers import AnswerMetric
from sere_ext.contract.constraints import Constrained, at_most_one, exactly_one, rule
from sere_ext.contract.engine_flags import extra_args_constraints
from sere_ext.contract.policy import MAX_TOKENS, Kind
from sere_ext.contract.record import Record, Unset

MAX_LOADS: Final = 8
MAX_TASKS: Final = 16
_MAX_MODEL_LEN: Final = 16_777_216
_MAX_COUNT: Final = 10_000_000


class EngineOptions(Constrained):
    """The engine's options that decide what is measured."""

    constraints: ClassVar = extra_args_constraints()

    tensor_parallel_size: Annotated[int, Field(ge=1, le=64, description="devices per engine that share the model")] = 1
    max_model_len: Annotated[
        int | None,
        Field(ge=8, le=_MAX_MODEL_LEN, description="longest prompt and answer together, tokens"),
        Unset("the model's"),
    ] = None
    extra_args: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=4096)], ...],
        Field(max_length=64, description="further arguments of `vllm serve`; flags that other fields set are refused"),
    ] = ()


class ItemFields(Record):
    """Names of the columns of a file of items."""

    prompt: Annotated[str | None, Field(min_length=1, max_length=253, description="column of the prompt")] = None
    answer: Annotated[str | None, Field(min_length=1, max_length=253, description="column of the right answer")] = None


class Scoring(Constrained):
    """How the answers to a file of labelled items are judged, and how its columns are read."""

    constraints: ClassVar = (
        rule(
            "(has(self.metric) && self.metric == 'regex') == has(self.pattern)",
            "metric regex needs pattern, and pattern is for metric regex only",
            lambda task: (task.metric == "regex") == (task.pattern is not None),
        ),
    )

    metric: Annotated[
        AnswerMetric,
        Field(
            description="when an answer is right: exact, the same text; numeric, the same last number; contains, the right answer "
            "stands in it; regex, what the pattern finds is the right answer"
        ),
    ] = "exact"
    pattern: Annotated[
        str | None, Field(max_length=1024, description="of metric regex: its first group is compared with the right answer")
    ] = None
    max_tokens: Annotated[int, Field(ge=1, le=65_536, description="answer length limit, tokens")] = 64
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=256)], ...],
        Field(max_length=8, description="strings that end an answer"),
    ] = ()
    fields: Annotated[
        ItemFields | None,
        Field(description="columns of the file. Default: prompt, question or messages, and answer"),
    ] = None

    @field_validator("pattern")
    @classmethod
    def _can_be_compiled(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except re.error as error:
            raise ValueError(f"the pattern is no regular expression ({error}); correct it") from error
        return value


class AccuracyLimits(Record):
    """How much accuracy may be lost, and how surely that is to be shown."""

    max_drop_points: Annotated[
        float, Field(ge=0, le=100, description="largest drop of accuracy, in points (percent of items)")
    ] = 1.0
    confidence: Annotated[float, Field(gt=0.5, lt=1, description="of the certificate, a share")] = 0.95
    search_items: Annotated[
        int | None,
        Field(ge=20, le=1_000_000, description="items kept for the search, the rest certify"),
        Unset("a sixth, 500 to 2,000, but a third at most"),
    ] = None
    chat: Annotated[
        bool,
        Field(
            description="true: prompts are sent as a user's message by the model's chat template, as /v1/chat/completions sends "
            "them; items of `messages` always are"
        ),
    ] = False

    @property
    def alpha(self) -> float:
        """The level of the tests: one minus the confidence, without the noise of binary fractions."""
        return round(1.0 - self.confidence, 12)


class SyntheticPrompts(Record):
    """Prompts of a given length, cut from the accuracy items' text (random tokens would be routed unlike text)."""

    input_tokens: Annotated[int, Field(ge=1, le=1_048_576, description="tokens per prompt"), Unset("no made-up prompts")]
    output_tokens: Annotated[
        int, Field(ge=2, le=1_048_576, description="tokens per answer, whose end is ignored"), Unset("no made-up prompts")
    ]


def _ascends(load: Any) -> bool:
    return load.concurrency is None or list(load.concurrency) == sorted(set(load.concurrency))


class LoadSpec(Constrained):
    """How requests arrive: so many at a time (closed loop), or at a rate with Poisson arrivals (open loop)."""

    constraints: ClassVar = (
        exactly_one("requests_per_second", "concurrency"),
        rule(
            "!(has(self.arrivals) && has(self.concurrency))",
            "arrivals is for requestsPerSecond; leave it out with concurrency",
            lambda load: load.arrivals is None or load.concurrency is None,
        ),
        rule(
            f"!has(self.concurrency) || {list(range(MAX_LOADS - 1))}.all(i, i + 1 >= self.concurrency.size() || "
            "self.concurrency[i] < self.concurrency[i + 1])",
            "concurrency must be ascending without repeats",
            _ascends,
            field="concurrency",
        ),
    )

    arrivals: Annotated[Literal["poisson"] | None, Field(description="open loop: how they are spaced"), Unset("poisson")] = None
    requests_per_second: Annotated[
        float | None, Field(gt=0, le=100_000, description="open loop: mean rate, requests/s"), Unset("closed loop")
    ] = None
    concurrency: Annotated[
        tuple[Annotated[int, Field(ge=1, le=65_536)], ...] | None,
        Field(
            min_length=1,
            max_length=MAX_LOADS,
            description="closed loop: requests in flight, ascending; each is a load level that is measured",
        ),
    ] = None

    @field_validator("concurrency", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, int) else value

    @property
    def levels(self) -> tuple[int, ...]:
        """The concurrencies of a closed loop, or (0,) for the one open loop."""
        return self.concurrency or (0,)

    def condition(self, level: int) -> str:
        """What a comparison at a load level holds equal, in words."""
        return f"equal concurrency {level}" if level else f"equal rate, {self.requests_per_second:g} requests/s"


class WorkloadShape(Constrained):
    """The timed traffic. Without prompts of its own it is the accuracy items themselves."""

    dataset_max_tokens: Annotated[int, Field(ge=1, le=65_536, description="longest answer to the dataset's prompts, tokens")] = (
        128
    )
    synthetic: Annotated[SyntheticPrompts | None, Field(description="prompts of a given length")] = None
    load: Annotated[LoadSpec, Field(description="how requests arrive. Default: concurrency 16")] = LoadSpec(concurrency=(16,))
    seed: Annotated[int, Field(ge=0, le=2**31, description="of arrivals and shuffles")] = 0


ONE_SOURCE: Final = at_most_one("dataset", "synthetic")  # for the subclasses of WorkloadShape, which add `dataset`


class BucketEdges(Record):
    """One range of batch sizes to be tuned by itself, in real tokens of a step, both ends inclusive."""

    min_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS, description="fewest real tokens of a step, inclusive")]
    max_tokens: Annotated[
        int, Field(ge=1, le=MAX_TOKENS, description="most real tokens of a step, inclusive. Default: no upper edge")
    ] = MAX_TOKENS


class SearchBudget(Record):
    """What a search may spend, and which kinds of routing it tries."""

    policies: Annotated[
        tuple[Literal[Kind.SERE, Kind.TOPK, Kind.OEA, Kind.HYBRID], ...],
        Field(
            min_length=1,
            max_length=8,
            description="kinds of routing to try, of sere, topk, oea and hybrid; exact routing is always trial 0",
        ),
    ] = (
        Kind.SERE,
        Kind.TOPK,
        Kind.OEA,
    )
    trials: Annotated[int, Field(ge=1, le=10_000, description="search trials, the exact one included")] = 60
    device_hours: Annotated[float, Field(gt=0, le=100_000, description="budget: hours times devices, engine start included")] = (
        4.0
    )
    rungs: Annotated[
        int,
        Field(
            ge=1,
            le=8,
            description="candidates that go to certification at most; more than three only where half of the budget pays for them",
        ),
    ] = 8

    @field_validator("policies")
    @classmethod
    def _each_once(cls, value: tuple[Kind, ...]) -> tuple[Kind, ...]:
        return tuple(dict.fromkeys(value))


class SearchDetails(Record):
    """How the search goes about it."""

    wall_minutes: Annotated[
        float | None, Field(gt=0, le=1_000_000, description="budget: minutes on the clock"), Unset("none")
    ] = None
    sampler: Annotated[Literal["random", "tpe"], Field(description="Optuna's sampler that draws the trials")] = "random"
    items_per_trial: Annotated[int, Field(ge=16, le=_MAX_COUNT, description="labelled items per trial and load level")] = 500
    trial_seconds: Annotated[
        float, Field(gt=0, le=86_400, description="longest measurement of a trial, seconds per load level")
    ] = 60.0
    buckets: Annotated[
        tuple[BucketEdges, ...] | None,
        Field(max_length=MAX_LOADS, description="batch sizes to tune apart, each {minTokens, maxTokens}"),
        Unset("one per load level"),
    ] = None
    layer_groups: Annotated[
        bool,
        Field(
            description="S between two whole numbers too, the larger in those layers that need it most, as a search of 16 trials or more measures; false: one S for all layers"
        ),
    ] = True
    min_share: Annotated[
        tuple[Annotated[float, Field(ge=0, le=1)], ...],
        Field(min_length=1, max_length=8, description="values of minShare to try where S is above 1; 0 keeps all of the top S"),
    ] = (0.0, 0.5)
    s_values: Annotated[
        tuple[Annotated[float, Field(ge=1, le=64)], ...] | None,
        Field(
            min_length=1,
            max_length=64,
            description="values of S to try, where it is known which are worth it; 2.25 is S = 3 in a quarter of the layers and 2 in the rest",
        ),
        Unset("all below the model's top-k"),
    ] = None
    seed: Annotated[int, Field(ge=0, le=2**31, description="of the proposals")] = 0

    @field_validator("min_share", "s_values")
    @classmethod
    def _ascending(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        return None if value is None else tuple(sorted(set(value)))


class CertifySpec(Record):
    """How the candidates that the search picked are measured."""

    pairs: Annotated[int, Field(ge=2, le=100, description="paired blocks, exact and candidate each once")] = 10
    block_seconds: Annotated[float, Field(ge=1, le=86_400, description="least length of a block of the faster side, seconds")] = (
        60.0
    )
    block_residences: Annotated[
        float, Field(ge=1, le=10_000, description="least length of a block, in durations of a request")
    ] = 15.0
    items: Annotated[
        int | None,
        Field(ge=1, le=_MAX_COUNT, description="held-out items that a certificate may use, the same for both routings"),
        Unset("all that the budget pays for"),
    ] = None
    most_load: Annotated[
        bool,
        Field(
            description="also find the most load at which the certified policy has the latency of exact routing at the tuned load"
        ),
    ] = True


def buckets_fit(load: LoadSpec, details: SearchDetails | None) -> str | None:
    """What is wrong between the load levels and the batch sizes to tune, as a sentence, or None."""
    buckets = details.buckets if details is not None else None
    if buckets is None or len(buckets) == len(load.levels):
        return None
    return f"search.buckets: {len(buckets)} buckets for {len(load.levels)} load levels; give one for each level"
