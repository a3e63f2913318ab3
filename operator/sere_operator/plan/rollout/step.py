"""Where a policy rollout stands. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from sere_operator.api.conditions import Reason
from sere_operator.plan.snapshot import Event, Object

POLL_S = 2.0  # while something is under way


@dataclass(frozen=True)
class Step:
    """Where the rollout stands after one snapshot.

    stable      digest for the policy ConfigMap
    pod_policy  digest for the annotation of the pods named; the others have none
    rollout     `status.rollout` to be, None: nothing under way
    in_turns    pods on which the candidate and the stable policy take turns: either is right at any moment
    misfits     pods that the stable policy was not made for, by name, with the reason: they route exactly
    applied     condition PolicyApplied: True, False, and why
    """

    stable: str
    pod_policy: dict[str, str] = field(default_factory=dict)
    rollout: Object | None = None
    in_turns: frozenset[str] = frozenset()
    misfits: dict[str, str] = field(default_factory=dict)
    rejected: tuple[Object, ...] = ()
    previous: str | None = None
    applied: bool = False
    reason: Reason = Reason.POLICY_STALE
    message: str = ""
    events: tuple[Event, ...] = ()
    requeue_after: float | None = None
