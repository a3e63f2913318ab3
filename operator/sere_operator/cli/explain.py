"""Why the running policy runs, and why a better one does not yet: sentences from what the cluster says. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sere_ext.contract.policy import EXACT
from sere_ext.contract.volume import OVERRIDE, STABLE
from sere_operator.api import meta
from sere_operator.api.conditions import ConditionType, Reason, find_condition, held_rollout

Object = dict[str, Any]

# What a person can do where the operator waits for one; None: nothing, it goes on by itself.
_WAY_OUT: dict[Reason, str] = {
    Reason.OVERRIDDEN: "`kubectl sere exact {name} --off` lifts it.",
    Reason.AWAITING_APPROVAL: "`kubectl sere approve {name}` promotes it.",
    Reason.ROLLED_BACK: "`kubectl sere rollback {name} --off` allows it again.",
    Reason.PROFILE_MISSING: "Apply the profile, or correct spec.routing.profileRef.",
    Reason.INFEASIBLE: "Widen the limit that the message names, or give more items or budget: a changed spec is tuned anew.",
    Reason.BUDGET_EXHAUSTED: "Raise spec.tuning.deviceHours or trials: a changed spec is tuned anew.",
    Reason.CANNOT_CERTIFY: "Give more items, or a wider spec.accuracy.maxDropPoints: a changed spec is tuned anew.",
    Reason.SUSPENDED: "Set spec.suspend to false to let the operator go on.",
}


def explain(deployment: Object, pods: Sequence[Object], config_map: Object | None, job: Object | None) -> list[str]:
    """Sentences for one SereDeployment, the most important first.

    Args:
        deployment: the SereDeployment as read.
        pods: its engine pods.
        config_map: its policy ConfigMap, None where there is none (yet).
        job: the SereTuningJob that status.tuningJob names, None where there is none.
    """
    return [
        *_what_runs(deployment, config_map),
        *_why_pods_fail(pods),
        *_why_not_better(deployment),
        *_tuning(deployment, job),
        *_pods(deployment, pods),
        *_judged(deployment),
    ]


def override_of(deployment: Object, config_map: Object | None) -> bool:
    """Whether the kill switch is on: on the resource, or in the ConfigMap that new pods read."""
    on_resource = (deployment["metadata"].get("annotations") or {}).get(meta.OVERRIDE_ANNOTATION)
    in_map = ((config_map or {}).get("data") or {}).get(OVERRIDE)
    return meta.OVERRIDE_EXACT in (on_resource, in_map)


def stable_of(deployment: Object, config_map: Object | None) -> str:
    """The policy that pods run by default. The ConfigMap is what they read; the status may lag behind it."""
    status = (deployment.get("status") or {}).get("policy") or {}
    return ((config_map or {}).get("data") or {}).get(STABLE) or status.get("stable") or EXACT


def _what_runs(deployment: Object, config_map: Object | None) -> list[str]:
    name = deployment["metadata"]["name"]
    routing = deployment["spec"].get("routing") or {}
    mode = routing.get("mode", "Exact")
    policy = (deployment.get("status") or {}).get("policy") or {}
    stable = stable_of(deployment, config_map)
    if override_of(deployment, config_map):
        back = f"The policy before was {stable}. " if stable != EXACT else ""
        way_out = _WAY_OUT[Reason.OVERRIDDEN].format(name=name)
        return [f"{name} routes exactly on every pod, because the kill switch is on. {back}{way_out}"]
    if stable == EXACT:
        because = "because spec.routing asks for it" if mode == "Exact" else f"although spec.routing.mode is {mode}"
        return [f"{name} routes exactly, {because}."]
    what = f"{name} runs policy {stable}"
    if words := policy.get("description"):
        what += f" ({words})"
    source = {
        "Static": "because spec.routing.policy says so; nothing certifies a static policy",
        "Profile": f"because spec.routing.profileRef names profile {(routing.get('profileRef') or {}).get('name')}",
        "Tuned": f"because tuning made profile {policy.get('profile') or '(unknown)'}",
        "Exact": "which is on its way out: spec.routing asks for exact routing",
    }[mode]
    sentences = [f"{what}, {source}."]
    status = deployment.get("status") or {}
    if status.get("speedup"):
        figures = f"accuracy changed by {status.get('accuracy', '?')} points, TPOT p95 {status.get('tpotP95', '?')}, {status['speedup']} the speed of exact routing"
        sentences.append(f"Its certificate measured: {figures}.")
    return sentences


def _why_not_better(deployment: Object) -> list[str]:
    name, status = deployment["metadata"]["name"], deployment.get("status") or {}
    sentences = []
    applied = find_condition(status.get("conditions") or [], ConditionType.POLICY_APPLIED)
    rollout = status.get("rollout") or {}
    if candidate := rollout.get("candidate"):
        stage = rollout.get("stage", "Canary")
        on = ", ".join(rollout.get("canaryPods") or []) or "no pod yet"
        sentences.append(f"Policy {candidate} is on its way: stage {stage}, on {on}. {_capital(rollout.get('message'))}".rstrip())
    if again := rollout.get("nextAttemptAt"):
        sentences.append(f"It is tried again after {again}.")
    if applied is not None and applied["status"] != "True" and applied["reason"] != Reason.OVERRIDDEN:
        sentences.append(_sentence(name, applied))
    if (hold := held_rollout(status.get("conditions") or [])) is not None:
        sentences.append(_sentence(name, hold))
    for rejection in status.get("rejected") or []:
        sentences.append(
            f"Policy {rejection['digest']} is not tried again for this model and engine: {rejection.get('message', '')}".rstrip()
        )
    return sentences


def _tuning(deployment: Object, job: Object | None) -> list[str]:
    name, status = deployment["metadata"]["name"], deployment.get("status") or {}
    if (deployment["spec"].get("routing") or {}).get("mode") != "Tuned":
        return []
    tuned = find_condition(status.get("conditions") or [], ConditionType.TUNED)
    sentences = [] if tuned is None else [_sentence(name, tuned)]
    if job is not None and not (job.get("status") or {}).get("outcome"):
        progress = (job.get("status") or {}).get("progress")
        sentences.append(
            f"Tuning job {job['metadata']['name']} has done {progress} trials."
            if progress
            else f"Tuning job {job['metadata']['name']} has not begun its trials."
        )
    return sentences


def _why_pods_fail(pods: Sequence[Object]) -> list[str]:
    """One sentence per cause of pods that cannot run, in the kubelet's or the scheduler's words, with the pods' names."""
    causes: dict[str, list[str]] = {}
    for pod in pods:
        cause = None if pod_ready(pod) else failure_of(pod)
        if cause is not None:
            causes.setdefault(cause, []).append(pod["metadata"]["name"])
    sentences = []
    for cause, names in causes.items():
        who = f"Pod {names[0]}" if len(names) == 1 else f"{len(names)} pods ({names[0]} and others)"
        where = f" Its last log lines: `kubectl logs {names[0]} --previous`." if "exit code" in cause else ""
        sentences.append(f"{who} cannot run: {cause.rstrip('.')}.{where}")
    return sentences


def failure_of(pod: Object) -> str | None:
    """Why a pod does not run, None where nothing says that it cannot: it may still be loading the model."""
    status = pod.get("status") or {}
    scheduled = find_condition(status.get("conditions") or [], "PodScheduled")
    if scheduled is not None and scheduled.get("status") == "False":
        return f"no node takes it: {scheduled.get('message') or scheduled.get('reason')}"
    for container in (*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])):
        waiting = (container.get("state") or {}).get("waiting") or {}
        ended = (container.get("lastState") or {}).get("terminated") or (container.get("state") or {}).get("terminated")
        if ended and ended.get("exitCode"):
            words = " ".join(str(ended.get("message") or ended.get("reason") or "").split())[-300:]
            restarts = container.get("restartCount", 0)
            return f"{waiting.get('reason') or 'it ended'}, exit code {ended['exitCode']}, {restarts} restarts: {words}"
        if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
            return f"{waiting['reason']}: {waiting.get('message') or container.get('image')}"
    return None


def _pods(deployment: Object, pods: Sequence[Object]) -> list[str]:
    if not pods:
        return ["There is no pod."]
    ready = sum(pod_ready(pod) for pod in pods)
    sentences = [f"{ready} of {len(pods)} pods pass their readiness probe."]
    for pod in sorted(pods, key=lambda pod: str(pod["metadata"]["name"])):
        digest = (pod["metadata"].get("annotations") or {}).get(meta.POLICY_ANNOTATION)
        if digest:
            sentences.append(f"Pod {pod['metadata']['name']} has orders to run policy {digest}, whatever the others run.")
    return sentences


def _judged(deployment: Object) -> list[str]:
    generation = deployment["metadata"].get("generation", 0)
    seen = (deployment.get("status") or {}).get("observedGeneration")
    if seen is None:
        return ["No operator has judged this resource yet; check that one runs and manages this namespace."]
    if seen < generation:
        owner = (deployment.get("status") or {}).get("operator")
        who = f"operator {owner}" if owner else "the operator"
        return [
            f"The current spec (generation {generation}) has not been judged yet, only generation {seen}: {who} is at work on it "
            "or does not run. What runs goes on."
        ]
    return []


def pod_ready(pod: Object) -> bool:
    condition = find_condition((pod.get("status") or {}).get("conditions") or [], "Ready")
    return condition is not None and condition.get("status") == "True"


def _sentence(name: str, condition: Object) -> str:
    """A condition as people read it: what the operator said, else what its reason means, and the way out."""
    reason = next((known for known in Reason if known.value == condition["reason"]), None)
    text = condition.get("message") or (reason.doc if reason else condition["reason"])
    way_out = _WAY_OUT.get(reason, "").format(name=name) if reason else ""
    if any(own in text for own in ("kubectl sere", "approve by", "tune again with")):
        way_out = ""
    return f"{condition['type']} is {condition['status']} ({condition['reason']}): {text.rstrip('.')}. {way_out}".rstrip()


def _capital(text: str | None) -> str:
    return f"{text[0].upper()}{text[1:].rstrip('.')}." if text else ""
