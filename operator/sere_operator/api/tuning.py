"""What a tuning run is told, and the SereTuningJob resource: one immutable run."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import Field, model_validator
from sere_ext.contract.policy import Record

from sere_operator.api.common import (
    Claim,
    DnsName,
    Engine,
    Model,
    Resources,
    SimilarityUri,
    Slo,
    Source,
    Text,
    Toleration,
    VolumeMount,
)
from sere_operator.api.conditions import Conditions

MAX_CANDIDATES = 5


class Metric(StrEnum):
    """How an answer is scored against the labelled one."""

    EXACT = "exact"
    NUMERIC = "numeric"
    REGEX = "regex"
    CONTAINS = "contains"


class SearchKind(StrEnum):
    """Kinds of re-routing to search. Exact routing is always trial 0."""

    SERE = "sere"
    TOPK = "topk"
    OEA = "oea"
    HYBRID = "hybrid"


class Task(Source):
    """Labelled items, JSON lines of {"prompt", "answer"}, and how answers are scored."""

    metric: Annotated[Metric, Field(description="how an answer is scored. Default: exact.")] = Metric.EXACT
    pattern: Annotated[str | None, Field(max_length=1024, description="regex: its first group is compared with the answer")] = (
        None
    )
    max_tokens: Annotated[int | None, Field(ge=1, le=65_536, description="answer length limit. Default: 64.")] = None
    stop: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=256)], ...],
        Field(max_length=8, description="strings that end an answer"),
    ] = ()

    @model_validator(mode="after")
    def _pattern_for_regex(self) -> Self:
        if (self.metric is Metric.REGEX) != (self.pattern is not None):
            raise ValueError("metric regex needs pattern, and pattern is for metric regex only")
        return self


class Accuracy(Record):
    """How much accuracy may be given up, and on what it is measured."""

    max_drop_points: Annotated[float, Field(ge=0, le=100, description="largest drop, in points (percent of items)")]
    confidence: Annotated[float, Field(ge=0.5, le=0.9999, description="of the certificate. Default: 0.95.")] = 0.95
    tasks: Annotated[tuple[Task, ...], Field(min_length=1, max_length=8, description="labelled items and their scoring")]
    search_items: Annotated[
        int | None, Field(ge=20, le=1_000_000, description="items kept for the search; the rest certify. Default: a sixth.")
    ] = None


class Similarity(Record):
    """The similarity artefact: made by the run from calibration text, or one made before."""

    calibrate: Annotated[Source | None, Field(description='calibration text, JSON lines of {"prompt"}')] = None
    uri: Annotated[SimilarityUri | None, Field(description="a similarity.safetensors made by `sere calibrate`")] = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.calibrate is None) == (self.uri is None):
            raise ValueError("give exactly one of calibrate and uri")
        return self


class Synthetic(Record):
    """Requests of random tokens."""

    input_tokens: Annotated[int, Field(ge=1, le=1_048_576, description="tokens per prompt")]
    output_tokens: Annotated[int, Field(ge=2, le=1_048_576, description="tokens per answer")]


class Arrivals(StrEnum):
    POISSON = "poisson"


class Load(Record):
    """How requests arrive: at a rate (open loop), or so many at a time (closed loop)."""

    requests_per_second: Annotated[float | None, Field(ge=0.001, le=100_000, description="mean rate of the open loop")] = None
    arrivals: Annotated[Arrivals | None, Field(description="of the open loop. Default: poisson.")] = None
    concurrency: Annotated[
        tuple[Annotated[int, Field(ge=1, le=65_536)], ...] | None,
        Field(min_length=1, max_length=8, description="requests in flight of the closed loop, ascending; each is measured"),
    ] = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.requests_per_second is None) == (self.concurrency is None):
            raise ValueError("give exactly one of requestsPerSecond and concurrency")
        if self.arrivals is not None and self.concurrency is not None:
            raise ValueError("arrivals is for requestsPerSecond; leave it out with concurrency")
        if self.concurrency is not None and list(self.concurrency) != sorted(set(self.concurrency)):
            raise ValueError("concurrency must be ascending without repeats")
        return self


class Workload(Record):
    """The traffic to tune for. Without dataset and synthetic, the accuracy items themselves are the requests."""

    dataset: Annotated[Source | None, Field(description="prompts, JSON lines")] = None
    synthetic: Annotated[Synthetic | None, Field(description="prompts of a given length")] = None
    load: Annotated[Load, Field(description="how requests arrive")]

    @model_validator(mode="after")
    def _at_most_one(self) -> Self:
        if self.dataset is not None and self.synthetic is not None:
            raise ValueError("give dataset or synthetic, not both")
        return self


class Tuning(Record):
    """Budgets and traffic of a tuning run."""

    device_hours: Annotated[float, Field(ge=0.001, le=100_000, description="device time the run may use. Default: 4.")] = 4.0
    trials: Annotated[int, Field(ge=1, le=10_000, description="search trials the run may use. Default: 60.")] = 60
    rungs: Annotated[int | None, Field(ge=1, le=3, description="candidates to certify at most. Default: 3.")] = None
    policies: Annotated[
        tuple[SearchKind, ...] | None,
        Field(min_length=1, max_length=len(SearchKind), description="kinds to search. Default: sere, topk and oea."),
    ] = None
    similarity: Similarity
    workload: Workload
    search: Annotated[
        dict[str, Any] | None,
        Field(
            description="further keys of tuning.yaml's `search` section, handed to the tuner, which checks them",
            json_schema_extra={"x-kubernetes-preserve-unknown-fields": True},
        ),
    ] = None
    certify: Annotated[
        dict[str, Any] | None,
        Field(
            description="tuning.yaml's `certify` section, handed to the tuner, which checks it",
            json_schema_extra={"x-kubernetes-preserve-unknown-fields": True},
        ),
    ] = None
    resources: Annotated[Resources | None, Field(description="of the tuning pod. Default: spec.resources.")] = None
    volumes: Annotated[tuple[VolumeMount, ...], Field(max_length=16, description="further claims, beside spec.volumes")] = ()
    storage: Annotated[
        Claim | None,
        Field(
            description="writable claim that keeps the study: a run whose pod was evicted, crashed or suspended goes on where it was, "
            "and later runs know which items were opened. Several runs may share one. Default: an emptyDir, so that such a run "
            "fails, or begins anew after suspend"
        ),
    ] = None


class SereTuningJobSpec(Record):
    """An immutable copy of what is tuned. Only `suspend` may change."""

    deployment: Annotated[DnsName | None, Field(description="the SereDeployment that asked for this run")] = None
    model: Model
    engine: Engine = Engine()
    resources: Resources | None = None
    slo: Slo
    accuracy: Accuracy
    tuning: Tuning
    volumes: Annotated[tuple[VolumeMount, ...], Field(max_length=16, description="further claims, mounted read-only")] = ()
    node_selector: Annotated[dict[str, str] | None, Field(max_length=16, description="labels that a node must have")] = None
    tolerations: Annotated[tuple[Toleration, ...], Field(max_length=16, description="taints that the pod tolerates")] = ()
    runtime_class_name: Annotated[DnsName | None, Field(description="such as nvidia")] = None
    suspend: Annotated[
        bool, Field(description="true stops the run; set back it goes on where it was, without tuning.storage it begins anew")
    ] = False


class TrialCounts(Record):
    scheduled: Annotated[int, Field(description="that will be run")] = 0
    completed: Annotated[int, Field(description="that have ended")] = 0
    feasible: Annotated[int, Field(description="that kept all limits")] = 0
    infeasible: Annotated[int, Field(description="that broke a limit")] = 0
    failed: Annotated[int, Field(description="that ended in an error")] = 0


class Candidate(Record):
    """A policy that the run considered for certification."""

    policy: Annotated[str, Field(description="in words")]
    verdict: Annotated[str, Field(description="passed, or what became of it")] = ""


class SereTuningJobStatus(Record):
    """What the run has done so far. Metric values are strings with their unit, as shown."""

    observed_generation: Annotated[int | None, Field(description="of the spec that was judged")] = None
    conditions: Conditions = ()
    trials: Annotated[TrialCounts | None, Field(description="counted so far")] = None
    progress: Annotated[str | None, Field(description="trials done of wanted, as shown by kubectl get: 12/60")] = None
    stage: Annotated[Text | None, Field(description="what the run is doing")] = None
    outcome: Annotated[Text | None, Field(description="Chosen, Infeasible, BudgetExhausted, CannotCertify or Failed")] = None
    candidates: Annotated[
        tuple[Candidate, ...], Field(max_length=MAX_CANDIDATES, description="that were considered for certification")
    ] = ()
    device_hours: Annotated[str | None, Field(description="device time spent, hours")] = None
    start_time: Annotated[str | None, Field(json_schema_extra={"format": "date-time"}, description="of the run")] = None
    completion_time: Annotated[str | None, Field(json_schema_extra={"format": "date-time"}, description="of the run")] = None
    result_config_map: Annotated[str | None, Field(description="named by the operator beforehand; the run writes it")] = None
    profile: Annotated[str | None, Field(description="the SereProfile made from the result")] = None
