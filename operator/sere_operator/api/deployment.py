"""The spec of a SereDeployment: the intent to serve a model. `deployment_status.py` says what has become of it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from sere_ext.contract.constraints import Constrained, at_most_one
from sere_ext.contract.policy import Policy
from sere_ext.contract.record import Record
from sere_ext.contract.slo import LatencySlo
from sere_operator.api.common import (
    Artefact,
    DnsName,
    Duration,
    Engine,
    Model,
    Resources,
    Toleration,
    Volumes,
    duration_seconds,
    volumes_apart,
    volumes_beside_tuning,
)
from sere_operator.api.pod_template import PodTemplate
from sere_operator.api.tuning import Accuracy, Tuning

MAX_CANARY_PODS = 64  # that the status can name
NEEDS_SIMILARITY = "buckets of kind sere need the similarity artefact; make one with `sere calibrate` and name it here"


class RoutingMode(StrEnum):
    EXACT = "Exact"
    STATIC = "Static"
    PROFILE = "Profile"
    TUNED = "Tuned"


class Approval(StrEnum):
    AUTO = "Auto"
    MANUAL = "Manual"


class Strategy(StrEnum):
    """What goes first when pods are replaced: the new one (Surge), or the old one (DrainFirst; needs no spare GPU)."""

    SURGE = "Surge"
    DRAIN_FIRST = "DrainFirst"


class ProfileRef(Record):
    """A SereProfile in the same namespace; with a digest, only that content is accepted."""

    name: Annotated[DnsName, Field(description="of the SereProfile")]
    digest: Annotated[
        str | None, Field(pattern=r"^sha256:[0-9a-f]{64}$", max_length=71, description="of the profile's spec; pins its content")
    ] = None


class Routing(Record):
    """Which routing policy is wanted."""

    mode: Annotated[RoutingMode, Field(description="Exact, Static, Profile or Tuned. Default: Exact.")] = RoutingMode.EXACT
    policy: Annotated[Policy | None, Field(description="the policy of mode Static")] = None
    similarity: Annotated[Artefact | None, Field(description="what `sere` buckets of mode Static go by")] = None
    profile_ref: Annotated[ProfileRef | None, Field(description="the profile of mode Profile")] = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for mode, field, given in (
            (RoutingMode.STATIC, "policy", self.policy is not None),
            (RoutingMode.PROFILE, "profileRef", self.profile_ref is not None),
        ):
            if self.mode is mode and not given:
                raise ValueError(f"mode {mode.value} needs {field}")
            if given and self.mode is not mode:
                raise ValueError(f"{field} is for mode {mode.value}; remove it or set the mode")
        if self.similarity is not None and self.mode is not RoutingMode.STATIC:
            raise ValueError("similarity is for mode Static; remove it or set the mode")
        return self


class AutoscalingMetric(Record):
    """A pods metric of the cluster's custom metrics API and its wanted mean per pod."""

    name: Annotated[str, Field(min_length=1, max_length=253, description="of the metric")]
    average_value: Annotated[str, Field(min_length=1, max_length=64, description="a Kubernetes quantity")]


class Autoscaling(Record):
    """Bounds for an autoscaler of the pods."""

    min: Annotated[int, Field(ge=1, le=10_000, description="fewest pods")] = 1
    max: Annotated[int, Field(ge=1, le=10_000, description="most pods")]
    metric: Annotated[AutoscalingMetric | None, Field(description="that it scales by")] = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max < self.min:
            raise ValueError(f"max {self.max} is below min {self.min}")
        return self


class Canary(Record):
    """How a policy is tried before all pods get it."""

    replicas: Annotated[int, Field(ge=1, le=MAX_CANARY_PODS, description="pods that try it")] = 1
    min_requests: Annotated[
        int, Field(ge=1, le=10_000_000, description="finished requests on each side before judging. Default: 500.")
    ] = 500
    deadline: Annotated[Duration, Field(description="after which too few requests mean Inconclusive. Default: 30m.")] = "30m"

    @property
    def deadline_seconds(self) -> int:
        return duration_seconds(self.deadline)


class Rollout(Record):
    """How changes reach the pods."""

    approval: Annotated[Approval, Field(description="Manual waits for a person after the canary. Default: Auto.")] = Approval.AUTO
    require_profile: Annotated[
        bool | None,
        Field(
            description="mode Tuned: pods that serve by a tuned policy are replaced by ones of a changed model or engine only "
            "once that is tuned and its profile certified; false: at once, with exact routing until it is tuned. Default: true."
        ),
    ] = None
    strategy: Annotated[Strategy, Field(description="Surge or DrainFirst. Default: Surge.")] = Strategy.SURGE
    max_surge: Annotated[int | None, Field(ge=0, le=1000, description="pods above replicas. Default: 1, with DrainFirst 0.")] = (
        None
    )
    max_unavailable: Annotated[
        int | None, Field(ge=0, le=1000, description="pods below replicas. Default: 0, with DrainFirst 1.")
    ] = None
    canary: Annotated[Canary, Field(description="how a policy is tried before all pods get it")] = Canary()

    @property
    def surge(self) -> int:
        """maxSurge in force, in pods."""
        default = 0 if self.strategy is Strategy.DRAIN_FIRST else 1
        return default if self.max_surge is None else self.max_surge

    @property
    def unavailable(self) -> int:
        """maxUnavailable in force, in pods."""
        default = 1 if self.strategy is Strategy.DRAIN_FIRST else 0
        return default if self.max_unavailable is None else self.max_unavailable

    @model_validator(mode="after")
    def _can_move(self) -> Self:
        if self.surge == 0 and self.unavailable == 0:
            raise ValueError("maxSurge and maxUnavailable are both 0, so no pod could be replaced; set one of them to 1")
        return self


class SereDeploymentSpec(Constrained):
    """What is wanted."""

    constraints: ClassVar = (
        at_most_one("replicas", "autoscaling", ": they would fight over the number of pods"),
        *volumes_apart("volumes"),
        volumes_beside_tuning(),
    )

    model: Annotated[Model, Field(description="what is served")]
    engine: Annotated[Engine, Field(description="how vLLM is run")] = Engine()
    resources: Annotated[Resources | None, Field(description="of the engine's container")] = None
    replicas: Annotated[int | None, Field(ge=0, le=10_000, description="pods. Without replicas and autoscaling: 1.")] = None
    autoscaling: Annotated[
        Autoscaling | None,
        Field(
            description="instead of replicas: a HorizontalPodAutoscaler is made where a metric is given; without one bring an "
            "autoscaler for the Deployment of this name"
        ),
    ] = None
    slo: Annotated[LatencySlo | None, Field(description="latency limits; needed by mode Tuned")] = None
    accuracy: Annotated[Accuracy | None, Field(description="how much may be given up; needed by mode Tuned")] = None
    routing: Annotated[Routing, Field(description="which policy is wanted")] = Routing()
    tuning: Annotated[Tuning | None, Field(description="needed by mode Tuned")] = None
    rollout: Annotated[Rollout, Field(description="how changes reach the pods")] = Rollout()
    suspend: Annotated[bool, Field(description="true: the operator changes nothing, what runs goes on. Default: false.")] = False
    volumes: Volumes = ()
    node_selector: Annotated[dict[str, str] | None, Field(max_length=16, description="labels that a node must have")] = None
    tolerations: Annotated[tuple[Toleration, ...], Field(max_length=16, description="taints that the pods tolerate")] = ()
    runtime_class_name: Annotated[DnsName | None, Field(description="such as nvidia")] = None
    pod_template: Annotated[
        PodTemplate | None, Field(description="what else the engine pods are to have; see tuning.podTemplate for tuning pods")
    ] = None

    @property
    def wanted_replicas(self) -> int | None:
        """Pods to run, or None where an autoscaler decides."""
        return None if self.autoscaling else 1 if self.replicas is None else self.replicas

    @property
    def static_similarity(self) -> str | None:
        """URI of the artefact for a Static policy: routing.similarity, else one that tuning names."""
        if self.routing.similarity is not None:
            return self.routing.similarity.uri
        made = self.tuning.similarity if self.tuning is not None else None
        return made.uri if made is not None else None

    @property
    def profile_required(self) -> bool:
        """Whether a new model or engine waits for a profile of its own."""
        return self.routing.mode is RoutingMode.TUNED and self.rollout.require_profile is not False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        policy = self.routing.policy
        if policy is not None and policy.needs_similarity() and self.static_similarity is None:
            raise ValueError(f"routing.similarity: {NEEDS_SIMILARITY}")
        if self.routing.mode is RoutingMode.TUNED:
            needed = {"slo": self.slo, "accuracy": self.accuracy, "tuning": self.tuning}
            missing = [field for field, given in needed.items() if given is None]
            if missing:
                raise ValueError(f"routing.mode Tuned needs {', '.join(missing)}: limits to keep and how to tune")
        return self
