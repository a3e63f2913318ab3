"""The status of a SereDeployment: conditions with reasons, and the columns of `kubectl get sere`. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from sere_ext.contract.policy import EXACT
from sere_operator.api import meta
from sere_operator.api.conditions import ConditionType, Reason, set_condition
from sere_operator.api.deployment import RoutingMode, SereDeploymentSpec, Strategy
from sere_operator.plan.chain import first
from sere_operator.plan.objects.children import pod_base, selector
from sere_operator.plan.objects.revision import replacing
from sere_operator.plan.objects.trouble import not_created, trouble
from sere_operator.plan.rollout.annotations import right_digests
from sere_operator.plan.rollout.step import Step
from sere_operator.plan.rollout.tuning_first import Hold
from sere_operator.plan.rollout.wanted import Wanted, overridden, read_profile, tuning_job_name, tuning_job_of
from sere_operator.plan.snapshot import Object, PodView, Resource, Snapshot
from sere_operator.plan.times import stamp

Judgement = tuple[bool | None, Reason, str]


def serving_pods(snapshot: Snapshot, step: Step) -> list[PodView]:
    """Pods that pass their probe, show the policy meant for them on every rank, and gave a real token under it."""
    return [
        pod
        for pod in snapshot.live_pods
        if pod.ready and pod.digest in right_digests(snapshot, step, pod) and pod.proven == pod.digest
    ]


def pods_trouble(snapshot: Snapshot, spec: SereDeploymentSpec) -> str | None:
    """Why pods do not come up, in the API server's, the scheduler's or the kubelet's words, with the pod and the way out."""
    refused = not_created(snapshot.children.get("Deployment"))
    if refused is not None:
        return f"pods cannot be created: {refused}"
    for pod in snapshot.live_pods:
        found = None if pod.ready else trouble(pod.object, snapshot.now)
        if found is None:
            continue
        if found.no_room:
            others = any(other.ready for other in snapshot.live_pods) and spec.rollout.strategy is Strategy.SURGE
            return f"{found.message}; {'set rollout.strategy: DrainFirst or ' if others else ''}add a node"
        if found.reason == "Unschedulable":
            return f"pod {pod.name} cannot be scheduled: {found.message}"
        return f"pod {pod.name}: {found.reason}: {found.message}"
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


@dataclass(frozen=True)
class Case:
    """What Ready is judged by: a snapshot and its spec, the wanted policy, where its rollout stands, and why pods are held."""

    snapshot: Snapshot
    spec: SereDeploymentSpec
    wanted: Wanted
    step: Step
    hold: Hold | None

    @property
    def pods(self) -> tuple[PodView, ...]:
        return self.snapshot.live_pods


def ready(case: Case) -> Judgement:
    """The answer of the first of `READY` that has one. Ready never waits for tuning."""
    judgement = first(READY, case)
    assert judgement is not None, "serving always answers"
    return judgement


def pods_are_held(case: Case) -> Judgement | None:
    """Pods of another model or engine are kept until the spec's is tuned: it is not the spec that answers."""
    return (False, case.hold.reason, case.hold.message) if case.hold is not None else None


def pods_do_not_come_up(case: Case) -> Judgement | None:
    """Pods of the current spec are missing, and why is known."""
    if pods_current(case.snapshot) is None:
        return None
    why = pods_trouble(case.snapshot, case.spec)
    return (False, Reason.ROLLOUT_BLOCKED, why) if why is not None else None


def pods_are_missing(case: Case) -> Judgement | None:
    """Pods of the current spec are missing, and on their way."""
    behind = pods_current(case.snapshot)
    if behind is not None:
        return False, Reason.STARTING if "ready" not in behind else Reason.PODS_NOT_READY, behind
    if case.pods:
        return None
    if case.spec.wanted_replicas == 0:
        return False, Reason.PODS_NOT_READY, "replicas is 0"
    return False, Reason.STARTING, "no pod yet"


def pods_cannot_be_reached(case: Case) -> Judgement | None:
    """The kubelet's probe passes, but the operator gets no answer."""
    silent = [pod for pod in case.pods if pod.state is None]
    if not silent:
        return None
    where = pod_base(silent[0].object) or "no address"
    likely = "; a NetworkPolicy or strict mTLS may keep the operator out" if silent[0].ready else ""
    message = f"{len(silent)} of {len(case.pods)} pods do not answer GET /sere: pod {silent[0].name} at {where}{likely}"
    return False, Reason.PODS_NOT_READY, message


def policy_is_not_in_force(case: Case) -> Judgement | None:
    """The wanted policy is not stable yet. In mode Tuned what is stable is what the spec asks for."""
    if case.spec.routing.mode is RoutingMode.TUNED or overridden(case.snapshot):
        return None
    if not case.wanted.blocked and case.step.stable == case.wanted.digest:
        return None
    return False, case.step.reason if not case.step.applied else Reason.POLICY_PENDING, case.step.message


def policy_is_not_shown(case: Case) -> Judgement | None:
    """Some pods do not show the policy meant for them."""
    pending = [pod for pod in case.pods if pod.digest not in right_digests(case.snapshot, case.step, pod)]
    if not pending:
        return None
    message = f"{len(pending)} of {len(case.pods)} pods do not show the policy meant for them yet: pod {pending[0].name}"
    return False, Reason.POLICY_PENDING, f"{message} says: {pending[0].error}" if pending[0].error else message


def no_token_from_a_pod(case: Case) -> Judgement | None:
    """Some pods gave no real token under their policy."""
    missing = len(case.pods) - len(serving_pods(case.snapshot, case.step))
    if not missing:
        return None
    why = f": {case.snapshot.tokens_refused}" if case.snapshot.tokens_refused else ""
    return False, Reason.PODS_NOT_READY, f"{missing} of {len(case.pods)} pods gave no token yet{why}"


def no_token_through_the_service(case: Case) -> Judgement | None:
    """Pods serve, but clients do not reach them."""
    if case.snapshot.service_digest in {pod.digest for pod in serving_pods(case.snapshot, case.step)}:
        return None
    return False, Reason.NOT_ROUTABLE, "pods are ready, but no token came through the Service"


def serving(case: Case) -> Judgement | None:
    """All of it holds."""
    return True, Reason.SERVING, _serving_message(case.snapshot, case.wanted, case.step)


READY = (
    pods_are_held,
    pods_do_not_come_up,
    pods_are_missing,
    pods_cannot_be_reached,
    policy_is_not_in_force,
    policy_is_not_shown,
    no_token_from_a_pod,
    no_token_through_the_service,
    serving,
)


def _serving_message(snapshot: Snapshot, wanted: Wanted, step: Step) -> str:
    if overridden(snapshot):
        return "serving exact routing: the kill switch is on"
    if step.stable == EXACT:
        return f"serving exact routing: {wanted.message}" if wanted.problem else "serving exact routing"
    if wanted.profile is not None and wanted.digest == step.stable:
        return f"serving the {'certified' if wanted.profile.evidence.certified else 'advisory'} policy"
    return f"serving policy {step.stable}"


def progressing(case: Case) -> Judgement:
    """Whether the operator is changing pods or the policy."""
    if case.hold is not None:
        return case.hold.reason is Reason.TUNING_FIRST, case.hold.reason, case.hold.message
    behind = pods_current(case.snapshot)
    if behind is not None:
        why = pods_trouble(case.snapshot, case.spec)
        return (False, Reason.ROLLOUT_BLOCKED, why) if why is not None else (True, Reason.ROLLING_OUT, behind)
    if case.step.rollout is not None and case.step.rollout.get("stage") not in (None, "RollingBack"):
        return True, Reason.POLICY_ROLLING_OUT, case.step.message
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
        again = f"tune again with annotation {meta.RETUNE_ANNOTATION}={tuning_job_name(snapshot.name, spec)}"
        return False, Reason.PROFILE_MISSING, f"profile {made} of this spec's tuning is gone or cannot be read; {again}"
    if made == wanted.profile_name and wanted.problem is Reason.POLICY_STALE:
        return False, Reason.POLICY_STALE, wanted.message
    if not profile.evidence.certified:
        return False, Reason.UNCERTIFIED, f"profile {made} is advisory; it is promoted only when approved"
    return True, Reason.CERTIFIED, f"profile {made} is certified"


def _condition(status: Object, kind: ConditionType) -> Object | None:
    return next((c for c in status.get("conditions") or [] if c.get("type") == kind.value), None)


def build(case: Case) -> Object:
    """The whole status as it is to be, but for what others remember in it. A value of None means that the field is absent."""
    snapshot, spec, wanted, step = case.snapshot, case.spec, case.wanted, case.step
    conditions = list(snapshot.status.get("conditions") or [])
    for kind, judgement in (
        (ConditionType.READY, ready(case)),
        (ConditionType.AVAILABLE, available(snapshot)),
        (ConditionType.PROGRESSING, progressing(case)),
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
            "wantedSince": known.get("wantedSince") if known.get("wanted") == wanted.digest else stamp(snapshot.now),
            "stable": step.stable,
            "previous": step.previous,
            "description": entry_text or (EXACT if step.stable == EXACT else known.get("description")),
            # The name of the previous profile stays while the wanted one is missing (its policy still serves), or waits for
            # new pods (the change may be taken back).
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
    """The status when nothing but the kill switch can be carried out: Ready says why, the rest stays as it was."""
    conditions = list(snapshot.status.get("conditions") or [])
    conditions = with_condition(snapshot, conditions, ConditionType.READY, (False, reason, message))
    conditions = with_condition(snapshot, conditions, ConditionType.AVAILABLE, available(snapshot))
    override = meta.OVERRIDE_EXACT if overridden(snapshot) else None
    policy = {**(snapshot.status.get("policy") or {}), "override": override}
    return {**snapshot.status, "observedGeneration": snapshot.generation, "conditions": conditions, "policy": policy}


def with_condition(snapshot: Resource, conditions: list[Object], kind: ConditionType, judgement: Judgement) -> list[Object]:
    status, reason, message = judgement
    now = datetime.fromtimestamp(snapshot.now, UTC)
    return set_condition(conditions, kind, status, reason, message[:1024], generation=snapshot.generation, now=now)
