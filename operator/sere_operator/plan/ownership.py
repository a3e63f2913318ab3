"""Which operator looks after a resource, where several releases can see it. Pure.

The first one writes its name into `status.operator`, and any other leaves the resource alone. A name may be of a release that
was uninstalled, so another one may ask: it writes itself into `status.challenger`. The owner, if it lives, takes that out;
if nobody has for CHALLENGE_S, the resource changes hands. So an operator that is alone writes nothing for this beyond its
name, and none needs rights in the other's namespace.
"""

from __future__ import annotations

from sere_operator.api import meta
from sere_operator.plan.patch import merge_patch, merged
from sere_operator.plan.snapshot import Event, Plan, Resource
from sere_operator.plan.times import seconds, stamp

CHALLENGE_S = 120.0  # a new leader takes over from a lost one much sooner
YIELD_S = 600.0


def yielded(resource: Resource, instance: str, may_challenge: bool) -> Plan | None:
    """What to write about a resource that another operator looks after, None if this one does.

    Args:
        instance: this operator, `namespace/lease`; the replicas of one release share it.
        may_challenge: whether the owner may be asked; once in a while, or the two would write for ever.
    """
    owner = resource.status.get("operator")
    if owner in (None, instance):
        return None
    challenger = resource.status.get("challenger") or {}
    if challenger.get("name") == instance:
        waited = resource.now - seconds(challenger.get("since"))
        return None if waited >= CHALLENGE_S else Plan(requeue_after=max(1.0, CHALLENGE_S - waited))
    if challenger or not may_challenge:
        return Plan(requeue_after=YIELD_S)
    kind = str(resource.object["kind"])
    what = "SereDeployment" if kind == meta.DEPLOYMENT_KIND else kind
    words = f"operator {owner} looks after this {what}, so {instance} leaves it alone; give each release namespaces of its own"
    asked = {"challenger": {"name": instance, "since": stamp(resource.now)}}
    return Plan(status=asked, events=[Event("Warning", "NotOurs", words)], requeue_after=CHALLENGE_S)


def marked(resource: Resource, plan: Plan, instance: str) -> Plan:
    """The plan with this operator's name in the status, and without a challenger: whoever asked learns that this one lives."""
    if resource.object["metadata"].get("deletionTimestamp"):
        return plan
    wanted = {**merged(resource.status, plan.status or {}), "operator": instance}
    wanted.pop("challenger", None)
    before = resource.status.get("operator")
    if before not in (None, instance):
        words = f"{instance} looks after this resource now; {before} has not answered for {CHALLENGE_S:.0f} s"
        plan.events.append(Event("Normal", "TakenOver", words))
    plan.status = merge_patch(wanted, resource.status)
    return plan
