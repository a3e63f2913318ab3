"""What a resource's status says when the API server refuses one of its objects. Pure.

An admission policy, a quota, a name that is too long, an immutable field, a webhook that is down, rights that were taken
away: none of them is known to `decide`, all of them are known to the server, and its sentence is what helps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sere_operator.api import meta
from sere_operator.api.conditions import ConditionType, Reason, find_condition
from sere_operator.plan import status
from sere_operator.plan.patch import merge_patch, merged
from sere_operator.plan.snapshot import Event, Plan, Resource

RETRY_S = 30.0  # until a refused write is tried again without an event
# What can be refused without making the writes after it wrong. Without its ConfigMaps a pod must not get the order to run a policy, and
# a tuning job must not spend anything before its tuner may publish.
INDEPENDENT = frozenset({"Deployment", "Service", "PodDisruptionBudget", "HorizontalPodAutoscaler", meta.TUNING_JOB_KIND})


@dataclass(frozen=True)
class Refusal:
    """One object that the API server did not take, and its own sentence about that."""

    kind: str
    name: str
    words: str

    @property
    def ends_the_plan(self) -> bool:
        """Whether the plan's other writes must wait for this one."""
        return self.kind not in INDEPENDENT

    def __str__(self) -> str:
        return f"the API server refuses {self.kind} {self.name}: {self.words}"


def refused(resource: Resource, plan: Plan, refusals: Sequence[Refusal]) -> Plan:
    """What is left of a plan after refusals: its status, with the condition that users wait for False, and one Warning.

    Where the plan ended with a refusal its own status is dropped, since it describes writes that were not done.
    """
    kind = ConditionType.COMPLETE if resource.object.get("kind") == meta.TUNING_JOB_KIND else ConditionType.READY
    message = "; ".join(map(str, refusals))[:1024]
    live = list(resource.status.get("conditions") or [])
    judged = find_condition(status.with_condition(resource, live, kind, (False, Reason.REFUSED, message)), kind)
    assert judged is not None
    ended = any(refusal.ends_the_plan for refusal in refusals)
    new = resource.status if ended else merged(resource.status, plan.status or {})
    conditions = [condition for condition in new.get("conditions") or [] if condition["type"] != kind]
    places = {condition["type"]: index for index, condition in enumerate(live)}
    conditions = sorted([*conditions, judged], key=lambda condition: places.get(condition["type"], len(places)))
    new = {**new, "observedGeneration": resource.generation, "conditions": conditions}
    known = find_condition(live, kind) or {}
    again = (known.get("reason"), known.get("message")) == (Reason.REFUSED, message)
    events = [] if again else [Event("Warning", Reason.REFUSED.value, message)]
    waits = RETRY_S if plan.requeue_after is None else min(RETRY_S, plan.requeue_after)
    return Plan(status=merge_patch(new, resource.status), events=events, requeue_after=waits)
