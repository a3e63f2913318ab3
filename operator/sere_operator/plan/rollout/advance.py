"""The hot rollout of a routing policy: which digest is stable and which pods run another. Pure.

What is true stands in three places, so that a restart between any two writes goes on: the policy ConfigMap's `stable`,
the pods' policy annotation, and `status.rollout` (bookkeeping and evidence). `candidate` tells how one policy gets there.
"""

from __future__ import annotations

from dataclasses import replace

from sere_ext.contract.policy import EXACT

from sere_operator.api import meta
from sere_operator.api.conditions import Reason
from sere_operator.api.deployment import SereDeploymentSpec
from sere_operator.plan.rollout import candidate
from sere_operator.plan.rollout.aftermath import refused
from sere_operator.plan.rollout.evidence import Stage
from sere_operator.plan.rollout.step import POLL_S, Step
from sere_operator.plan.rollout.wanted import Wanted, overridden
from sere_operator.plan.snapshot import Event, Snapshot


def advance(snapshot: Snapshot, spec: SereDeploymentSpec, wanted: Wanted, stable: str) -> Step:
    """The checklist, in order; the first that applies decides.

    1. kill switch on                     every pod exact, rollout dropped, stable untouched
    2. the wanted policy cannot be had    stable kept, rollout dropped
    3. a person gave it up                back to the one before
    4. rejected for this revision         stable kept
    5. already stable                     finish: all pods must show it
    6. exact is wanted                    at once: it can harm no answer
    7. otherwise                          canary, analysis, promotion or back
    """
    status = snapshot.status
    rejected = tuple(status.get("rejected") or ())
    previous = (status.get("policy") or {}).get("previous")
    base = Step(stable=stable, rejected=rejected, previous=previous)
    if overridden(snapshot):
        return _override(snapshot, base)
    if wanted.blocked:
        return replace(base, reason=wanted.problem or Reason.PROFILE_MISSING, message=wanted.message, requeue_after=30.0)
    if wanted.digest != EXACT and snapshot.annotations.get(meta.ROLLBACK_ANNOTATION) == wanted.digest:
        return _given_up(snapshot, base, wanted)
    if wanted.digest == stable:
        return _settle(snapshot, base, wanted)
    if wanted.digest == EXACT:
        return _go_exact(base, wanted)
    return refused(base, spec, wanted) or candidate.look(snapshot, spec, base, wanted)


def _override(snapshot: Snapshot, base: Step) -> Step:
    behind = [pod.name for pod in snapshot.live_pods if pod.digest != EXACT]
    message = "the kill switch is on (annotation serving.sere.dev/override): every pod routes exactly"
    if behind:
        message = f"the kill switch is on; {len(behind)} of {len(snapshot.live_pods)} pods do not confirm exact routing yet"
    requeue = POLL_S if behind else None
    return replace(base, applied=False, reason=Reason.OVERRIDDEN, message=message, requeue_after=requeue)


def _given_up(snapshot: Snapshot, base: Step, wanted: Wanted) -> Step:
    target = base.stable
    if base.stable == wanted.digest:
        target = base.previous if base.previous and base.previous != wanted.digest else EXACT
    message = f"policy {wanted.digest} was given up by annotation {meta.ROLLBACK_ANNOTATION}; {target} is in force"
    return replace(base, stable=target, reason=Reason.ROLLED_BACK, message=message, requeue_after=_until_shown(snapshot, target))


def _until_shown(snapshot: Snapshot, digest: str) -> float | None:
    return POLL_S if any(pod.digest != digest for pod in snapshot.live_pods) else None


def _settle(snapshot: Snapshot, base: Step, wanted: Wanted) -> Step:
    """The wanted policy is stable. Canary annotations go last, when all other pods show it, so that none flips back."""
    pods = snapshot.live_pods
    behind = [pod for pod in pods if pod.digest != wanted.digest]
    keep = {pod.name: wanted.digest for pod in pods if pod.annotations.get(meta.POLICY_ANNOTATION) == wanted.digest}
    under_way = snapshot.status.get("rollout") or {}
    promoting = under_way.get("stage") == Stage.PROMOTING and under_way.get("candidate") == wanted.digest
    if behind:
        refused = next((pod.state.error for pod in behind if pod.state and pod.state.error), None)
        reason, message = Reason.POLICY_PENDING, f"{len(behind)} of {len(pods)} pods do not show {wanted.digest} yet"
        if promoting:
            reason = Reason.PROMOTING
        if refused:
            reason, message = Reason.APPLY_FAILED, f"{message}: {refused}"
        rollout = {**under_way, "stage": Stage.PROMOTING.value, "message": message} if promoting else None
        return replace(
            base, pod_policy=keep if promoting else {}, rollout=rollout, reason=reason, message=message, requeue_after=POLL_S
        )
    done = Event("Normal", "PolicyPromoted", f"all {len(pods)} pods run policy {wanted.digest}")
    events = (done,) if promoting else ()
    if wanted.problem is not None:
        return replace(base, applied=False, reason=wanted.problem, message=wanted.message, events=events)
    if wanted.digest == EXACT:
        return replace(base, applied=True, reason=Reason.EXACT_ROUTING, message="routing is exact", events=events)
    what = wanted.entry.policy.describe()
    return replace(base, applied=True, reason=Reason.APPLIED, message=f"every pod runs {wanted.digest}: {what}", events=events)


def _go_exact(base: Step, wanted: Wanted) -> Step:
    message = wanted.message or "going back to exact routing"
    event = Event("Normal" if wanted.problem is None else "Warning", "PolicyExact", message)
    return replace(
        base, stable=EXACT, previous=base.stable, reason=wanted.problem or Reason.POLICY_PENDING, message=message,
        events=(event,), requeue_after=POLL_S,
    )  # fmt: skip
