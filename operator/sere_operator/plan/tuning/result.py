"""What a tuning run answered, checked before anything is made of it. Pure.

The profile and its artefact belong to the SereDeployment, not to the run, so deleting a run never touches what serves.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from sere_ext.contract.config_maps import config_maps, uri
from sere_ext.contract.errors import SereError, SpecError
from sere_ext.contract.profile import Profile, SimilarityRef

from sere_operator.api import meta
from sere_operator.api.conditions import Reason
from sere_operator.api.profile import profile_name
from sere_operator.api.tuning import MAX_CANDIDATES, SereTuningJobSpec
from sere_operator.plan.snapshot import Object, TuningSnapshot
from sere_operator.plan.tuning.objects import labels, run_name

ENDED = "ended"
_ON_ITS_WAY = ("ContainerCreating", "PodInitializing")  # what a container waits for that nothing is wrong with


@dataclass(frozen=True)
class Result:
    """How the run stands. `outcome` None: not over. Objects are made only of a checked, chosen result.

    trials  counters as far as they are told, may be empty
    stage   what the run is doing, in the tuner's words while it works
    told    device-hours and candidates for the status, of a run that ended
    """

    outcome: str | None
    reason: Reason
    message: str
    trials: Object
    stage: str = ENDED
    told: Object = field(default_factory=dict)
    objects: tuple[Object, ...] = ()
    profile: str | None = None


def read_result(snapshot: TuningSnapshot, spec: SereTuningJobSpec) -> Result:
    """The checklist, in order.

    1. outcome.json says Chosen     its profile and artefact are checked; a bad one is Failed, never used
    2. outcome.json says otherwise  that, with the tuner's own message
    3. the Job failed               Failed, with the container's last words
    4. the pod cannot be scheduled, or its image not be had: TuningBlocked
    5. otherwise                    suspended, pending or running
    """
    data = (snapshot.result or {}).get("data") or {}
    progress = _json(data.get("progress.json"))
    outcome = _json(data.get("outcome.json"))
    trials = _counts(outcome.get("trials") or progress.get("trials"))
    told = _told(outcome)
    said = str(outcome.get("outcome") or "")
    message = str(outcome.get("message") or "")[:1000]
    if said == "Chosen":
        try:
            objects, name = chosen_objects(snapshot, spec)
        except SereError as error:
            return Result("Failed", Reason.FAILED, f"the tuner's result was refused: {error}", trials, told=told)
        return Result("Chosen", Reason.CHOSEN, message or "a policy was chosen", trials, ENDED, told, tuple(objects), name)
    if said:
        reason = next((r for r in Reason if r.value == said), Reason.FAILED)
        return Result(reason.value, reason, message or said, trials, told=told)
    job = snapshot.child("Job", run_name(snapshot.name)) or {}
    conditions = {c["type"]: c for c in (job.get("status") or {}).get("conditions") or [] if c.get("status") == "True"}
    if "Failed" in conditions or "Complete" in conditions:
        words = _last_words(snapshot) or str(conditions.get("Failed", {}).get("message") or "the tuner ended without a result")
        lost = "" if spec.tuning.storage else "; with tuning.storage a run outlives its pod"
        return Result("Failed", Reason.FAILED, words[: 1000 - len(lost)] + lost, trials)
    if spec.suspend:
        return Result(None, Reason.SUSPENDED, "spec.suspend is true", trials, "suspended")
    blocked = _blocked(snapshot)
    if blocked is not None:
        stage, message = blocked
        return Result(None, Reason.TUNING_BLOCKED, f"{message}; serving goes on", trials, stage)
    if progress:
        return Result(
            None, Reason.RUNNING, str(progress.get("now") or "running"), trials, str(progress.get("stage") or "running")
        )
    running = any((pod.get("status") or {}).get("phase") == "Running" for pod in snapshot.pods)
    if running:
        return Result(None, Reason.RUNNING, "the tuner is starting its engine", trials, "starting")
    return Result(None, Reason.PENDING, "the tuning pod has not begun", trials, "waiting for its pod")


def chosen_objects(snapshot: TuningSnapshot, spec: SereTuningJobSpec) -> tuple[list[Object], str]:
    """The SereProfile, and the ConfigMaps with its artefact, of a chosen result.

    Raises:
        SereError: the profile cannot be read, its policy is exact, or the artefact is missing or not the one it names.
    """
    result = snapshot.result or {}
    profile = Profile.parse((result.get("data") or {}).get("profile.json") or "{}").spec
    owner_name = spec.deployment or snapshot.name
    metadata: Object = {"namespace": snapshot.namespace, "labels": labels(snapshot, spec)}
    # Not owned by the run: deleting the run must not take what serves.
    references = [r for r in snapshot.object["metadata"].get("ownerReferences") or [] if r.get("controller")]
    if references:
        metadata["ownerReferences"] = [{key: value for key, value in references[0].items() if key != "controller"}]
    objects: list[Object] = []
    if profile.policy.needs_similarity():
        found = snapshot.similarity
        if found is None or profile.similarity is None:
            raise SpecError("the chosen policy re-routes by similarity, but the result refers to no artefact")
        if found.digest is None:
            raise SpecError(str(found.problem))
        digest = found.digest
        if digest != profile.similarity.digest or digest != profile.policy.similarity_digest:
            raise SpecError(f"the artefact is {digest}, the profile was made with {profile.similarity.digest}")
        name = meta.child_name(owner_name, f"similarity-{digest.removeprefix('sha256:')[:12]}")
        objects = config_maps(found.shards, name)
        for body in objects:
            named: Object = body["metadata"]
            body["metadata"] = {**metadata, **named, "labels": {**metadata["labels"], **named["labels"]}}
            body["immutable"] = True
        profile = profile.model_copy(update={"similarity": SimilarityRef(uri=uri(objects), digest=digest)})
    name = profile_name(owner_name, profile)
    objects.append({
        "apiVersion": meta.API_VERSION, "kind": meta.PROFILE_KIND, "metadata": {"name": name, **metadata},
        "spec": profile.to_json_dict(),
    })  # fmt: skip
    return objects, name


def similarity_uri(result: Object | None) -> str | None:
    """What `observe` must read: the artefact that a chosen result's profile refers to."""
    spec = _json(((result or {}).get("data") or {}).get("profile.json")).get("spec")
    reference = spec.get("similarity") if isinstance(spec, dict) else None
    named = reference.get("uri") if isinstance(reference, dict) else None
    return named if isinstance(named, str) else None


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


def _told(outcome: Object) -> Object:
    """deviceHours and candidates of outcome.json, as far as they have the form of the status."""
    found: Object = {}
    if isinstance(outcome.get("deviceHours"), str):
        found["deviceHours"] = outcome["deviceHours"][:20]
    given = outcome.get("candidates")
    tried = [rung for rung in given if isinstance(rung, dict)] if isinstance(given, list) else []
    if tried:
        found["candidates"] = [
            {"policy": str(rung.get("policy"))[:1000], "verdict": str(rung.get("verdict"))[:200]}
            for rung in tried[:MAX_CANDIDATES]
        ]
    return found


def _last_words(snapshot: TuningSnapshot) -> str | None:
    """The newest pod's exit: the container's last log lines and exit code."""
    for pod in sorted(snapshot.pods, key=lambda p: str(p["metadata"].get("creationTimestamp", "")), reverse=True):
        for container in (pod.get("status") or {}).get("containerStatuses") or []:
            ended = (container.get("state") or {}).get("terminated")
            if ended:
                text = " ".join(str(ended.get("message") or ended.get("reason") or "").split())[-700:]
                return f"the tuner ended with exit code {ended.get('exitCode')}: {text}"
    return None


def _blocked(snapshot: TuningSnapshot) -> tuple[str, str] | None:
    """Why a pod that has not begun does not: (stage, message in the scheduler's or the kubelet's words)."""
    for pod in snapshot.pods:
        status = pod.get("status") or {}
        if status.get("phase", "Pending") != "Pending" or pod["metadata"].get("deletionTimestamp"):
            continue
        for condition in status.get("conditions") or []:
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                text = str(condition.get("message", "no node fits"))
                cause = "InsufficientGPU: " if "gpu" in text.lower() else ""
                return "waiting for a node", f"{cause}the tuning pod cannot be scheduled: {text[:800]}"
        for container in (*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])):
            waiting = (container.get("state") or {}).get("waiting") or {}
            reason = str(waiting.get("reason") or "")
            if reason and reason not in _ON_ITS_WAY:
                text = " ".join(str(waiting.get("message") or container.get("image") or "").split())
                return f"waiting: {reason}", f"{reason}: the tuning pod cannot start: {text[:800]}"
    return None
