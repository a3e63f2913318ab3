"""The status of a SereDeployment: what has become of it, and all that a restarted operator needs to go on."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from sere_ext.contract.record import Record
from sere_operator.api.common import Challenger, ContestedFields, OperatorName
from sere_operator.api.conditions import Conditions
from sere_operator.api.deployment import MAX_CANARY_PODS

MAX_RUNS = 8  # tuning runs that are remembered
MAX_REJECTED = 16  # digests that are remembered as rejected


class PolicyStatus(Record):
    """Where the routing policy stands. All digests are policy digests, or `exact`."""

    wanted: Annotated[str | None, Field(description="what the spec leads to, before kill switch and rejection")] = None
    wanted_since: Annotated[
        str | None, Field(json_schema_extra={"format": "date-time"}, description="a policy is tried once it has stayed wanted")
    ] = None
    stable: Annotated[str | None, Field(description="what pods without an annotation run; also the column POLICY")] = None
    previous: Annotated[str | None, Field(description="what was stable before; `kubectl sere rollback` goes there")] = None
    description: Annotated[str | None, Field(max_length=2048, description="the stable policy in words")] = None
    profile: Annotated[str | None, Field(description="the SereProfile it came from")] = None
    override: Annotated[str | None, Field(description="exact where the kill switch is on")] = None


class RolloutStatus(Record):
    """A policy rollout under way. All that a restarted operator needs to go on."""

    candidate: Annotated[str | None, Field(description="digest of the policy on its way")] = None
    stage: Annotated[str | None, Field(description="Baseline, Canary, Analysing, AwaitingApproval, Promoting or RollingBack")] = (
        None
    )
    canary_pods: Annotated[tuple[str, ...], Field(max_length=MAX_CANARY_PODS, description="that run it")] = ()
    started_at: Annotated[str | None, Field(json_schema_extra={"format": "date-time"}, description="of this attempt")] = None
    attempt: Annotated[int | None, Field(description="number, from 1")] = None
    next_attempt_at: Annotated[
        str | None, Field(json_schema_extra={"format": "date-time"}, description="after an inconclusive one")
    ] = None
    message: Annotated[str | None, Field(description="what is going on")] = None
    state: Annotated[
        dict[str, Any] | None,
        Field(
            description="the analysis's own bookkeeping, such as the histograms it counts from",
            json_schema_extra={"x-kubernetes-preserve-unknown-fields": True},
        ),
    ] = None


class Rejection(Record):
    """A policy that a canary showed to be worse. Remembered for this model revision."""

    digest: Annotated[str, Field(description="of the policy")]
    revision: Annotated[str, Field(description="of model and engine, as the operator hashes them")] = ""
    message: Annotated[str, Field(description="the evidence")] = ""
    at: Annotated[str | None, Field(json_schema_extra={"format": "date-time"}, description="when")] = None


class TuningRun(Record):
    """A tuning run that was begun for this resource."""

    name: Annotated[str, Field(description="of the SereTuningJob")]
    outcome: Annotated[str | None, Field(description="Chosen, Infeasible, BudgetExhausted, CannotCertify or Failed")] = None
    profile: Annotated[str | None, Field(description="the SereProfile that it made")] = None
    device_hours: Annotated[str | None, Field(description="device time spent, hours")] = None
    start_time: Annotated[str | None, Field(json_schema_extra={"format": "date-time"}, description="of its pod")] = None
    message: Annotated[str | None, Field(max_length=512, description="the tuner's own")] = None
    asked: Annotated[str | None, Field(description="value of the annotation that asked for it once more")] = None


class SereDeploymentStatus(Record):
    """What has become of it. Figures are strings with their unit, as last certified, so that a quiet minute writes nothing."""

    observed_generation: Annotated[int | None, Field(description="of the spec that was judged")] = None
    operator: OperatorName | None = None
    challenger: Challenger | None = None
    conditions: Conditions = ()
    replicas: Annotated[int | None, Field(description="pods there are (scale subresource)")] = None
    ready_replicas: Annotated[int | None, Field(description="pods that serve what they are meant to")] = None
    selector: Annotated[str | None, Field(description="label selector of the pods (scale subresource)")] = None
    ready: Annotated[str | None, Field(description="ready of wanted, as shown by kubectl get: 2/2")] = None
    routing: Annotated[str | None, Field(description="the mode in force; Exact while the kill switch is on")] = None
    policy: Annotated[PolicyStatus | None, Field(description="where the routing policy stands")] = None
    rollout: Annotated[RolloutStatus | None, Field(description="a policy rollout under way")] = None
    rejected: Annotated[
        tuple[Rejection, ...], Field(max_length=MAX_REJECTED, description="policies that a canary showed to be worse")
    ] = ()
    tuning_runs: Annotated[
        tuple[TuningRun, ...],
        Field(max_length=MAX_RUNS, description="runs that were begun; deleting their jobs begins none anew"),
    ] = ()
    contested: ContestedFields = ()
    tuning_job: Annotated[str | None, Field(description="the SereTuningJob of this spec")] = None
    tpot_p95: Annotated[str | None, Field(description="as certified: 17.9ms")] = None
    speedup: Annotated[str | None, Field(description="as certified: 1.35x")] = None
    accuracy: Annotated[str | None, Field(description="change in points as certified: -0.2")] = None
    revision: Annotated[str | None, Field(description="hash of the pod template that is rolled out")] = None
