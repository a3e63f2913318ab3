"""`rollout.requireProfile`: a new engine or model is tuned before the pods of the old one go. Pure.

Exact routing at a number of pods sized for the tuned speed falls off a cliff, so a rollout that would begin with it waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from functools import cached_property

from sere_ext.contract.policy import EXACT
from sere_operator.api import meta
from sere_operator.api.conditions import ConditionType, Reason, find_condition, held_rollout
from sere_operator.api.deployment import SereDeploymentSpec
from sere_operator.plan.chain import first
from sere_operator.plan.objects import children
from sere_operator.plan.objects.revision import changing, waiting
from sere_operator.plan.rollout.wanted import Wanted, overridden, read_profile, tuning_job_name, tuning_job_of
from sere_operator.plan.snapshot import Object, Snapshot
from sere_operator.plan.times import seconds

DOWN_S = 600.0  # pods that answer nothing for so long serve nobody who could fall off the cliff


@dataclass(frozen=True)
class Hold:
    """Why the pods stay as they are. `reason` is TUNING_FIRST while that may end by itself, else PROFILE_REQUIRED."""

    reason: Reason
    message: str


class Go(Enum):
    """The pods may be replaced."""

    PROCEED = "proceed"


@dataclass(frozen=True)
class Change:
    """A spec whose model or engine may differ from what the pods are of.

    stable    digest of the policy in force
    template  the pod template that the spec leads to
    """

    snapshot: Snapshot
    spec: SereDeploymentSpec
    wanted: Wanted
    stable: str
    template: Object

    @cached_property
    def job(self) -> Object:
        """Status of the tuning run of the new spec; empty where there is none."""
        return (tuning_job_of(self.snapshot, self.spec) or {}).get("status") or {}

    @property
    def ended(self) -> Object:
        """The run's condition Complete; empty where there is none."""
        return find_condition(self.job.get("conditions") or [], ConditionType.COMPLETE) or {}

    @property
    def waits_too(self) -> str:
        more = waiting(self.template, self.snapshot.children["Deployment"])
        return f"; what else changes their pods waits too: {', '.join(more)}" if more else ""


def held(snapshot: Snapshot, spec: SereDeploymentSpec, wanted: Wanted, stable: str, template: Object) -> Hold | None:
    """The answer of the first of `CHECKS` that has one; None: the pods may be replaced by ones of `template`.

    Args:
        stable: digest of the policy in force.
        template: the pod template that the spec leads to.
    """
    answer = first(CHECKS, Change(snapshot, spec, wanted, stable, template))
    return answer if isinstance(answer, Hold) else None


def no_profile_is_required(change: Change) -> Go | Hold | None:
    """The spec asks for none, or model and engine are what the pods are of."""
    return None if change.spec.profile_required and changing(change.snapshot, change.spec) else Go.PROCEED


def nothing_tuned_serves(change: Change) -> Go | Hold | None:
    """A first install, exact routing, or a stale profile. A profile that was deleted while its policy serves still counts."""
    missing = change.wanted.problem is Reason.PROFILE_MISSING
    stale = change.wanted.problem is Reason.POLICY_STALE
    tuned = change.stable != EXACT and (missing or (change.wanted.profile is not None and not stale))
    return None if tuned else Go.PROCEED


def kill_switch_was_on_before(change: Change) -> Go | Hold | None:
    """The kill switch makes pods route exactly. Pods that are held already stay: it must never restart one."""
    held_already = held_rollout(change.snapshot.status.get("conditions") or []) is not None
    return Go.PROCEED if overridden(change.snapshot) and not held_already else None


def nobody_is_served(change: Change) -> Go | Hold | None:
    """No pod has answered for `DOWN_S`."""
    return None if _serves(change.snapshot) else Go.PROCEED


def taken_back_before_it_began(change: Change) -> Go | Hold | None:
    """Pods of just this template serve by the policy in force: the change was taken back in the middle of its rollout."""
    back = any(
        pod.ready and pod.digest == change.stable and children.made_of(pod.object, change.template)
        for pod in change.snapshot.live_pods
    )
    return Go.PROCEED if back else None


def still_being_tuned(change: Change) -> Go | Hold | None:
    """The run of the new spec has not ended: hold until it has."""
    if change.job.get("outcome") is not None:
        return None
    blocked = change.ended.get("reason") == Reason.TUNING_BLOCKED
    trials = f"{change.job.get('stage') or 'tuning begins'}, {change.job.get('progress') or '0'} trials"
    doing = change.ended.get("message") if blocked else trials
    message = f"the new model or engine is tuned before the pods of the old one go ({doing}){change.waits_too}"
    return Hold(Reason.TUNING_FIRST, f"{message}; to replace them now, set rollout.requireProfile: false")


def made_a_certified_profile(change: Change) -> Go | Hold | None:
    """The run of the new spec made a certified profile, which is still there."""
    if change.job.get("outcome") != "Chosen":
        return None
    profile = read_profile(change.snapshot, change.job.get("profile"))
    return Go.PROCEED if profile is not None and profile.evidence.certified else None


def ended_without_one(change: Change) -> Go | Hold | None:
    """The run of the new spec ended with anything else: hold until a person decides."""
    outcome = change.job.get("outcome")
    why = str(change.ended.get("message") or outcome)
    if outcome == "Chosen":
        gone = read_profile(change.snapshot, change.job.get("profile")) is None
        why = f"profile {change.job.get('profile')} is {'gone' if gone else 'advisory, not certified'}"
    message = f"the pods of the old model or engine serve on, since the new one has no certified profile: {why}"
    again = f"tune again with annotation {meta.RETUNE_ANNOTATION}={tuning_job_name(change.snapshot.name, change.spec)}"
    way_out = (
        f"set rollout.requireProfile: false to go on with exact routing, change the limits, {again}, or take the change back"
    )
    return Hold(Reason.PROFILE_REQUIRED, f"{message[:700]}{change.waits_too}; {way_out}")


CHECKS = (
    no_profile_is_required,
    nothing_tuned_serves,
    kill_switch_was_on_before,
    nobody_is_served,
    taken_back_before_it_began,
    still_being_tuned,
    made_a_certified_profile,
    ended_without_one,
)


def _serves(snapshot: Snapshot) -> bool:
    if any(pod.ready for pod in snapshot.live_pods):
        return True
    known = find_condition(snapshot.status.get("conditions") or [], ConditionType.AVAILABLE)
    if known is None:
        return False
    return known["status"] == "True" or snapshot.now - seconds(known["lastTransitionTime"]) < DOWN_S
