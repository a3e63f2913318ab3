"""The status of a SereDeployment: conditions with reasons, and the columns of `kubectl get sere`. Pure."""

from __future__ import annotations

from datetime import UTC, datetime

from sere_ext.contract.policy import EXACT

from sere_operator.api import meta
from sere_operator.api.conditions import ConditionType, Reason, set_condition
from sere_operator.api.deployment import RoutingMode, SereDeploymentSpec
from sere_operator.plan.objects.children import selector
from sere_operator.plan.objects.revision import replacing
from sere_operator.plan.rollout.annotations import right_digests
from sere_operator.plan.rollout.step import Step, seconds
from sere_operator.plan.rollout.tuning_first import Hold
from sere_operator.plan.rollout.wanted import Wanted, overridden, read_profile, tuning_job_name, tuning_job_of
from sere_operator.plan.snapshot import Object, PodView, Resource, Snapshot

SCHEDULING_GRACE_S = 10.0

Judgement = tuple[bool | None, Reason, str]


def serving_pods(snapshot: Snapshot, step: Step) -> list[PodView]:
    """Pods that pass their probe, show the policy meant for them on every rank, and gave a real token under it."""
    return [
        pod for pod in snapshot.live_pods
        if pod.ready and pod.digest in right_digests(snapshot, step, pod) and pod.proven == pod.digest
    ]  # fmt: skip


def rollout_problem(snapshot: Snapshot) -> str | None:
    """Why a new pod cannot be scheduled, in the scheduler's words, with the way out. Said after a short grace."""
    for pod in snapshot.live_pods:
        for condition in pod.object.get("status", {}).get("conditions") or []:
            if condition["type"] != "PodScheduled" or condition["status"] != "False":
                continue
            if snapshot.now - seconds(condition.get("lastTransitionTime")) < SCHEDULING_GRACE_S:
                continue  # claims are being bound, caches are filling
            text = str(condition.get("message", "no node fits")).rstrip(". ")
            if "Insufficient" not in text:
                return f"a new pod cannot be scheduled: {text}"
            cause = "InsufficientGPU: " if "gpu" in text.lower() else ""
            return f"{cause}{text}; set rollout.strategy: DrainFirst or add a node"
    return None


def pods_current(snapshot: Snapshot) -> str | None:
    """None if the Deployment has rolled out this very spec, else what is missing."""
    rolling = replacing(snapshot)
    if rolling is not None:
        return rolling
    deployment = snapshot.children["Deployment"]
    ready, wanted = (deployment.get("status") or {}).get("availableReplicas", 0), deployment["spec"].get("replicas", 1)
    return f"{ready} of {wanted} pods are ready" if ready < wanted else None


def available(snapshot: Snapshot) -> Judgement:
    ready = sum(pod.ready for pod in snapshot.live_pods)
    if ready:
        return True, Reason.PODS_ANSWERING, f"{ready} pod(s) answer"
    return False, Reason.NO_POD_ANSWERING, "no pod passes its readiness probe"


def ready(snapshot: Snapshot, spec: SereDeploymentSpec, wanted: Wanted, step: Step, hold: Hold | None) -> Judgement:
    """The checklist, in order. It never waits for tuning: in mode Tuned what is stable is what the spec asks for.

    But where pods of another model or engine are kept until the spec's is tuned, it is not the spec that answers.
    """
    if hold is not None:
        return False, hold.reason, hold.message
    behind = pods_current(snapshot)
    if behind is not None:
        blocked = rollout_problem(snapshot)
        if blocked is not None:
            return False, Reason.ROLLOUT_BLOCKED, blocked
        return False, Reason.STARTING if "ready" not in behind else Reason.PODS_NOT_READY, behind
    if not snapshot.live_pods:
        if spec.wanted_replicas == 0:
            return False, Reason.PODS_NOT_READY, "replicas is 0"
        return False, Reason.STARTING, "no pod yet"
    total = len(snapshot.live_pods)
    silent = [pod for pod in snapshot.live_pods if pod.state is None]
    if silent:
        return False, Reason.PODS_NOT_READY, f"{len(silent)} of {total} pods do not answer GET /sere"
    if (
        spec.routing.mode is not RoutingMode.TUNED
        and not overridden(snapshot)
        and (wanted.blocked or step.stable != wanted.digest)
    ):
        return False, step.reason if not step.applied else Reason.POLICY_PENDING, step.message
    serving = serving_pods(snapshot, step)
    if len(serving) < total:
        pending = [pod for pod in snapshot.live_pods if pod.digest not in right_digests(snapshot, step, pod)]
        if pending:
            return False, Reason.POLICY_PENDING, f"{len(pending)} of {total} pods do not show the policy meant for them yet"
        return False, Reason.PODS_NOT_READY, f"{total - len(serving)} of {total} pods gave no token yet"
    if snapshot.service_digest not in {pod.digest for pod in serving}:
        return False, Reason.NOT_ROUTABLE, "pods are ready, but no token came through the Service"
    return True, Reason.SERVING, _serving_message(snapshot, wanted, step)


def _serving_message(snapshot: Snapshot, wanted: Wanted, step: Step) -> str:
    if overridden(snapshot):
        return "serving exact routing: the kill switch is on"
    if step.stable == EXACT:
        return f"serving exact routing: {wanted.message}" if wanted.problem else "serving exact routing"
    if wanted.profile is not None and wanted.digest == step.stable:
        return f"serving the {'certified' if wanted.profile.evidence.certified else 'advisory'} policy"
    return f"serving policy {step.stable}"


def progressing(snapshot: Snapshot, step: Step, hold: Hold | None) -> Judgement:
    if hold is not None:
        return hold.reason is Reason.TUNING_FIRST, hold.reason, hold.message
    behind = pods_current(snapshot)
    if behind is not None:
        blocked = rollout_problem(snapshot)
        if blocked is not None:
            return False, Reason.ROLLOUT_BLOCKED, blocked
        return True, Reason.ROLLING_OUT, behind
    if step.rollout is not None and step.rollout.get("stage") != "RollingBack":
        return True, Reason.POLICY_ROLLING_OUT, step.message
    return False, Reason.ROLLOUT_COMPLETE, "pods and policy are as wanted"


def tuned(snapshot: Snapshot, spec: SereDeploymentSpec, wanted: Wanted) -> Judgement:
    if spec.routing.mode is not RoutingMode.TUNED:
        return False, Reason.NOT_REQUESTED, f"routing.mode is {spec.routing.mode.value}"
    job = tuning_job_of(snapshot, spec)
    status = (job or {}).get("status") or {}
    outcome, running = status.get("outcome"), _condition(status, ConditionType.COMPLETE)
    kept = "" if wanted.profile is None else f"; profile {wanted.profile_name} of an earlier run serves on"
    if outcome == "Chosen":
        return _tuned_by(snapshot, spec, wanted, status.get("profile"))
    if outcome:
        reason = next((r for r in Reason if r.value == outcome), Reason.FAILED)
        return False, reason, str((running or {}).get("message") or outcome) + kept
    if job is None:
        return False, Reason.PENDING, "tuning begins once a pod answers" + kept
    if running is not None and running.get("reason") == Reason.TUNING_BLOCKED:
        return False, Reason.TUNING_BLOCKED, str(running.get("message", "")) + kept
    stage = status.get("stage") or "tuning"
    return False, Reason.TUNING, f"{stage}, {status.get('progress') or 'not begun'}" + kept


def _tuned_by(snapshot: Snapshot, spec: SereDeploymentSpec, wanted: Wanted, made: str | None) -> Judgement:
    profile = read_profile(snapshot, made)
    if profile is None:
        again = f"delete SereTuningJob {tuning_job_name(snapshot.name, spec)} to tune again"
        return False, Reason.PROFILE_MISSING, f"profile {made} of this spec's tuning is gone or cannot be read; {again}"
    if made == wanted.profile_name and wanted.problem is Reason.POLICY_STALE:
        return False, Reason.POLICY_STALE, wanted.message
    if not profile.evidence.certified:
        return False, Reason.UNCERTIFIED, f"profile {made} is advisory; it is promoted only when approved"
    return True, Reason.CERTIFIED, f"profile {made} is certified"


def _condition(status: Object, kind: ConditionType) -> Object | None:
    return next((c for c in status.get("conditions") or [] if c.get("type") == kind.value), None)


def build(snapshot: Snapshot, spec: SereDeploymentSpec, wanted: Wanted, step: Step, hold: Hold | None) -> Object:
    """The whole status as it is to be; None values mean: not there."""
    conditions = list(snapshot.status.get("conditions") or [])
    for kind, judgement in (
        (ConditionType.READY, ready(snapshot, spec, wanted, step, hold)),
        (ConditionType.AVAILABLE, available(snapshot)),
        (ConditionType.PROGRESSING, progressing(snapshot, step, hold)),
        (ConditionType.POLICY_APPLIED, (step.applied, step.reason, step.message)),
        (ConditionType.TUNED, tuned(snapshot, spec, wanted)),
    ):
        conditions = with_condition(snapshot, conditions, kind, judgement)
    deployment = snapshot.children.get("Deployment") or {}
    replicas = (deployment.get("spec") or {}).get("replicas", spec.wanted_replicas or 0)
    in_force = wanted.profile if wanted.digest == step.stable and not overridden(snapshot) else None
    evidence = in_force.evidence if in_force is not None and wanted.problem is None else None
    entry_text = wanted.entry.policy.describe() if wanted.digest == step.stable else None
    job = tuning_job_of(snapshot, spec)
    known = snapshot.status.get("policy") or {}
    return {
        "observedGeneration": snapshot.generation,
        "conditions": conditions,
        "replicas": len(snapshot.live_pods),
        "readyReplicas": len(serving_pods(snapshot, step)),
        "selector": ",".join(f"{key}={value}" for key, value in selector(snapshot.name).items()),
        "ready": f"{len(serving_pods(snapshot, step))}/{replicas}",
        "routing": RoutingMode.EXACT.value if overridden(snapshot) else spec.routing.mode.value,
        "policy": {
            "wanted": wanted.digest,
            "stable": step.stable,
            "previous": step.previous,
            "description": entry_text or (EXACT if step.stable == EXACT else known.get("description")),
            # Of a profile that was deleted the policy serves on; made again under its name it is taken up again. And one that
            # waits for its pods is not yet what serves: its model or engine may be taken back.
            "profile": known.get("profile")
            if wanted.problem in (Reason.PROFILE_MISSING, Reason.POLICY_PENDING)
            else wanted.profile and wanted.profile_name,
            "override": meta.OVERRIDE_EXACT if overridden(snapshot) else None,
        },
        "rollout": step.rollout,
        "rejected": list(step.rejected) or None,
        "tuningJob": job["metadata"]["name"] if job else None,
        "tpotP95": f"{evidence.tpot_ms.chosen:.1f}ms" if evidence else None,
        "speedup": f"{evidence.speedup.value:.2f}x" if evidence else None,
        "accuracy": f"{-evidence.accuracy.drop_points + 0.0:.1f}" if evidence else None,
        "revision": deployment.get("metadata", {}).get("annotations", {}).get(meta.CONFIG_HASH_ANNOTATION),
    }


def problem(snapshot: Snapshot, reason: Reason, message: str) -> Object:
    """Status when nothing can be carried out: Ready says why, the rest stays as it was."""
    conditions = list(snapshot.status.get("conditions") or [])
    conditions = with_condition(snapshot, conditions, ConditionType.READY, (False, reason, message))
    conditions = with_condition(snapshot, conditions, ConditionType.AVAILABLE, available(snapshot))
    return {**snapshot.status, "observedGeneration": snapshot.generation, "conditions": conditions}


def with_condition(snapshot: Resource, conditions: list[Object], kind: ConditionType, judgement: Judgement) -> list[Object]:
    status, reason, message = judgement
    now = datetime.fromtimestamp(snapshot.now, UTC)
    return set_condition(conditions, kind, status, reason, message[:1024], generation=snapshot.generation, now=now)
