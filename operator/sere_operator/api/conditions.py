"""Conditions: which there are, why each can be what it is, and the one rule by which they change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field, WithJsonSchema


class Documented(StrEnum):
    """A string enum whose members carry one sentence each (`.doc`), which the reference page prints."""

    doc: str

    def __new__(cls, value: str, doc: str = "") -> Documented:
        member = str.__new__(cls, value)
        member._value_ = value
        member.doc = doc
        return member


class ConditionType(Documented):
    """Types of the conditions in a status."""

    AVAILABLE = "Available", "At least one pod answers requests."
    READY = (
        "Ready",
        "Every wanted pod runs this generation with the wanted policy, and a token came through the Service.",
    )
    PROGRESSING = "Progressing", "The operator is changing something: pods, or the policy."
    TUNED = "Tuned", "A certified profile for what is running exists."
    POLICY_APPLIED = "PolicyApplied", "The wanted policy is what every pod routes by."
    FEASIBLE = "Feasible", "A policy within all limits was found and certified (SereTuningJob)."
    COMPLETE = "Complete", "The tuning run has ended, one way or another (SereTuningJob)."


class Reason(Documented):
    """Why a condition is what it is. Reasons are API: programs compare them, tests assert them."""

    # Available
    PODS_ANSWERING = "PodsAnswering", "At least one pod passes its readiness probe."
    NO_POD_ANSWERING = "NoPodAnswering", "No pod passes its readiness probe; requests fail."
    # Ready
    SERVING = "Serving", "All wanted pods answer with the wanted policy and a token came through the Service."
    STARTING = "Starting", "Pods of this generation are being scheduled, are loading the model, or are warming up."
    PODS_NOT_READY = "PodsNotReady", "Some pods do not answer yet, or no longer."
    POLICY_PENDING = "PolicyPending", "Pods answer, but not all of them with the wanted policy yet."
    NOT_ROUTABLE = "NotRoutable", "Pods are ready, but no token came through the Service."
    INVALID_SPEC = "InvalidSpec", "The spec cannot be carried out as written; the message names the field."
    REFUSED = "Refused", "The API server refuses an object that this resource needs; the message is the server's own."
    SUSPENDED = "Suspended", "spec.suspend is true: the operator changes nothing, what runs goes on."
    # Progressing
    ROLLING_OUT = "RollingOut", "Pods are being replaced by ones of the current spec."
    ROLLOUT_BLOCKED = (
        "RolloutBlocked",
        "New pods cannot start; the message names the cause (InsufficientGPU) and the way out.",
    )
    TUNING_FIRST = (
        "TuningFirst",
        "The new model or engine is being tuned; the pods of the old one serve on until its profile is certified.",
    )
    PROFILE_REQUIRED = (
        "ProfileRequired",
        "The new model or engine has no certified profile, so the pods of the old one serve on; the message names the way out.",
    )
    ROLLOUT_COMPLETE = "RolloutComplete", "Pods and policy are as the spec wants them."
    POLICY_ROLLING_OUT = "PolicyRollingOut", "A policy is on its way: canary, analysis or promotion."
    # PolicyApplied
    APPLIED = "Applied", "Every pod routes by the wanted policy."
    EXACT_ROUTING = "ExactRouting", "Routing is exact, as the spec asks."
    OVERRIDDEN = "Overridden", "The kill switch is on: every pod routes exactly, whatever the spec wants."
    CANARY = "Canary", "Canary pods run the new policy; it is being compared with the one in force."
    AWAITING_APPROVAL = "AwaitingApproval", "The canary passed; rollout.approval is Manual and nobody has approved yet."
    PROMOTING = "Promoting", "The canary passed; the other pods are being switched."
    REJECTED = "Rejected", "The canary was measurably worse; this policy is not tried again for this model and engine."
    INCONCLUSIVE = "Inconclusive", "The canary saw too little to judge; the policy went back and is tried again later."
    ROLLED_BACK = "RolledBack", "Somebody gave this policy up; the one before it is in force."
    POLICY_STALE = "PolicyStale", "The profile was made for something else than what runs; routing is exact."
    PROFILE_MISSING = "ProfileMissing", "The wanted profile does not exist, or the one of that name has another digest."
    AWAITING_PROFILE = "AwaitingProfile", "Routing is exact until tuning has made a profile."
    APPLY_FAILED = "ApplyFailed", "A pod refused the policy; the message is the pod's own."
    # Tuned
    NOT_REQUESTED = "NotRequested", "routing.mode is not Tuned."
    CERTIFIED = "Certified", "A profile for what is running is certified within the limits."
    UNCERTIFIED = "Uncertified", "The profile is advisory: it was not certified and is not promoted by itself."
    TUNING = "Tuning", "The tuning job runs; serving goes on meanwhile."
    TUNING_BLOCKED = "TuningBlocked", "The tuning job cannot start; the message names the cause, such as no free GPU."
    # Outcomes of a tuning run, on Tuned, Feasible and Complete
    CHOSEN = "Chosen", "A policy was chosen and certified."
    INFEASIBLE = (
        "Infeasible",
        "No policy kept all limits, and the message names the nearest miss; or none could gain anything here, and it names the ceiling. "
        "The last good policy serves on.",
    )
    BUDGET_EXHAUSTED = "BudgetExhausted", "The budget ran out before anything was certified. The last good policy keeps serving."
    CANNOT_CERTIFY = (
        "CannotCertify",
        "The items cannot certify the accuracy limit: too few of them, or exact routing answers too few right.",
    )
    FAILED = "Failed", "The run ended in an error; the message is the tuner's own."
    PENDING = "Pending", "The run has not begun."
    RUNNING = "Running", "The run goes on."


_STRING = {"type": "string", "maxLength": 32768}
ConditionDict = Annotated[
    dict[str, Any],
    WithJsonSchema(
        {
            "type": "object",
            "description": "one statement about the resource, for the generation that was judged",
            "properties": {
                "type": {**_STRING, "maxLength": 316, "description": "of the condition"},
                "status": {"type": "string", "enum": ["True", "False", "Unknown"], "description": "whether it holds"},
                "reason": {**_STRING, "maxLength": 1024, "description": "why, as one word for programs"},
                "message": {**_STRING, "description": "why, and what happens next, for people"},
                "observedGeneration": {"type": "integer", "minimum": 0, "description": "of the spec that was judged"},
                "lastTransitionTime": {"type": "string", "format": "date-time", "description": "when status last changed"},
            },
            "required": ["type", "status", "reason", "message", "lastTransitionTime"],
        }
    ),
]
Conditions = Annotated[
    tuple[ConditionDict, ...],
    Field(
        max_length=16,
        description="what holds of the resource, one entry for each type",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    ),
]


def utc_now() -> datetime:
    return datetime.now(UTC)


def timestamp(moment: datetime) -> str:
    """RFC 3339 in UTC with whole seconds, as Kubernetes writes times."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def find_condition(conditions: Iterable[dict[str, Any]], kind: ConditionType | str) -> dict[str, Any] | None:
    return next((condition for condition in conditions if condition.get("type") == str(kind)), None)


def held_rollout(conditions: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The condition that says that pods wait for a profile (`rollout.requireProfile`), None if they do not."""
    found = find_condition(conditions, ConditionType.PROGRESSING)
    return found if found is not None and found.get("reason") in (Reason.TUNING_FIRST, Reason.PROFILE_REQUIRED) else None


def set_condition(
    conditions: Sequence[dict[str, Any]],
    kind: ConditionType | str,
    status: bool | None,
    reason: Reason | str,
    message: str,
    *,
    generation: int,
    now: datetime,
) -> list[dict[str, Any]]:
    """A new list in which condition `kind` says this; the others are as they were, in the same order.

    - It is not there yet: added at the end, `lastTransitionTime` is `now`.
    - It is there with the same status: reason, message and observedGeneration are replaced,
      `lastTransitionTime` stays, so that it names the time of the last change of the status.
    - It is there with another status: all is replaced, `lastTransitionTime` becomes `now`.

    Args:
        status: True, False, or None for "Unknown".
        generation: metadata.generation of the spec that was judged.
        now: an aware datetime. Where nothing changes, the result equals `conditions` whatever the clock says,
            so a quiet minute writes nothing.
    """
    shown = "Unknown" if status is None else str(status)
    old = find_condition(conditions, kind)
    since = old["lastTransitionTime"] if old and old.get("status") == shown else timestamp(now)
    new = {
        "type": str(kind),
        "status": shown,
        "reason": str(reason),
        "message": message,
        "observedGeneration": generation,
        "lastTransitionTime": since,
    }
    if old is None:
        return [*conditions, new]
    return [new if condition is old else condition for condition in conditions]
