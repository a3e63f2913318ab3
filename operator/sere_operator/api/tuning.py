"""The input of a tuning run as a resource has it, and the SereTuningJob: one immutable run.

Fields, bounds and defaults are those of tuning.yaml (`sere_ext.contract.tuning`); a resource has sources that the operator
mounts where the file has paths.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from sere_ext.contract.constraints import Constrained, exactly_one, rule
from sere_ext.contract.record import Record
from sere_ext.contract.slo import LatencySlo
from sere_ext.contract.tuning import (
    MAX_TASKS,
    ONE_SOURCE,
    AccuracyLimits,
    CertifySpec,
    Scoring,
    SearchBudget,
    SearchDetails,
    WorkloadShape,
    buckets_fit,
)
from sere_operator.api.common import (
    Challenger,
    Claim,
    ContestedFields,
    DnsName,
    Engine,
    Model,
    OperatorName,
    Resources,
    SimilarityUri,
    Source,
    Text,
    Toleration,
    Volumes,
    volumes_apart,
    volumes_beside_tuning,
)
from sere_operator.api.conditions import Conditions
from sere_operator.api.pod_template import PodTemplate

MAX_CANDIDATES = 5


class Task(Scoring, Source):
    """A file of labelled items, and how their answers are judged."""


class Accuracy(AccuracyLimits):
    """How much accuracy may be lost, and on what it is measured."""

    tasks: Annotated[
        tuple[Task, ...], Field(min_length=1, max_length=MAX_TASKS, description="labelled items and how answers are judged")
    ]


class Similarity(Constrained):
    """The similarity artefact: made by the run from calibration text, or one made before."""

    constraints: ClassVar = (exactly_one("calibrate", "uri"),)

    calibrate: Annotated[Source | None, Field(description='calibration text, JSON lines of {"prompt"}')] = None
    uri: Annotated[SimilarityUri | None, Field(description="a similarity.safetensors made by `sere calibrate`")] = None


class Workload(WorkloadShape):
    """The traffic to tune for. Without dataset and synthetic, the accuracy items themselves are the requests."""

    constraints: ClassVar = (ONE_SOURCE,)

    dataset: Annotated[Source | None, Field(description="prompts, ShareGPT or messages, mixed into the labelled traffic")] = None


_LEVELS = "(has(self.workload.load) && has(self.workload.load.concurrency) ? self.workload.load.concurrency.size() : 1)"


class Tuning(SearchBudget, Constrained):
    """Budgets and traffic of a tuning run."""

    constraints: ClassVar = (
        *volumes_apart("volumes"),
        rule(
            f"!has(self.search) || !has(self.search.buckets) || self.search.buckets.size() == {_LEVELS}",
            "search.buckets: give one for each load level of workload.load.concurrency",
            lambda tuning: buckets_fit(tuning.workload.load, tuning.search) is None,
        ),
        rule(
            "has(self.similarity) || (has(self.policies) && !self.policies.exists(p, p in ['sere', 'hybrid']))",
            "policies sere and hybrid need similarity: give calibrate or uri, or name policies without these two, such as [topk, oea]",
            lambda tuning: tuning.similarity is not None or not any(kind.needs_similarity for kind in tuning.policies),
            field="similarity",
        ),
    )

    similarity: Annotated[
        Similarity | None,
        Field(
            description="the similarity artefact, made by the run from calibration text or made before; needed where sere or hybrid "
            "is among policies, as sere is by default"
        ),
    ] = None
    workload: Workload
    search: Annotated[SearchDetails | None, Field(description="how the search goes about it")] = None
    certify: Annotated[CertifySpec | None, Field(description="how the candidates that the search picked are measured")] = None
    resources: Annotated[Resources | None, Field(description="of the tuning pod. Default: spec.resources.")] = None
    volumes: Annotated[Volumes, Field(description="further claims, beside spec.volumes")] = ()
    pod_template: Annotated[
        PodTemplate | None,
        Field(
            description="what else the tuning pod is to have; its service account is the operator's, which may write the result"
        ),
    ] = None
    storage: Annotated[
        Claim | None,
        Field(
            description="writable claim that keeps the study: a run whose pod was evicted, crashed or suspended goes on where it was, "
            "and later runs know which items were opened. Several runs may share one. Default: an emptyDir, so that such a run "
            "fails, or begins anew after suspend"
        ),
    ] = None

    @model_validator(mode="after")
    def _own_service_account(self) -> Self:
        if self.pod_template is not None and (self.pod_template.spec or {}).keys() & {"serviceAccountName", "serviceAccount"}:
            raise ValueError(
                "podTemplate.spec.serviceAccountName: the tuning pod has its own, which may write the result; remove it here"
            )
        return self


class SereTuningJobSpec(Constrained):
    """An immutable copy of what is tuned. Only `suspend` may change."""

    constraints: ClassVar = (*volumes_apart("volumes"), volumes_beside_tuning())

    deployment: Annotated[DnsName | None, Field(description="the SereDeployment that asked for this run")] = None
    model: Model
    engine: Engine = Engine()
    resources: Resources | None = None
    slo: LatencySlo
    accuracy: Accuracy
    tuning: Tuning
    volumes: Volumes = ()
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
    operator: OperatorName | None = None
    challenger: Challenger | None = None
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
    contested: ContestedFields = ()
    result_config_map: Annotated[str | None, Field(description="named by the operator beforehand; the run writes it")] = None
    profile: Annotated[str | None, Field(description="the SereProfile made from the result")] = None
