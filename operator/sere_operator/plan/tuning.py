"""A SereTuningJob: the Kubernetes Job that runs the tuner, and what becomes of its result. Pure.

The tuner writes one ConfigMap that is named and made beforehand; its rights end there. What it says is checked before a
SereProfile is made of it. The profile and its artefact belong to the SereDeployment, not to the run, so deleting a run
never touches what serves.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from sere_ext.errors import SereError
from sere_ext.profile import Profile, SimilarityRef

from sere_operator.api import meta
from sere_operator.api.common import SpecError, parse_spec
from sere_operator.api.conditions import ConditionType, Reason
from sere_operator.api.profile import profile_name
from sere_operator.api.tuning import SereTuningJobSpec
from sere_operator.plan import children, drift, pods, status
from sere_operator.plan.artefact import verified_digest
from sere_operator.plan.children import Defaults
from sere_operator.plan.rollout import stamp
from sere_operator.plan.snapshot import Event, Object, Plan, TuningSnapshot

TUNING_DIR = "/etc/sere-tuning"
RUN_DIR = "/var/lib/sere"
SIMILARITY_KEY = "similarity.safetensors"
# Exit codes of `sere tune` that are answers (ARCHITECTURE.md); running again would say the same.
FINAL_EXIT_CODES = [2, 3, 4, 5]
_FEASIBLE = {"Chosen": True, "Infeasible": False}
POLL_S = 60.0


def input_name(name: str) -> str:
    return meta.child_name(name, "input")


def result_name(name: str) -> str:
    return meta.child_name(name, "result")


# ---- what the tuner is given ---------------------------------------------------------------------------------------


def tuning_file(spec: SereTuningJobSpec, storage: pods.Storage) -> Object:
    """tuning.yaml as `sere tune` reads it, with every URI turned into the path at which it is mounted."""
    tuning, accuracy = spec.tuning, spec.accuracy
    engine: Object = {"tensorParallelSize": spec.engine.tensor_parallel_size, "extraArgs": list(spec.engine.extra_args)}
    if spec.engine.max_model_len is not None:
        engine["maxModelLen"] = spec.engine.max_model_len
    whole: Object = {"model": pods.model_path(spec.model, storage), "engine": engine}
    if spec.model.name is not None and spec.model.revision:
        whole["revision"] = spec.model.revision
    if tuning.similarity.calibrate is not None:
        whole["calibrate"] = {"data": storage.source(tuning.similarity.calibrate)}
    elif tuning.similarity.uri is not None:
        whole["similarity"] = storage.uri(tuning.similarity.uri)
    workload = tuning.workload.to_json_dict()
    if tuning.workload.dataset is not None:
        workload["dataset"] = storage.source(tuning.workload.dataset)
    whole["workload"] = workload
    whole["slo"] = spec.slo.to_json_dict()
    tasks = []
    for task in accuracy.tasks:
        fields = {key: value for key, value in task.to_json_dict().items() if key not in ("uri", "configMap")}
        tasks.append({"file": storage.source(task), **fields})
    whole["accuracy"] = {**accuracy.to_json_dict(), "tasks": tasks}
    search: Object = {**(tuning.search or {}), "trials": tuning.trials, "deviceHours": tuning.device_hours}
    if tuning.rungs is not None:
        search["rungs"] = tuning.rungs
    if tuning.policies:
        search["policies"] = [kind.value for kind in tuning.policies]
    whole["search"] = search
    if tuning.certify:
        whole["certify"] = tuning.certify
    whole["out"] = f"{RUN_DIR}/run"
    return whole


def _labels(snapshot: TuningSnapshot, spec: SereTuningJobSpec) -> dict[str, str]:
    found = children.labels(snapshot.name, meta.TUNER_COMPONENT)
    found[meta.DEPLOYMENT_LABEL] = meta.label_value(spec.deployment or snapshot.name)
    return found


def build(snapshot: TuningSnapshot, spec: SereTuningJobSpec, defaults: Defaults) -> list[Object]:
    """The children in the order in which they are needed: rights, input, the result's place, the Job."""
    owner, name, namespace = snapshot.object, snapshot.name, snapshot.namespace
    metadata = {"namespace": namespace, "labels": _labels(snapshot, spec), "ownerReferences": [children.owner_reference(owner)]}
    storage = pods.Storage()
    text = json.dumps(tuning_file(spec, storage), indent=2)  # JSON is YAML
    rules = [{"apiGroups": [""], "resources": ["configmaps"], "resourceNames": [result_name(name)], "verbs": ["create", "patch"]}]
    rbac = "rbac.authorization.k8s.io"
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, **metadata}},
        {"apiVersion": f"{rbac}/v1", "kind": "Role", "metadata": {"name": name, **metadata}, "rules": rules},
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "RoleBinding",
            "metadata": {"name": name, **metadata},
            "roleRef": {"apiGroup": rbac, "kind": "Role", "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": namespace}],
        },
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": input_name(name), **metadata},
            "data": {"tuning.yaml": text},
        },
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": result_name(name), **metadata}},
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": name, **metadata},
            "spec": job_spec(snapshot, spec, defaults, storage),
        },
    ]


def job_spec(snapshot: TuningSnapshot, spec: SereTuningJobSpec, defaults: Defaults, storage: pods.Storage) -> Object:
    """One pod of the tuner's own container; an answer ends the Job, a crash is tried again twice."""
    storage.extra((*spec.volumes, *spec.tuning.volumes))
    storage.scratch()
    storage.empty("run", RUN_DIR)
    storage.volumes.append({"name": "tuning", "configMap": {"name": input_name(snapshot.name)}})
    storage.mounts.append({"name": "tuning", "mountPath": TUNING_DIR, "readOnly": True})
    target = f"configmap/{snapshot.namespace}/{result_name(snapshot.name)}"
    container: Object = {
        "name": "tuner",
        "image": spec.engine.image or defaults.engine_image,
        "imagePullPolicy": defaults.image_pull_policy,
        "command": ["sere"],
        "args": ["tune", "-f", f"{TUNING_DIR}/tuning.yaml", "--publish", target],
        "env": pods.environment(spec.model, spec.engine.env, {}),
        "securityContext": pods.CONTAINER_SECURITY,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": storage.mounts,
    }
    wanted = spec.tuning.resources or spec.resources
    if wanted is not None:
        container["resources"] = pods.resources(wanted)
    rules = [
        {"action": "FailJob", "onExitCodes": {"containerName": "tuner", "operator": "In", "values": FINAL_EXIT_CODES}},
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    return {
        "backoffLimit": 2,
        "suspend": spec.suspend,
        "podFailurePolicy": {"rules": rules},
        "template": {
            "metadata": {"labels": _labels(snapshot, spec)},
            "spec": {
                "restartPolicy": "Never",
                "serviceAccountName": snapshot.name,
                "enableServiceLinks": False,
                "securityContext": pods.POD_SECURITY,
                "terminationGracePeriodSeconds": 60,
                **pods.scheduling(spec.node_selector, spec.tolerations, spec.runtime_class_name),
                "containers": [container],
                "volumes": storage.volumes,
            },
        },
    }


# ---- what the tuner answered ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """How the run stands. `outcome` None: not over. Objects are made only of a checked, chosen result."""

    outcome: str | None
    reason: Reason
    message: str
    trials: Object
    stage: str | None = None
    objects: tuple[Object, ...] = ()
    profile: str | None = None


def read_result(snapshot: TuningSnapshot, spec: SereTuningJobSpec) -> Result:
    """The checklist, in order.

    1. outcome.json says Chosen     its profile and artefact are checked; a bad one is Failed, never used
    2. outcome.json says otherwise  that, with the tuner's own message
    3. the Job failed               Failed, with the container's last words
    4. the pod cannot be scheduled  TuningBlocked
    5. otherwise                    suspended, pending or running
    """
    data = (snapshot.result or {}).get("data") or {}
    progress = _json(data.get("progress.json"))
    outcome = _json(data.get("outcome.json"))
    trials = _counts(outcome.get("trials") or progress.get("trials"))
    said = str(outcome.get("outcome") or "")
    message = str(outcome.get("message") or "")[:1000]
    if said == "Chosen":
        try:
            objects, name = chosen_objects(snapshot, spec)
        except SereError as error:
            return Result("Failed", Reason.FAILED, f"the tuner's result was refused: {error}", trials)
        return Result("Chosen", Reason.CHOSEN, message or "a policy was chosen", trials, None, tuple(objects), name)
    if said:
        reason = next((r for r in Reason if r.value == said), Reason.FAILED)
        return Result(reason.value, reason, message or said, trials)
    job = snapshot.child("Job", snapshot.name) or {}
    conditions = {c["type"]: c for c in (job.get("status") or {}).get("conditions") or [] if c.get("status") == "True"}
    if "Failed" in conditions or "Complete" in conditions:
        words = _last_words(snapshot) or str(conditions.get("Failed", {}).get("message") or "the tuner ended without a result")
        return Result("Failed", Reason.FAILED, words[:1000], trials)
    if spec.suspend:
        return Result(None, Reason.SUSPENDED, "spec.suspend is true", trials, progress.get("stage"))
    blocked = _unschedulable(snapshot)
    if blocked is not None:
        return Result(None, Reason.TUNING_BLOCKED, blocked, trials)
    if progress:
        return Result(None, Reason.RUNNING, str(progress.get("now") or "running"), trials, str(progress.get("stage") or ""))
    running = any((pod.get("status") or {}).get("phase") == "Running" for pod in snapshot.pods)
    if running:
        return Result(None, Reason.RUNNING, "the tuner is starting its engine", trials, "starting")
    return Result(None, Reason.PENDING, "the tuning pod has not begun", trials)


def chosen_objects(snapshot: TuningSnapshot, spec: SereTuningJobSpec) -> tuple[list[Object], str]:
    """The SereProfile, and the ConfigMap with its artefact, of a chosen result.

    Raises:
        SereError: the profile cannot be read, its policy is exact, or the artefact is missing or not the one it names.
    """
    result = snapshot.result or {}
    profile = Profile.parse((result.get("data") or {}).get("profile.json") or "{}").spec
    owner_name = spec.deployment or snapshot.name
    metadata: Object = {"namespace": snapshot.namespace, "labels": _labels(snapshot, spec)}
    # Not owned by the run: deleting the run must not take what serves.
    references = [r for r in snapshot.object["metadata"].get("ownerReferences") or [] if r.get("controller")]
    if references:
        metadata["ownerReferences"] = [{key: value for key, value in references[0].items() if key != "controller"}]
    objects: list[Object] = []
    if profile.policy.needs_similarity():
        encoded = (result.get("binaryData") or {}).get(SIMILARITY_KEY)
        if not encoded or profile.similarity is None:
            raise SpecError("the chosen policy re-routes by similarity, but the result holds no artefact")
        digest = verified_digest(encoded)
        if digest != profile.similarity.digest or digest != profile.policy.similarity_digest:
            raise SpecError(f"the artefact is {digest}, the profile was made with {profile.similarity.digest}")
        name = meta.child_name(owner_name, f"similarity-{digest.removeprefix('sha256:')[:12]}")
        uri = f"configmap://{name}/{SIMILARITY_KEY}"
        profile = profile.model_copy(update={"similarity": SimilarityRef(uri=uri, digest=digest)})
        objects.append({
            "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, **metadata}, "immutable": True,
            "binaryData": {SIMILARITY_KEY: encoded},
        })  # fmt: skip
    name = profile_name(owner_name, profile)
    objects.append({
        "apiVersion": meta.API_VERSION, "kind": meta.PROFILE_KIND, "metadata": {"name": name, **metadata},
        "spec": profile.to_json_dict(),
    })  # fmt: skip
    return objects, name


def _json(text: Any) -> Object:
    try:
        decoded = json.loads(text) if text else {}
    except ValueError:
        return {}
    return decoded if isinstance(decoded, dict) else {}


def _counts(given: Any) -> Object:
    """Trial counters from outcome.json (an object) or progress.json (a number)."""
    if isinstance(given, dict):
        known = ("scheduled", "completed", "feasible", "infeasible", "failed")
        return {key: int(given[key]) for key in known if isinstance(given.get(key), int)}
    return {"completed": given} if isinstance(given, int) else {}


def _last_words(snapshot: TuningSnapshot) -> str | None:
    """The newest pod's exit: the container's last log lines and exit code."""
    for pod in sorted(snapshot.pods, key=lambda p: str(p["metadata"].get("creationTimestamp", "")), reverse=True):
        for container in (pod.get("status") or {}).get("containerStatuses") or []:
            ended = (container.get("state") or {}).get("terminated")
            if ended:
                text = " ".join(str(ended.get("message") or ended.get("reason") or "").split())[-700:]
                return f"the tuner ended with exit code {ended.get('exitCode')}: {text}"
    return None


def _unschedulable(snapshot: TuningSnapshot) -> str | None:
    for pod in snapshot.pods:
        for condition in (pod.get("status") or {}).get("conditions") or []:
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                text = str(condition.get("message", "no node fits"))
                cause = "InsufficientGPU: " if "gpu" in text.lower() else ""
                return f"{cause}the tuning pod cannot be scheduled: {text}; serving goes on"
    return None


# ---- decide --------------------------------------------------------------------------------------------------------


def decide_tuning(snapshot: TuningSnapshot, defaults: Defaults) -> Plan:
    """What to write now for one SereTuningJob. Once it has ended, nothing but a lost profile is made again."""
    if snapshot.object["metadata"].get("deletionTimestamp"):
        return Plan()
    try:
        spec = parse_spec(SereTuningJobSpec, snapshot.spec)
    except SpecError as error:
        conditions = list(snapshot.status.get("conditions") or [])
        judgement = (False, Reason.INVALID_SPEC, str(error))
        conditions = status.with_condition(snapshot, conditions, ConditionType.COMPLETE, judgement)
        new = {**snapshot.status, "observedGeneration": snapshot.generation, "conditions": conditions}
        return Plan(status=status.merge_patch(new, snapshot.status), requeue_after=POLL_S)
    plan = Plan(requeue_after=POLL_S)
    if snapshot.status.get("outcome"):
        return plan
    for body in build(snapshot, spec, defaults):
        _keep(plan, drift.stamped(body), snapshot.child(body["kind"], body["metadata"]["name"]))
    result = read_result(snapshot, spec)
    for body in result.objects:
        if snapshot.child(body["kind"], body["metadata"]["name"]) is None:
            plan.apply.append(body)
    _report(snapshot, spec, result, plan)
    return plan


def _keep(plan: Plan, body: Object, live: Object | None) -> None:
    """Apply what is missing or changed. A Job's template is immutable, so of a live Job only `suspend` is set."""
    if live is None or body["kind"] != "Job":
        if drift.drift(body, live) is not None:
            plan.apply.append(body)
        return
    finished = any(
        c.get("status") == "True" for c in (live.get("status") or {}).get("conditions") or [] if c["type"] != "Suspended"
    )
    if not finished and bool(live["spec"].get("suspend")) != bool(body["spec"]["suspend"]):
        plan.replace.append({**live, "spec": {**live["spec"], "suspend": body["spec"]["suspend"]}})


def _report(snapshot: TuningSnapshot, spec: SereTuningJobSpec, result: Result, plan: Plan) -> None:
    conditions = list(snapshot.status.get("conditions") or [])
    done = result.outcome is not None
    feasible = _FEASIBLE.get(result.outcome or "")
    for kind, judgement in (
        (ConditionType.COMPLETE, (done, result.reason, result.message)),
        (ConditionType.FEASIBLE, (feasible, result.reason, result.message)),
    ):
        conditions = status.with_condition(snapshot, conditions, kind, judgement)
    job_status = (snapshot.child("Job", snapshot.name) or {}).get("status") or {}
    new = status.without_none({
        "observedGeneration": snapshot.generation,
        "conditions": conditions,
        "trials": result.trials or None,
        "progress": f"{result.trials.get('completed', 0)}/{spec.tuning.trials}",
        "stage": result.stage or None,
        "outcome": result.outcome,
        "startTime": job_status.get("startTime") or snapshot.status.get("startTime"),
        "completionTime": stamp(snapshot.now) if done else None,
        "resultConfigMap": result_name(snapshot.name),
        "profile": result.profile,
    })  # fmt: skip
    plan.status = status.merge_patch(new, snapshot.status)
    if done:
        plan.events.append(Event("Normal" if result.outcome == "Chosen" else "Warning", result.reason.value, result.message))
        if result.profile is not None:
            plan.events.append(Event("Normal", "ProfileMade", f"SereProfile {result.profile}"))
