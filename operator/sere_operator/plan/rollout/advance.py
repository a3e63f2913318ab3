"""The hot rollout of a routing policy: which digest is stable and which pods run another. Pure.

A rollout stands in three places, so that an operator that dies between any two writes goes on: the policy ConfigMap's `stable`,
the pods' policy annotation, and `status.rollout` (bookkeeping and evidence). `candidate` tells how one policy gets there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from sere_ext.contract.policy import EXACT
from sere_operator.api import meta
from sere_operator.api.conditions import Reason
from sere_operator.api.deployment import SereDeploymentSpec
from sere_operator.plan.chain import first
from sere_operator.plan.rollout import candidate
from sere_operator.plan.rollout.aftermath import refused
from sere_operator.plan.rollout.evidence import Stage
from sere_operator.plan.rollout.step import POLL_S, Step
from sere_operator.plan.rollout.wanted import Wanted, overridden, suited
from sere_operator.plan.snapshot import Event, PodView, Snapshot


@dataclass(frozen=True)
class Situation:
    """A snapshot and its spec, the wanted policy, and a `Step` in which nothing moves, to begin from."""

    snapshot: Snapshot
    spec: SereDeploymentSpec
    wanted: Wanted
    base: Step


def advance(snapshot: Snapshot, spec: SereDeploymentSpec, wanted: Wanted, stable: str) -> Step:
    """The answer of the first of `CHECKS` that has one.

    Args:
        stable: digest of the policy in force.
    """
    status = snapshot.status
    base = Step(
        stable=stable,
        rejected=tuple(status.get("rejected") or ()),
        previous=(status.get("policy") or {}).get("previous"),
    )
    answer = first(CHECKS, Situation(snapshot, spec, wanted, base))
    assert answer is not None, "next_step_of_its_canary always answers"
    return answer


def kill_switch_is_on(s: Situation) -> Step | None:
    """Every pod routes exactly; a canary under way is dropped; what is stable stays so for afterwards."""
    if not overridden(s.snapshot):
        return None
    pods = s.snapshot.live_pods
    behind = [pod.name for pod in pods if pod.digest != EXACT]
    message = "the kill switch is on (annotation serving.sere.dev/override): every pod routes exactly"
    if behind:
        message = f"the kill switch is on; {len(behind)} of {len(pods)} pods do not confirm exact routing yet"
    return replace(s.base, reason=Reason.OVERRIDDEN, message=message, requeue_after=POLL_S if behind else None)


def policy_cannot_be_had(s: Situation) -> Step | None:
    """The wanted policy is blocked: the policy in force stays, a canary under way is dropped."""
    if not s.wanted.blocked:
        return None
    return replace(s.base, reason=s.wanted.problem or Reason.PROFILE_MISSING, message=s.wanted.message, requeue_after=30.0)


def given_up_by_a_person(s: Situation) -> Step | None:
    """The rollback annotation names the wanted policy: the one that was in force before it is in force again."""
    digest = s.wanted.digest
    if digest == EXACT or s.snapshot.annotations.get(meta.ROLLBACK_ANNOTATION) != digest:
        return None
    target = s.base.stable
    if target == digest:
        target = s.base.previous if s.base.previous and s.base.previous != digest else EXACT
    message = f"policy {digest} was given up by annotation {meta.ROLLBACK_ANNOTATION}; {target} is in force"
    waits = any(pod.digest != target for pod in s.snapshot.live_pods)
    return replace(s.base, stable=target, reason=Reason.ROLLED_BACK, message=message, requeue_after=POLL_S if waits else None)


def already_in_force(s: Situation) -> Step | None:
    """The wanted policy is stable; a promotion ends once every pod that answers shows it.

    The canaries' annotations go last, when all other pods show the policy, so that no canary flips back for a moment.
    """
    if s.wanted.digest != s.base.stable:
        return None
    pods = suited(s.snapshot, s.wanted)
    behind = [pod for pod in pods if pod.digest != s.wanted.digest]
    under_way = s.snapshot.status.get("rollout") or {}
    promoting = under_way.get("stage") == Stage.PROMOTING and under_way.get("candidate") == s.wanted.digest
    if any(pod.ready or pod.state is not None for pod in behind):
        return _in_force_soon(s, pods, behind, promoting)
    done = Event("Normal", "PolicyPromoted", f"all {len(pods)} pods run policy {s.wanted.digest}")
    base = replace(s.base, events=(done,) if promoting else ())
    if behind:
        message = f"{len(behind)} of {len(pods)} pods do not answer; they apply {s.wanted.digest} when they do"
        return replace(base, reason=Reason.POLICY_PENDING, message=message, requeue_after=POLL_S)
    if s.wanted.problem is not None:
        return replace(base, reason=s.wanted.problem, message=s.wanted.message)
    if s.wanted.digest == EXACT:
        return replace(base, applied=True, reason=Reason.EXACT_ROUTING, message="routing is exact")
    message = f"every pod runs {s.wanted.digest}: {s.wanted.entry.policy.describe()}"
    if s.wanted.misfits:
        told = "; ".join(f"pod {name} routes exactly: {why}" for name, why in sorted(s.wanted.misfits.items()))
        message = f"{len(pods)} of {len(s.snapshot.live_pods)} pods run {s.wanted.digest}; {told}"
    return replace(base, applied=True, reason=Reason.APPLIED, message=message)


def _in_force_soon(s: Situation, pods: list[PodView], behind: list[PodView], promoting: bool) -> Step:
    under_way, digest = s.snapshot.status.get("rollout") or {}, s.wanted.digest
    reason, message = Reason.POLICY_PENDING, f"{len(behind)} of {len(pods)} pods do not show {digest} yet"
    if promoting:
        reason = Reason.PROMOTING
    refusal = next(((pod.name, pod.error) for pod in behind if pod.error), None)
    if refusal is not None:
        reason, message = Reason.APPLY_FAILED, f"{message}; pod {refusal[0]} says: {refusal[1]}"
    step = replace(s.base, reason=reason, message=message, requeue_after=POLL_S)
    if not promoting:
        return step
    canaries = {pod.name: digest for pod in pods if pod.annotations.get(meta.POLICY_ANNOTATION) == digest}
    return replace(step, pod_policy=canaries, rollout={**under_way, "stage": Stage.PROMOTING.value, "message": message})


def exact_is_wanted(s: Situation) -> Step | None:
    """Exact routing can harm no answer: it is in force at once."""
    if s.wanted.digest != EXACT:
        return None
    message = s.wanted.message or "going back to exact routing"
    event = Event("Normal" if s.wanted.problem is None else "Warning", "PolicyExact", message)
    return replace(
        s.base, stable=EXACT, previous=s.base.stable, reason=s.wanted.problem or Reason.POLICY_PENDING, message=message,
        events=(event,), requeue_after=POLL_S,
    )  # fmt: skip


def rejected_before(s: Situation) -> Step | None:
    """A canary showed that the policy is worse on this model and engine: the policy in force stays."""
    return refused(s.base, s.spec, s.wanted)


def next_step_of_its_canary(s: Situation) -> Step | None:
    """Canary, analysis, and promotion or back."""
    return candidate.proceed(s.snapshot, s.spec, s.base, s.wanted)


CHECKS = (
    kill_switch_is_on,
    policy_cannot_be_had,
    given_up_by_a_person,
    already_in_force,
    exact_is_wanted,
    rejected_before,
    next_step_of_its_canary,
)
