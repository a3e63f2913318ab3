"""What a look at a policy rollout leads to, and how `status.rollout` tells time. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime

from sere_operator.api.conditions import Reason, timestamp
from sere_operator.plan.snapshot import Event, Object

POLL_S = 2.0  # while something is under way


@dataclass(frozen=True)
class Step:
    """Where the rollout stands after looking at a snapshot.

    stable      digest for the policy ConfigMap
    pod_policy  digest for the annotation of the pods named; the others have none
    rollout     `status.rollout` to be, None: nothing under way
    in_turns    pods on which the candidate and the stable policy take turns: either is right at any moment
    applied     condition PolicyApplied: True, False, and why
    """

    stable: str
    pod_policy: dict[str, str] = field(default_factory=dict)
    rollout: Object | None = None
    in_turns: frozenset[str] = frozenset()
    rejected: tuple[Object, ...] = ()
    previous: str | None = None
    applied: bool = False
    reason: Reason = Reason.POLICY_STALE
    message: str = ""
    events: tuple[Event, ...] = ()
    requeue_after: float | None = None


def seconds(text: str | None) -> float:
    """RFC 3339 to seconds since the epoch; 0 for none."""
    return datetime.fromisoformat(text).timestamp() if text else 0.0


def stamp(now: float) -> str:
    return timestamp(datetime.fromtimestamp(now, UTC))
