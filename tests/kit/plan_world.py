"""A cluster in memory for tests of `decide`: applies a plan's writes one by one, so that a crash can fall between any two.

No claim about Kubernetes is tested here (tests/apiserver does that); only what the operator decides, over time.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from sere_ext.contract.errors import PolicyError
from sere_ext.contract.policy import Policy
from sere_ext.contract.profile import ProfileKey
from sere_ext.contract.state import EngineState
from sere_ext.contract.volume import POD_OVERRIDE, POD_POLICY, STABLE, Desired, desired, named_policy, named_slo
from sere_operator.api import meta
from sere_operator.api.common import parse_spec
from sere_operator.api.deployment import SereDeploymentSpec
from sere_operator.plan.decide import decide
from sere_operator.plan.histogram import Histogram
from sere_operator.plan.needs import needs, taken
from sere_operator.plan.objects.children import Defaults
from sere_operator.plan.objects.volume import recovered_shards
from sere_operator.plan.reads import Artefact, Child, Golden, Listed, Metrics, Read, ServiceToken, State, Token
from sere_operator.plan.snapshot import GoldenResult, Plan, PodMetrics, Similarity, Snapshot
from tests.kit.states import engine_state

KEY = {
    "modelName": "m", "modelRevision": "", "configDigest": "sha256:" + "0" * 64, "engineVersion": "0.32.0",
    "pluginVersion": "0.1.0", "device": "cpu", "tensorParallelSize": 1,
}  # fmt: skip
LAG_S = 0.5  # from a written annotation or ConfigMap to its application in the pod
GOLDEN = 16


class CrashError(Exception):
    """The operator died between two writes."""


@dataclass
class Pod:
    name: str
    uid: str
    annotations: dict[str, str] = field(default_factory=dict)
    digest: str = "exact"
    due: tuple[str, float] | None = None
    restarts: int = 0
    counts: dict[str, list[float]] = field(default_factory=dict)  # digest -> [requests, seconds, over `limit_ms`]
    limit_ms: float | None = None  # at which its histograms have a bound
    ran: list[str] = field(default_factory=list)
    ready: bool = True
    labels: dict[str, str] = field(default_factory=dict)
    created: str = "2026-01-01T00:00:00Z"
    device: str = "cpu"
    status: dict[str, Any] = field(default_factory=dict)  # further fields of the pod's status
    template: dict[str, Any] | None = None  # that it was made of; None: before there was a Deployment

    @property
    def engine(self) -> dict[str, Any]:
        return (self.template or {"spec": {"containers": [{}]}})["spec"]["containers"][0]

    @property
    def revision(self) -> str:
        """Of the model, as its arguments say."""
        args = self.engine.get("args") or []
        return str(args[args.index("--revision") + 1]) if "--revision" in args else ""

    @property
    def key(self) -> dict[str, Any]:
        return {**KEY, "modelRevision": self.revision, "device": self.device}


def profile_body(
    policy: dict[str, Any],
    *,
    certified: bool = True,
    speed: str | None = "faster",
    golden: int = GOLDEN,
    revision: str = "",
    **prompt: Any,
) -> dict[str, Any]:
    accuracy = {
        "exact": 0.8, "chosen": 0.8, "items": 1000, "maxDropPoints": 1.0, "confidence": 0.95, "dropPoints": 0.1,
        "discordantShare": 0.01, "noiseFloor": 0.01,
    }  # fmt: skip
    return {
        "apiVersion": meta.API_VERSION, "kind": "SereProfile", "metadata": {"name": "p", "namespace": "ns"},
        "spec": {
            "policy": policy, "key": {**KEY, "modelRevision": revision},
            "evidence": {
                "certified": certified, "tpotMs": {"exact": 20, "chosen": 15, "limit": 20},
                "speedup": {"value": 1.3, "condition": "equal concurrency 16"}, "speedVerdict": speed, "accuracy": accuracy,
            },
            "goldenPrompts": [{"prompt": f"q{i}", "answer": "a", **prompt} for i in range(golden)],
        },
    }  # fmt: skip


POLICY = {"buckets": [{"minTokens": 8, "maxTokens": 64, "kind": "topk", "S": 2}]}
DIGEST = Policy.parse(POLICY).digest


class World:
    """Time runs only by `tick`. `harmful` digests answer wrong; `tpot_ms` is by digest, 15 for others."""

    def __init__(self, replicas: int = 2, **spec: Any) -> None:
        self.now = 1_800_000_000.0
        self.defaults = Defaults()
        self.object: dict[str, Any] = {
            "apiVersion": meta.API_VERSION, "kind": "SereDeployment",
            "metadata": {"name": "m", "namespace": "ns", "uid": "u", "generation": 1, "annotations": {}},
            "spec": {
                "model": {"name": "m"}, "replicas": replicas, "slo": {"tpotMs": {"p95": 20}},
                "rollout": {"canary": {"minRequests": 100, "deadline": "60s"}}, **spec,
            },
        }  # fmt: skip
        self.children: dict[str, Any] = {}
        self.shards: dict[str, Any] = {}
        self.pods = [Pod(f"m-{i}", f"uid-{i}") for i in range(replicas)]
        self._made = 100
        self.profiles: dict[str, Any] = {}
        self.jobs: list[dict[str, Any]] = []
        self.similarities: dict[str, Any] = {}
        self.harmful: set[str] = set()
        self.says = "a"  # what is generated for a golden prompt under any other policy
        self.tpot_ms: dict[str, float] = {}
        self.rate = 50.0  # finished requests per second and pod
        self.events: list[str] = []
        self.deleted: list[str] = []
        self.golden_runs: list[tuple[str, str]] = []
        self.watching_since = self.now  # by the operator's process, without a gap
        self.errors: dict[str, str] = {}  # by pod: what keeps it from applying a policy
        self.unproven: set[str] = set()  # pods that give no token
        self.sick: set[str] = set()  # pods whose histograms cannot be read
        self.silent: set[str] = set()  # pods that pass the kubelet's probe and do not answer the operator
        self.deployment_conditions: list[dict[str, Any]] = []
        self.bounds_follow = True  # histograms get a bound at the limit that the volume names, and begin anew
        self.controller_runs = True  # the Deployment's status is of its newest generation
        self.routable = True  # a token comes through the Service

    # ---- what the operator reads ----

    @property
    def spec(self) -> SereDeploymentSpec:
        return parse_spec(SereDeploymentSpec, self.object["spec"])

    @property
    def status(self) -> dict[str, Any]:
        return self.object.get("status") or {}

    @property
    def stable(self) -> str | None:
        return (self.children.get("ConfigMap") or {}).get("data", {}).get(STABLE)

    def condition(self, kind: str) -> dict[str, Any]:
        return next(c for c in self.status["conditions"] if c["type"] == kind)

    def body(self, pod: Pod) -> dict[str, Any]:
        """The pod as the API server has it."""
        return {
            "metadata": {"name": pod.name, "uid": pod.uid, "annotations": dict(pod.annotations), "labels": dict(pod.labels), "creationTimestamp": pod.created},
            "spec": (pod.template or {}).get("spec") or {"containers": []},
            "status": {
                "phase": "Running", "podIP": "10.0.0.1", "conditions": [{"type": "Ready", "status": str(pod.ready)}],
                "containerStatuses": [{"restartCount": pod.restarts}], **pod.status,
            },
        }  # fmt: skip

    def state(self, pod: Pod) -> EngineState | None:
        """What the pod answers to GET /sere."""
        if not pod.ready or pod.name in self.silent:
            return None
        return engine_state(pod.digest, pod.key, error=self.errors.get(pod.name) or self._refusal(pod))

    def metrics(self, pod: Pod) -> PodMetrics:
        series = {  # as if every latency of one policy were the same
            (d, "8-64"): Histogram(
                int(n), s, {f"{pod.limit_ms:g}": int(over)} if pod.limit_ms else {}, (s, s * s / n if n else 0.0)
            )
            for d, (n, s, over) in pod.counts.items()
        }
        return PodMetrics(series, series)

    def observe(self) -> Snapshot:
        """A whole snapshot, read as `needs` asks for it."""
        self._deployment_status()
        snapshot = Snapshot(now=self.now, object=copy.deepcopy(self.object))
        while missing := needs(snapshot, self.defaults):
            snapshot = taken(snapshot, {read: copy.deepcopy(self.answer(read)) for read in missing})
        return replace(snapshot, watched_s=self.now - self.watching_since)

    def answer(self, read: Read) -> Any:
        """What this cluster answers to one read."""
        pods = {pod.uid: pod for pod in self.pods}
        match read:
            case Child("SereProfile", name):
                return self.profiles.get(name)
            case Child("ConfigMap", name) if name != "m-policy":
                return self.shards.get(name)
            case Child(kind):
                return self.children.get(kind)
            case Listed("Pod"):
                return [self.body(pod) for pod in self.pods]
            case Listed("ConfigMap"):
                return [body for body in self.shards.values() if body["metadata"].get("labels")]
            case Listed():
                return self.jobs
            case Artefact(uri):
                return self.similarities.get(uri, Similarity(problem="is not there"))
            case State(uid):
                return self.state(pods[uid])
            case Token(uid):
                return pods[uid].digest if pods[uid].ready and pods[uid].name not in self.unproven else None
            case Metrics(uid):
                return self.metrics(pods[uid]) if pods[uid].name not in self.sick else None
            case ServiceToken():
                return self.pods[0].digest if self.pods and self.routable else None
            case Golden(uid, digest=digest, prompts=prompts):
                self.golden_runs.append((pods[uid].name, digest))
                return GoldenResult(
                    uid, digest, tuple(prompt.right("wrong" if digest in self.harmful else self.says) for prompt in prompts)
                )

    # ---- what the operator writes ----

    def step(self, crash_after: int | None = None) -> Plan:
        """One look. Raises CrashError once `crash_after` writes were done, if there are more."""
        plan = decide(self.observe(), self.defaults)
        writes: list[tuple[Callable[[Any], None], Any]] = [
            *((self._apply, body) for body in plan.replace),
            *((self._apply, body) for body in plan.apply),
            *((self._annotate, patch) for patch in plan.pods),
            *((self._delete, body) for body in plan.delete),
            *([(self._status, plan.status)] if plan.status is not None else []),
        ]
        for done, (write, argument) in enumerate(writes):
            if done == crash_after:
                self.watching_since = self.now
                raise CrashError
            write(argument)
        self.events += [event.reason for event in plan.events]
        return plan

    def _apply(self, body: dict[str, Any]) -> None:
        live = json.loads(json.dumps(body))
        if body["kind"] == "SereTuningJob":
            self.jobs.append(live)
            return
        live["metadata"]["uid"] = f"uid-{body['kind']}"
        if body["kind"] == "Service":
            live["spec"]["clusterIP"] = "10.1.0.1"
        if body["metadata"]["name"] in meta.policy_shards("m"):
            self.shards[body["metadata"]["name"]] = live
            return
        if body["kind"] == "Deployment":
            before = self.children.get("Deployment") or {"metadata": {"generation": 0}, "spec": None}
            changed = before["spec"] != live["spec"]
            live["metadata"]["generation"] = before["metadata"]["generation"] + changed
            if "status" in before:
                live["status"] = before["status"]
            count = body["spec"]["replicas"]
            for pod in self.pods:
                pod.template = pod.template or copy.deepcopy(live["spec"]["template"])
            self.pods = self.pods[:count] + [self._pod(live) for _ in range(len(self.pods), count)]
        self.children[body["kind"]] = live

    def _pod(self, deployment: dict[str, Any]) -> Pod:
        self._made += 1
        return Pod(f"m-{self._made}", f"uid-{self._made}", template=copy.deepcopy(deployment["spec"]["template"]))

    def _replace_one(self) -> None:
        """The Deployment controller's part: a new pod beside the old ones, then one of those goes."""
        live = self.children.get("Deployment")
        old = [pod for pod in self.pods if live is not None and pod.template != live["spec"]["template"]]
        if live is None or not old:
            return
        if len(self.pods) > live["spec"]["replicas"]:
            self.pods.remove(old[0])
        else:
            self.pods.append(self._pod(live))

    def _deployment_status(self) -> None:
        if (live := self.children.get("Deployment")) is not None and self.controller_runs:
            updated = sum(pod.template == live["spec"]["template"] for pod in self.pods)
            live["status"] = {
                "observedGeneration": live["metadata"]["generation"],
                "replicas": len(self.pods),
                "updatedReplicas": updated,
                "availableReplicas": sum(pod.ready for pod in self.pods),
                "conditions": self.deployment_conditions,
            }

    def _annotate(self, patch: Any) -> None:
        for pod in self.pods:
            if pod.uid == patch.uid:
                merged = {**pod.annotations, **patch.annotations}
                pod.annotations = {key: value for key, value in merged.items() if value is not None}

    def _delete(self, body: dict[str, Any]) -> None:
        if self.shards.pop(body["metadata"]["name"], None) is not None:
            return
        self.deleted.append(body["kind"])
        self.jobs = [job for job in self.jobs if job["metadata"]["name"] != body["metadata"]["name"]]

    def _status(self, patch: dict[str, Any]) -> None:
        self.object["status"] = _merge(self.status, patch)

    # ---- the world ----

    def edit(self, **spec: Any) -> None:
        self.object["spec"] = {**self.object["spec"], **spec}
        self.object["metadata"]["generation"] += 1

    def annotate(self, key: str, value: str | None) -> None:
        annotations = self.object["metadata"]["annotations"]
        annotations.pop(key, None)
        if value is not None:
            annotations[key] = value

    def restart(self, index: int) -> None:
        """A container restarts: its counters are gone, it comes back with what the volume says."""
        pod = self.pods[index % len(self.pods)]
        pod.restarts += 1
        pod.counts, pod.due = {}, None
        pod.digest = self._projected(pod) or pod.digest

    def _projected(self, pod: Pod) -> str | None:
        policy = self._desired(pod).policy
        return policy.digest if policy is not None else None

    def _desired(self, pod: Pod) -> Desired:
        """What the plug-in reads in this pod's policy volume."""
        files = dict((self.children.get("ConfigMap") or {}).get("data") or {})
        files |= {name: "" for shard in self.shards.values() for name in shard.get("binaryData") or {}}
        for name, annotation in ((POD_POLICY, meta.POLICY_ANNOTATION), (POD_OVERRIDE, meta.OVERRIDE_ANNOTATION)):
            files[name] = pod.annotations.get(annotation, "")
        return desired(files, ProfileKey.model_validate(pod.key))

    def _limit_ms(self) -> float | None:
        """The first limit on TPOT in the policy volume."""
        slo = named_slo((self.children.get("ConfigMap") or {}).get("data") or {})
        return next(iter(slo.tpot_ms.limits().values())) if slo is not None and slo.tpot_ms is not None else None

    def whole(self, digest: str) -> bool:
        """Whether the volume holds the policy, and its similarity artefact if it needs one."""
        try:
            policy = named_policy((self.children.get("ConfigMap") or {}).get("data") or {}, digest)
        except PolicyError:
            return False
        held = recovered_shards(self.shards.values(), policy.similarity_digest or "")
        return held is not None or not policy.needs_similarity()

    def _refusal(self, pod: Pod) -> str | None:
        """What the plug-in says of a policy that was made for another model."""
        want = self._desired(pod)
        return want.error if want.policy is not None else None

    def tick(self, seconds: float = 1.0) -> None:
        self.now += seconds
        if seconds > 60:
            self.watching_since = self.now
        self._replace_one()
        for pod in self.pods:
            wanted = self._projected(pod)
            if wanted is None or wanted == pod.digest or pod.name in self.errors:
                pod.due = None
            elif pod.due is None or pod.due[0] != wanted:
                pod.due = (wanted, self.now + LAG_S)
            if pod.due is not None and self.now >= pod.due[1]:
                pod.digest, pod.due = pod.due[0], None
                pod.ran.append(pod.digest)
            if self._limit_ms() != pod.limit_ms and self.bounds_follow:
                pod.limit_ms, pod.counts = self._limit_ms(), {}
            tpot = self.tpot_ms.get(pod.digest, 15.0)
            n, s, over = pod.counts.get(pod.digest, [0.0, 0.0, 0.0])
            more = int(self.rate * seconds)
            share = 0.9 if tpot > (pod.limit_ms or 20.0) else 0.01
            pod.counts[pod.digest] = [n + more, s + more * tpot / 1e3, over + int(more * share)]

    def settle(self, steps: int = 400) -> Plan:
        """Look and let time pass until nothing is written any more; waits out backoffs."""
        quiet = 0
        plan = Plan()
        for _ in range(steps):
            plan = self.step()
            quiet = quiet + 1 if plan.writes == 0 else 0
            waiting = (self.status.get("rollout") or {}).get("nextAttemptAt")
            if quiet >= 3 and not waiting and not self.status.get("rollout"):
                return plan
            self.tick(400.0 if waiting and quiet >= 3 else 1.0)
        return plan


def _merge(live: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    merged = dict(live)
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict):
            merged[key] = _merge(merged.get(key) if isinstance(merged.get(key), dict) else {}, value)  # type: ignore[arg-type]
        else:
            merged[key] = value
    return merged
