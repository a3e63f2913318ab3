"""What the operator knows at one moment: the only input of `decide`. Kubernetes objects are plain dicts as read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from sere_ext.contract.profile import ProfileKey
from sere_ext.contract.state import EngineState
from sere_operator.plan.histogram import Histogram
from sere_operator.plan.reads import Read

Object = dict[str, Any]


@dataclass(frozen=True)
class PodMetrics:
    """`sere_tpot_seconds` and `sere_ttft_seconds` of one pod: (policy digest, bucket) -> histogram."""

    tpot: dict[tuple[str, str], Histogram] = field(default_factory=dict)
    ttft: dict[tuple[str, str], Histogram] = field(default_factory=dict)


@dataclass(frozen=True)
class PodView:
    """A pod as the API server has it, and as it answers itself.

    state   body of `GET /sere`, None if the pod gave none that can be read
    proven  digest under which this very container gave one real token, None if none did yet
    """

    object: Object
    state: EngineState | None = None
    proven: str | None = None
    metrics: PodMetrics | None = None

    @property
    def name(self) -> str:
        return str(self.object["metadata"]["name"])

    @property
    def uid(self) -> str:
        return str(self.object["metadata"]["uid"])

    @property
    def annotations(self) -> dict[str, str]:
        return self.object["metadata"].get("annotations") or {}

    @property
    def labels(self) -> dict[str, str]:
        return self.object["metadata"].get("labels") or {}

    @property
    def terminating(self) -> bool:
        return bool(self.object["metadata"].get("deletionTimestamp"))

    @property
    def ready(self) -> bool:
        """The kubelet's word (readiness probe), of a pod that is not being deleted."""
        conditions = self.object.get("status", {}).get("conditions") or []
        return not self.terminating and any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)

    @property
    def restarts(self) -> int:
        return sum(int(c.get("restartCount", 0)) for c in self.object.get("status", {}).get("containerStatuses") or [])

    @property
    def digest(self) -> str | None:
        """The policy that all its ranks say they apply, None while they differ or do not answer."""
        return self.state.serves if self.state is not None else None

    @property
    def key(self) -> ProfileKey | None:
        """What the pod says it is: model, engine, device. None where it does not answer."""
        return self.state.key if self.state is not None else None

    @property
    def error(self) -> str | None:
        """Why the pod does not apply the policy that it was given, in its own words, cut to 300 characters."""
        found = self.state.error if self.state is not None else None
        return " ".join(found.split())[:300] if found else None


@dataclass(frozen=True)
class GoldenResult:
    """Golden prompts answered by one pod under one policy: right or wrong in the prompts' order, None for an error."""

    pod_uid: str
    digest: str
    right: tuple[bool | None, ...]


@dataclass(frozen=True)
class Similarity:
    """A similarity artefact's file in shards, ready for ConfigMaps' binaryData, or why it cannot be had."""

    shards: tuple[str, ...] = ()  # base64
    digest: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class Resource:
    """One of our custom resources, and what has been read around it so far.

    now     seconds since the epoch, when the last answer came
    object  the resource with apiVersion and kind
    read    the reads whose answers are in this snapshot
    """

    now: float
    object: Object
    read: frozenset[Read] = frozenset()

    @property
    def name(self) -> str:
        return str(self.object["metadata"]["name"])

    @property
    def namespace(self) -> str:
        return str(self.object["metadata"]["namespace"])

    @property
    def spec(self) -> Object:
        return self.object.get("spec") or {}

    @property
    def status(self) -> Object:
        return self.object.get("status") or {}

    @property
    def annotations(self) -> dict[str, str]:
        return self.object["metadata"].get("annotations") or {}

    @property
    def generation(self) -> int:
        return int(self.object["metadata"].get("generation", 0))


@dataclass(frozen=True)
class Snapshot(Resource):
    """Everything about one SereDeployment.

    children       "Deployment", "Service", "ConfigMap", "PodDisruptionBudget", "HorizontalPodAutoscaler" -> object as
                   read (absent: none)
    shards         ConfigMaps with shards of similarity artefacts, and whatever has such a name, by name
    service_digest policy digest under which a real token last came through the Service, None if none did
    tuning_jobs    the SereTuningJobs that this SereDeployment owns
    profiles       SereProfiles that may be wanted, by name
    similarities   by the URI that a policy or a profile names
    tokens_refused why pods that were asked for a token gave none; empty: none refused
    watched_s      for how long this process has looked at this resource without a gap; what fell into a gap (the
                   operator was down, or starved) is no fault of the pods
    """

    children: dict[str, Object] = field(default_factory=dict)
    shards: dict[str, Object] = field(default_factory=dict)
    pods: tuple[PodView, ...] = ()
    service_digest: str | None = None
    tuning_jobs: tuple[Object, ...] = ()
    profiles: dict[str, Object] = field(default_factory=dict)
    similarities: dict[str, Similarity] = field(default_factory=dict)
    golden: tuple[GoldenResult, ...] = ()
    tokens_refused: str = ""
    watched_s: float = math.inf

    @property
    def live_pods(self) -> tuple[PodView, ...]:
        """Pods that are not on their way out."""
        return tuple(pod for pod in self.pods if not pod.terminating)


@dataclass(frozen=True)
class TuningSnapshot(Resource):
    """Everything about one SereTuningJob. `result` is the ConfigMap that the tuner writes, `similarity` what it refers to."""

    children: dict[tuple[str, str], Object] = field(default_factory=dict)  # by kind and name
    result: Object | None = None
    similarity: Similarity | None = None
    pods: tuple[Object, ...] = ()  # the Job's pods
    events: tuple[Object, ...] = ()  # about the Job, read while it has no pod

    def child(self, kind: str, name: str) -> Object | None:
        return self.children.get((kind, name))


@dataclass(frozen=True)
class Event:
    """A Kubernetes Event to post on the resource. `type` is Normal or Warning."""

    type: str
    reason: str
    message: str


@dataclass(frozen=True)
class PodPatch:
    """Annotations to set (None: remove) on the pod with this name and uid; never its spec."""

    name: str
    uid: str
    annotations: dict[str, str | None]


@dataclass
class Plan:
    """What to write, in this order: replace, hand_over, apply, pods, delete, status, events. Empty when all is as wanted.

    replace        whole objects (live ones with foreign parts taken out), guarded by their resourceVersion
    hand_over      server-side applied under `meta.REPLICAS_MANAGER`
    apply          server-side applied
    pods           annotation changes
    delete         objects of ours that are not wanted any more
    status         merge patch of the status subresource, None: nothing to write
    requeue_after  seconds until the world should be looked at again without an event
    """

    replace: list[Object] = field(default_factory=list)
    hand_over: list[Object] = field(default_factory=list)
    apply: list[Object] = field(default_factory=list)
    pods: list[PodPatch] = field(default_factory=list)
    delete: list[Object] = field(default_factory=list)
    status: Object | None = None
    events: list[Event] = field(default_factory=list)
    requeue_after: float | None = None

    @property
    def writes(self) -> int:
        objects = len(self.replace) + len(self.hand_over) + len(self.apply) + len(self.delete)
        return objects + len(self.pods) + (self.status is not None)
