"""The tuning file: what to tune, under which limits, with which budgets. Reading it is `tuning_file.py`.

The YAML uses camelCase like every other file of this project. Every leaf is also a flag of `sere tune`, see `options.py`,
whose help is made of the descriptions here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator
from sere_ext.contract.errors import UsageError
from sere_ext.contract.policy import MAX_TOKENS, Kind, Record

# What the tuner itself sets. Given in extraArgs they would fight with it, so they are refused there.
TUNED_FLAGS = {
    "--model": "set `model`",
    "--revision": "set `revision`",
    "--additional-config": "the tuner puts the routing policy there; set `similarity`",
    "--max-model-len": "set `engine.maxModelLen`",
    "--tensor-parallel-size": "set `engine.tensorParallelSize`",
    "-tp": "set `engine.tensorParallelSize`",
    "--max-num-active-seqs": "the tuner decides the load; set `workload.load`",
    "--disable-log-stats": "the tuner needs the engine's statistics off and sets it itself",
}


@dataclass(frozen=True)
class Unset:
    """What holds where an optional field is left out, for the help."""

    text: str


class EngineSpec(Record):
    """The engine that is started once, as `vllm serve` would be given it."""

    max_model_len: Annotated[int | None, Field(ge=8, description="longest prompt plus answer, tokens"), Unset("the model's")] = (
        None
    )
    tensor_parallel_size: Annotated[int, Field(ge=1, description="devices per engine")] = 1
    extra_args: Annotated[tuple[str, ...], Field(description="further flags of `vllm serve`")] = ()

    @field_validator("extra_args")
    @classmethod
    def _not_tuned(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for argument in value:
            name = argument.split("=", 1)[0].replace("_", "-")
            for flag, instead in TUNED_FLAGS.items():
                if name == flag or name.startswith(flag + "."):
                    raise ValueError(f"{flag} is set by the tuner and may not stand here; {instead}")
        return value


class CalibrateSpec(Record):
    """How to make the similarity artefact before the search."""

    data: Annotated[str, Field(description="JSONL of calibration prompts"), Unset("the search items' prompts")]


class SyntheticSpec(Record):
    """Prompts of a given length, cut from the accuracy items' text (random tokens would route unlike text)."""

    input_tokens: Annotated[int, Field(ge=1, description="tokens per prompt"), Unset("no made-up prompts")]
    output_tokens: Annotated[int, Field(ge=2, description="tokens per answer; EOS is ignored"), Unset("no made-up prompts")]


class LoadSpec(Record):
    """Closed loop at each concurrency, or open loop with Poisson arrivals."""

    arrivals: Annotated[Literal["poisson"] | None, Field(description="open loop: how requests arrive"), Unset("poisson")] = None
    requests_per_second: Annotated[
        float | None, Field(gt=0, description="open loop: mean rate, requests/s"), Unset("closed loop")
    ] = None
    concurrency: Annotated[
        tuple[int, ...] | None, Field(max_length=8, description="closed loop: requests in flight, one number per load level")
    ] = None

    @field_validator("concurrency", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, int) else value

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.concurrency is not None:
            if self.requests_per_second is not None or self.arrivals is not None:
                raise ValueError("give either concurrency (closed loop) or requestsPerSecond (open loop), not both")
            if not self.concurrency or min(self.concurrency) < 1:
                raise ValueError("concurrency needs at least one number of 1 or more")
            if list(self.concurrency) != sorted(set(self.concurrency)):
                raise ValueError("concurrency must be ascending without repeats")
        elif self.requests_per_second is None:
            raise ValueError("give concurrency (closed loop) or requestsPerSecond (open loop)")
        return self

    @property
    def levels(self) -> tuple[int, ...]:
        """The concurrencies of a closed loop, or (0,) for the one open loop."""
        return self.concurrency or (0,)

    def condition(self, level: int) -> str:
        """What a comparison at this level holds equal."""
        return f"equal concurrency {level}" if level else f"equal rate, {self.requests_per_second:g} requests/s"


class WorkloadSpec(Record):
    """The timed traffic. Without dataset or synthetic it is the accuracy items themselves."""

    dataset: Annotated[
        str | None, Field(description="JSONL of prompts mixed into the labelled traffic"), Unset("the accuracy items alone")
    ] = None
    dataset_max_tokens: Annotated[int, Field(ge=1, description="longest answer to the dataset's prompts, tokens")] = 128
    synthetic: SyntheticSpec | None = None
    load: LoadSpec = LoadSpec(concurrency=(16,))
    seed: Annotated[int, Field(ge=0, description="arrivals and shuffles")] = 0

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.dataset and self.synthetic:
            raise ValueError("give either dataset or synthetic, not both")
        return self


class Quantiles(Record):
    """Limits in milliseconds on the mean or on percentiles of a request metric."""

    mean: Annotated[float | None, Field(gt=0, description="limit on the mean, ms"), Unset("none")] = None
    p50: Annotated[float | None, Field(gt=0, description="limit on the median, ms"), Unset("none")] = None
    p90: Annotated[float | None, Field(gt=0, description="limit on the 90th percentile, ms"), Unset("none")] = None
    p95: Annotated[float | None, Field(gt=0, description="limit on the 95th percentile, ms"), Unset("none")] = None
    p99: Annotated[float | None, Field(gt=0, description="limit on the 99th percentile, ms"), Unset("none")] = None

    def limits(self) -> dict[str, float]:
        """{"p95": 20.0}: the limits that are set, by statistic."""
        return {name: float(value) for name, value in self.model_dump().items() if value is not None}


class SloSpec(Record):
    """Limits on request latencies, defined as `vllm bench serve` defines them."""

    tpot_ms: Annotated[Quantiles | None, Field(description="time per output token")] = None
    ttft_ms: Annotated[Quantiles | None, Field(description="time to first token")] = None
    e2el_ms: Annotated[Quantiles | None, Field(description="whole request")] = None
    max_failure_share: Annotated[float, Field(ge=0, le=1, description="share of requests that may fail")] = 0.0

    def limits(self) -> list[tuple[str, str, float]]:
        """[("tpot", "p95", 20.0), ...], milliseconds."""
        found = []
        for metric in ("tpot", "ttft", "e2el"):
            quantiles: Quantiles | None = getattr(self, f"{metric}_ms")
            found += [(metric, name, limit) for name, limit in (quantiles.limits() if quantiles else {}).items()]
        return found

    @model_validator(mode="after")
    def _some_limit(self) -> Self:
        if not self.limits():
            raise ValueError("at least one latency limit is needed, e.g. tpotMs: {p95: 20}")
        return self


class TaskSpec(Record):
    """Labelled items: JSONL with `prompt` and `answer`, and how an answer is judged."""

    file: Annotated[str, Field(description="JSONL with prompt and answer")]
    metric: Literal["exact", "numeric", "regex", "contains"] = "exact"
    pattern: Annotated[str | None, Field(description="regex: its first group is compared with the answer")] = None
    max_tokens: Annotated[int, Field(ge=1, description="answer length limit")] = 64
    stop: Annotated[tuple[str, ...], Field(description="strings that end an answer")] = ()

    @model_validator(mode="after")
    def _pattern_for_regex(self) -> Self:
        if (self.metric == "regex") != (self.pattern is not None):
            raise ValueError("metric regex needs pattern, and pattern is for metric regex only")
        return self


class AccuracySpec(Record):
    """How much accuracy may be lost, and on what it is measured."""

    max_drop_points: Annotated[float, Field(ge=0, le=100, description="most accuracy that may be lost, points")] = 1.0
    confidence: Annotated[float, Field(gt=0.5, lt=1, description="of the certificate, a share")] = 0.95
    tasks: Annotated[
        tuple[TaskSpec, ...],
        Field(
            min_length=1,
            max_length=16,
            description="JSONL files of prompt and answer, each a name or {file, metric, pattern, maxTokens, stop}",
        ),
    ]
    search_items: Annotated[
        int | None, Field(ge=20, description="items kept for the search, the rest certify"), Unset("a sixth, 500 to 2,000")
    ] = None

    @field_validator("tasks", mode="before")
    @classmethod
    def _file_is_a_task(cls, value: Any) -> Any:
        many = value if isinstance(value, list | tuple) else [value]
        return [{"file": task} if isinstance(task, str) else task for task in many]

    @property
    def alpha(self) -> float:
        return round(1.0 - self.confidence, 12)  # 0.05, not 0.050000000000000044


class BucketEdges(Record):
    """One batch-size bucket to be searched, real tokens, inclusive."""

    min_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)]
    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKENS)] = MAX_TOKENS


class SearchSpec(Record):
    """What is searched and what may be spent on it."""

    policies: Annotated[
        tuple[Kind, ...], Field(min_length=1, description="kinds of routing to try, of sere, topk, oea and hybrid")
    ] = (
        Kind.SERE, Kind.TOPK, Kind.OEA,
    )  # fmt: skip
    trials: Annotated[int, Field(ge=1, le=10_000, description="ranking trials, the exact one included")] = 60
    device_hours: Annotated[float, Field(gt=0, description="budget: hours times devices, engine start included")] = 4.0
    wall_minutes: Annotated[float | None, Field(gt=0, description="budget: minutes on the clock"), Unset("none")] = None
    sampler: Annotated[Literal["model", "tpe", "random"], Field(description="who proposes trials")] = "model"
    items_per_trial: Annotated[int, Field(ge=16, description="labelled items per trial and load level")] = 500
    trial_seconds: Annotated[float, Field(gt=0, description="longest load of a trial, seconds per load level")] = 60.0
    buckets: Annotated[
        tuple[BucketEdges, ...] | None,
        Field(max_length=8, description="batch sizes to tune apart, each {minTokens, maxTokens}"),
        Unset("one per load level"),
    ] = None
    layer_groups: Annotated[
        bool, Field(description="S between two whole numbers too, the larger in the first layers; false: one S for all layers")
    ] = True
    min_share: Annotated[
        tuple[Annotated[float, Field(ge=0, le=1)], ...],
        Field(min_length=1, max_length=8, description="values of minShare to try where S is above 1; 0 keeps all of the top S"),
    ] = (0.0,)
    rungs: Annotated[int, Field(ge=1, le=3, description="candidates that may be certified")] = 3
    seed: Annotated[int, Field(ge=0, description="of the proposals")] = 0

    @field_validator("policies")
    @classmethod
    def _rerouting(cls, value: tuple[Kind, ...]) -> tuple[Kind, ...]:
        if Kind.EXACT in value:
            raise ValueError("exact is always trial 0; list only sere, topk, oea and hybrid")
        if Kind.BUDGET in value:
            raise ValueError("kind budget is not searched; list only sere, topk, oea and hybrid")
        return tuple(dict.fromkeys(value))

    @field_validator("min_share")
    @classmethod
    def _ascending(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(sorted(set(value)))


class CertifySpec(Record):
    """How the finalists are measured."""

    pairs: Annotated[int, Field(ge=2, le=100, description="paired blocks, exact and candidate each once")] = 10
    block_seconds: Annotated[float, Field(ge=1, description="least length of a block of the faster arm, seconds")] = 60.0
    block_residences: Annotated[float, Field(ge=1, description="least length of a block in request durations")] = 15.0
    items: Annotated[int | None, Field(ge=1, description="held-out items per arm"), Unset("as many as the blocks take")] = None


class TuningSpec(Record):
    """tuning.yaml, whole."""

    model: Annotated[str, Field(min_length=1, description="model name or folder")]
    revision: Annotated[str, Field(description="model revision"), Unset("the newest")] = ""
    engine: EngineSpec = EngineSpec()
    similarity: Annotated[
        str | None, Field(description="file of `sere calibrate`"), Unset("made where a kind needs it, from calibrate.data")
    ] = None
    calibrate: CalibrateSpec | None = None
    workload: WorkloadSpec = WorkloadSpec()
    slo: SloSpec
    accuracy: AccuracySpec
    search: SearchSpec = SearchSpec()
    certify: CertifySpec = CertifySpec()
    out: Annotated[str, Field(min_length=1, description="folder for the study, profile and report")] = "runs/sere"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.similarity and self.calibrate:
            raise ValueError("give either similarity or calibrate, not both")
        levels, buckets = self.workload.load.levels, self.search.buckets
        if buckets is not None and len(buckets) != len(levels):
            raise ValueError(f"search.buckets: {len(buckets)} buckets for {len(levels)} load levels; give one for each level")
        return self

    def input_files(self) -> list[tuple[str, str]]:
        """(field, path) of every file that the tuning reads."""
        found = [(f"accuracy.tasks.{i}.file", task.file) for i, task in enumerate(self.accuracy.tasks)]
        if self.similarity:
            found.append(("similarity", self.similarity))
        if self.calibrate:
            found.append(("calibrate.data", self.calibrate.data))
        if self.workload.dataset:
            found.append(("workload.dataset", self.workload.dataset))
        return found

    def check_files(self) -> None:
        """Raise UsageError naming the first input file that cannot be read."""
        for field, path in self.input_files():
            if not Path(path).is_file():
                raise UsageError(f"{field}: no file at {path}; check the path (it is taken from the folder you are in)")


def engine_options(spec: TuningSpec) -> list[str]:
    """What `vllm serve MODEL` would be given."""
    found = ["--tensor-parallel-size", str(spec.engine.tensor_parallel_size)] if spec.engine.tensor_parallel_size > 1 else []
    if spec.revision:
        found += ["--revision", spec.revision]
    if spec.engine.max_model_len:
        found += ["--max-model-len", str(spec.engine.max_model_len)]
    return [*found, *spec.engine.extra_args]
