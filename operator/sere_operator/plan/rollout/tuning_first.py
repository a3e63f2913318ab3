"""`rollout.requireProfile`: a new engine or model is tuned before the pods of the old one go. Pure.

Exact routing at a number of pods sized for the tuned speed falls off a cliff, so a rollout that would begin with it waits.
"""

from __future__ import annotations

from dataclasses import dataclass

from sere_ext.contract.policy import EXACT

from sere_operator.api.conditions import ConditionType, Reason, find_condition, held_rollout
from sere_operator.api.deployment import SereDeploymentSpec
from sere_operator.plan.objects import children
from sere_operator.plan.objects.revision import changing, waiting
from sere_operator.plan.rollout.step import seconds
from sere_operator.plan.rollout.wanted import Wanted, overridden, read_profile, tuning_job_name, tuning_job_of
from sere_operator.plan.snapshot import Object, Snapshot

DOWN_S = 600.0  # pods that answer nothing for so long serve nobody who could fall off the cliff


@dataclass(frozen=True)
class Hold:
    """Why the pods stay as they are. `reason` is TUNING_FIRST while that may end by itself, else PROFILE_REQUIRED."""

    reason: Reason
    message: str


def held(snapshot: Snapshot, spec: SereDeploymentSpec, wanted: Wanted, stable: str, template: Object) -> Hold | None:
    """The checklist, in order; None: the pods may be replaced by ones of `template`.

    1. no profile is required, or model and engine are what runs       go
    2. nothing tuned serves: a first install, exact routing, the kill switch, no pod that answers     go; but pods that are
       held already stay when the kill switch is set: it must never restart one
    3. pods of just this template serve by the policy in force         go: the change was taken back before it was rolled out
    4. the tuning of the new spec made a certified profile             go
    5. it ended with anything else                                     hold until a person decides
    6. otherwise                                                       hold until it has ended
    """
    if not spec.profile_required or not changing(snapshot, spec):
        return None
    # A profile that was deleted while its policy serves is no reason to let the pods go.
    tuned = stable != EXACT and (
        wanted.problem is Reason.PROFILE_MISSING or (wanted.profile is not None and wanted.problem is not Reason.POLICY_STALE)
    )
    switched_off = overridden(snapshot) and held_rollout(snapshot.status.get("conditions") or []) is None
    if not tuned or switched_off or not _serves(snapshot):
        return None
    if any(pod.ready and pod.digest == stable and children.made_of(pod.object, template) for pod in snapshot.live_pods):
        return None
    more = waiting(template, snapshot.children["Deployment"])
    too = f"; what else changes their pods waits too: {', '.join(more)}" if more else ""
    status = (tuning_job_of(snapshot, spec) or {}).get("status") or {}
    complete = find_condition(status.get("conditions") or [], ConditionType.COMPLETE) or {}
    outcome = status.get("outcome")
    if outcome is None:
        blocked = complete.get("reason") == Reason.TUNING_BLOCKED
        doing = (
            complete.get("message")
            if blocked
            else f"{status.get('stage') or 'tuning begins'}, {status.get('progress') or '0'} trials"
        )
        message = f"the new model or engine is tuned before the pods of the old one go ({doing}){too}"
        return Hold(Reason.TUNING_FIRST, f"{message}; to replace them now, set rollout.requireProfile: false")
    why = str(complete.get("message") or outcome)
    if outcome == "Chosen":
        profile = read_profile(snapshot, status.get("profile"))
        if profile is not None and profile.evidence.certified:
            return None
        why = f"profile {status.get('profile')} is {'gone' if profile is None else 'advisory, not certified'}"
    message = f"the pods of the old model or engine serve on, since the new one has no certified profile: {why}"
    again = f"delete SereTuningJob {tuning_job_name(snapshot.name, spec)} to tune again"
    way_out = (
        f"set rollout.requireProfile: false to go on with exact routing, change the limits, {again}, or take the change back"
    )
    return Hold(Reason.PROFILE_REQUIRED, f"{message[:700]}{too}; {way_out}")


def _serves(snapshot: Snapshot) -> bool:
    if any(pod.ready for pod in snapshot.live_pods):
        return True
    known = find_condition(snapshot.status.get("conditions") or [], ConditionType.AVAILABLE)
    if known is None:
        return False
    return known["status"] == "True" or snapshot.now - seconds(known["lastTransitionTime"]) < DOWN_S
