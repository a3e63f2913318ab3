"""What a tuning run answered, checked before anything is made of it. Pure.

The profile and its artefact belong to the SereDeployment, not to the run, so deleting a run never touches what serves.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sere_ext.contract.config_maps import config_maps, uri
from sere_ext.contract.errors import SereError, SpecError
from sere_ext.contract.profile import Profile, SimilarityRef
from sere_operator.api import meta
from sere_operator.api.conditions import Reason
from sere_operator.api.profile import profile_name
from sere_operator.api.tuning import MAX_CANDIDATES, SereTuningJobSpec
from sere_operator.plan.chain import first
from sere_operator.plan.objects.trouble import pods_refused, trouble
from sere_operator.plan.snapshot import Object, TuningSnapshot
from sere_operator.plan.times import seconds
from sere_operator.plan.tuning.objects import labels, run_name

ENDED = "ended"


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


@dataclass(frozen=True)
class Run:
    """A SereTuningJob as it was read, and what its tuner wrote."""

    snapshot: TuningSnapshot
    spec: SereTuningJobSpec

    @cached_property
    def progress(self) -> Object:
        return _json(((self.snapshot.result or {}).get("data") or {}).get("progress.json"))

    @cached_property
    def answer(self) -> Object:
        """outcome.json; empty while there is none."""
        return _json(((self.snapshot.result or {}).get("data") or {}).get("outcome.json"))

    @property
    def trials(self) -> Object:
        return _counts(self.answer.get("trials") or self.progress.get("trials"))

    @property
    def outcome(self) -> str:
        return str(self.answer.get("outcome") or "")

    @property
    def message(self) -> str:
        return str(self.answer.get("message") or "")[:1000]

    @property
    def job(self) -> Object | None:
        return self.snapshot.child("Job", run_name(self.snapshot.name))

    @property
    def spent(self) -> Object:
        """Device-hours of a run that did not tell them itself: at most the time since its pod began, on all its devices."""
        began = ((self.job or {}).get("status") or {}).get("startTime") or self.snapshot.status.get("startTime")
        hours = (self.snapshot.now - seconds(began)) / 3600 * self.spec.engine.tensor_parallel_size if began else 0.0
        return {"deviceHours": f"{hours:.2f}"} if began else {}

    def going_on(self, reason: Reason, message: str, stage: str) -> Result:
        return Result(None, reason, message, self.trials, stage)


def read_result(snapshot: TuningSnapshot, spec: SereTuningJobSpec) -> Result:
    """How the run stands: the answer of the first of `CHECKS` that has one."""
    result = first(CHECKS, Run(snapshot, spec))
    assert result is not None, "not_begun always answers"
    return result


def a_policy_was_chosen(run: Run) -> Result | None:
    """outcome.json says Chosen: its profile and artefact are checked; a bad one is Failed, never used."""
    if run.outcome != "Chosen":
        return None
    told = _told(run.answer)
    try:
        objects, name = chosen_objects(run.snapshot, run.spec)
    except SereError as error:
        return Result("Failed", Reason.FAILED, f"the tuner's result was refused: {error}", run.trials, told=told)
    words = run.message or "a policy was chosen"
    return Result("Chosen", Reason.CHOSEN, words, run.trials, ENDED, told, tuple(objects), name)


def another_answer(run: Run) -> Result | None:
    """outcome.json says something else: that, with the tuner's own message."""
    if not run.outcome:
        return None
    reason = next((r for r in Reason if r.value == run.outcome), Reason.FAILED)
    return Result(reason.value, reason, run.message or run.outcome, run.trials, told=_told(run.answer))


def job_was_deleted(run: Run) -> Result | None:
    """The Job had begun and is gone, and its study with it: another would spend the budget anew, so it is Failed."""
    if run.job is not None or not run.snapshot.status.get("startTime") or run.spec.tuning.storage is not None:
        return None
    words = "the tuning Job was deleted before it had ended, and its study with it; with tuning.storage a run outlives its Job"
    return Result("Failed", Reason.FAILED, words, run.trials, told=run.spent)


def job_has_ended(run: Run) -> Result | None:
    """The Job ended without an answer: Failed, with the container's last words."""
    conditions = {
        c["type"]: c for c in ((run.job or {}).get("status") or {}).get("conditions") or [] if c.get("status") == "True"
    }
    if "Failed" not in conditions and "Complete" not in conditions:
        return None
    told = str(conditions.get("Failed", {}).get("message") or "the tuner ended without a result")
    words = _last_words(run.snapshot) or told
    lost = "" if run.spec.tuning.storage else "; with tuning.storage a run outlives its pod"
    return Result("Failed", Reason.FAILED, words[: 1000 - len(lost)] + lost, run.trials, told=run.spent)


def is_suspended(run: Run) -> Result | None:
    """By its own spec, or by a queue that has not admitted the Job yet."""
    if run.spec.suspend:
        return run.going_on(Reason.SUSPENDED, "spec.suspend is true", "suspended")
    if run.job is None or not run.job["spec"].get("suspend") or suspended_by_us(run.job):
        return None
    words = f"Job {run_name(run.snapshot.name)} was suspended by somebody else, such as a queue that has no room yet"
    return run.going_on(Reason.SUSPENDED, f"{words}; it goes on once spec.suspend of the Job is false", "queued")


def suspended_by_us(job: Object) -> bool:
    """Whether it was the operator that suspended this Job."""
    return (job["metadata"].get("annotations") or {}).get(meta.SUSPENDED_ANNOTATION) == "true"


def cannot_begin(run: Run) -> Result | None:
    """The pod cannot be scheduled, or cannot start."""
    blocked = _blocked(run.snapshot)
    if blocked is None:
        return None
    stage, message = blocked
    return run.going_on(Reason.TUNING_BLOCKED, f"{message}; serving goes on", stage)


def is_running(run: Run) -> Result | None:
    """The tuner tells its progress, or its pod runs."""
    if run.progress:
        now, stage = str(run.progress.get("now") or "running"), str(run.progress.get("stage") or "running")
        return run.going_on(Reason.RUNNING, now, stage)
    if any((pod.get("status") or {}).get("phase") == "Running" for pod in run.snapshot.pods):
        return run.going_on(Reason.RUNNING, "the tuner is starting its engine", "starting")
    return None


def not_begun(run: Run) -> Result | None:
    """There is no pod that runs yet."""
    return run.going_on(Reason.PENDING, "the tuning pod has not begun", "waiting for its pod")


CHECKS = (
    a_policy_was_chosen,
    another_answer,
    job_was_deleted,
    job_has_ended,
    is_suspended,
    cannot_begin,
    is_running,
    not_begun,
)


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
        if (pod.get("status") or {}).get("phase", "Pending") != "Pending":
            continue
        found = trouble(pod)
        if found is None:
            continue
        if found.reason == "Unschedulable":
            cause = "InsufficientGPU: " if found.message.startswith("InsufficientGPU: ") else ""
            return "waiting for a node", f"{cause}the tuning pod cannot be scheduled: {found.message.removeprefix(cause)}"
        return f"waiting: {found.reason}", f"{found.reason}: the tuning pod cannot start: {found.message}"
    words = pods_refused(snapshot.events, run_name(snapshot.name)) if waits_for_a_pod(snapshot) else None
    return ("waiting: FailedCreate", f"the tuning pod cannot be created: {words}") if words is not None else None


def waits_for_a_pod(snapshot: TuningSnapshot) -> bool:
    """Whether the Job is to run, and has no pod that runs or is on its way."""
    job = snapshot.child("Job", run_name(snapshot.name))
    if job is None or job["spec"].get("suspend"):
        return False
    ended = any(c.get("status") == "True" for c in (job.get("status") or {}).get("conditions") or [] if c["type"] != "Suspended")
    return not ended and all((pod.get("status") or {}).get("phase") in ("Failed", "Succeeded") for pod in snapshot.pods)
