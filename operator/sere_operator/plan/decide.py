"""`decide(snapshot) -> Plan`: everything that the operator does for one SereDeployment. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sere_ext.contract.errors import SpecError
from sere_ext.contract.policy import EXACT, EXACT_POLICY
from sere_operator.api.common import parse_spec
from sere_operator.api.conditions import Reason
from sere_operator.api.deployment import SereDeploymentSpec
from sere_operator.plan import status
from sere_operator.plan.chain import first
from sere_operator.plan.objects import children, drift
from sere_operator.plan.objects.children import Defaults
from sere_operator.plan.objects.contested import Contested, keep
from sere_operator.plan.objects.revision import effective, kept, replacing
from sere_operator.plan.objects.volume import (
    PolicyEntry,
    fit,
    policy_config_map,
    recovered_entry,
    shard_config_maps,
    stable_digest,
    switched,
    too_large,
)
from sere_operator.plan.patch import merge_patch, without_none
from sere_operator.plan.rollout.advance import advance
from sere_operator.plan.rollout.annotations import override_patch, pod_patch
from sere_operator.plan.rollout.step import Step
from sere_operator.plan.rollout.tuning_first import held
from sere_operator.plan.rollout.wanted import Wanted, all_misfit, blocked, misfits, overridden, wanted
from sere_operator.plan.snapshot import Event, Object, Plan, Snapshot
from sere_operator.plan.status import Case
from sere_operator.plan.tuning.wanted import plan_tuning

IDLE_POLL_S = 45.0  # how often pods are asked when nothing is going on
STARTING_POLL_S = 2.0


def decide(snapshot: Snapshot, defaults: Defaults) -> Plan:
    """What to write now for this SereDeployment: the answer of the first of `CHECKS` that has one.

    Args:
        snapshot: whole, which `needs` tells.
        defaults: what the operator was installed with.
    """
    return first(CHECKS, snapshot, defaults) or Plan()


def being_deleted(snapshot: Snapshot, defaults: Defaults) -> Plan | None:
    """Nothing is written: owner references let the garbage collector take the children."""
    return Plan() if snapshot.object["metadata"].get("deletionTimestamp") else None


def spec_cannot_be_read(snapshot: Snapshot, defaults: Defaults) -> Plan | None:
    """The status names the field; nothing but the kill switch is touched."""
    try:
        parse_spec(SereDeploymentSpec, snapshot.spec)
    except SpecError as error:
        return _only_status(snapshot, Reason.INVALID_SPEC, str(error))
    return None


def suspended(snapshot: Snapshot, defaults: Defaults) -> Plan | None:
    """The status says so; nothing but the kill switch is touched."""
    if not parse_spec(SereDeploymentSpec, snapshot.spec).suspend:
        return None
    return _only_status(snapshot, Reason.SUSPENDED, "spec.suspend is true: the operator changes nothing, what runs goes on")


def name_is_taken(snapshot: Snapshot, defaults: Defaults) -> Plan | None:
    """Somebody else's object has a child's name: the status names the object; nothing but the kill switch is touched."""
    spec = parse_spec(SereDeploymentSpec, snapshot.spec)
    autoscaled = children.autoscaler(snapshot.object, spec) is not None
    needed = [child for kind, child in snapshot.children.items() if kind != "HorizontalPodAutoscaler" or autoscaled]
    taken = next((child for child in (*needed, *snapshot.shards.values()) if not children.ours(snapshot.object, child)), None)
    if taken is None:
        return None
    what = f"{taken['kind']} {taken['metadata']['name']}"
    return _only_status(snapshot, Reason.INVALID_SPEC, f"{what} exists and is not ours; rename it or this resource")


def carried_out(snapshot: Snapshot, defaults: Defaults) -> Plan | None:
    """Policy, pods, children, tuning and status as the spec wants them."""
    spec = effective(parse_spec(SereDeploymentSpec, snapshot.spec), defaults.engine_image)
    choice = _choose(snapshot, spec)
    deployment = children.deployment(snapshot.object, spec, defaults, first="Deployment" not in snapshot.children)
    template = deployment["spec"]["template"]
    hold = held(snapshot, spec, choice.wanted, choice.stable, template)
    if hold is not None:
        deployment = kept(deployment, snapshot.children["Deployment"])
    step = advance(snapshot, spec, choice.wanted, choice.stable)
    entries = _entries(snapshot, step, choice.known)
    if step.stable != EXACT and step.stable not in entries:
        step = replace(step, stable=EXACT)  # `stable` must never name what is not there: pods would keep what they have
    key = entries[step.stable].key if step.stable in entries else None
    step = replace(step, misfits=misfits(snapshot, key) if key is not None else {})
    plan, contested = Plan(), Contested.read(snapshot)
    _plan_objects(snapshot, spec, step, entries, deployment, plan, contested)
    runs = plan_tuning(snapshot, spec, plan)
    case = Case(snapshot, spec, choice.wanted, step, hold)
    new = without_none({**status.build(case), "tuningRuns": runs or None, "contested": contested.told()})
    plan.status = merge_patch(new, snapshot.status)
    plan.events += [*step.events, *contested.events, *_transitions(snapshot, new)]
    plan.requeue_after = IDLE_POLL_S if hold is not None and step.requeue_after is None else _requeue(snapshot, new, step)
    return plan


CHECKS = (being_deleted, spec_cannot_be_read, suspended, name_is_taken, carried_out)


def _only_status(snapshot: Snapshot, reason: Reason, message: str) -> Plan:
    """The status, and the kill switch: it works whatever the spec says, and while nothing else may be changed."""
    new = status.problem(snapshot, reason, message)
    plan = Plan(status=merge_patch(without_none(new), snapshot.status), requeue_after=IDLE_POLL_S)
    live, on = snapshot.children.get("ConfigMap"), overridden(snapshot)
    body = switched(snapshot.object, live, on) if live is not None and children.owned(snapshot.object, live) else None
    if body is not None:
        plan.apply.append(drift.stamped(body))
    plan.pods = [patch for pod in snapshot.live_pods if (patch := override_patch(pod, on)) is not None]
    return plan


# ---- the policy --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choice:
    """The wanted policy, the digest of the one in force, and the policies that can be written to the volume, by digest."""

    wanted: Wanted
    stable: str
    known: dict[str, PolicyEntry]


def _choose(snapshot: Snapshot, spec: SereDeploymentSpec) -> Choice:
    chosen = wanted(snapshot, spec)
    stable = stable_digest(snapshot)
    recovered = recovered_entry(snapshot, stable)
    if not chosen.blocked and (why := too_large(chosen.entry)) is not None:
        chosen = blocked(chosen, f"policy {chosen.digest} cannot be rolled out: {why}")
    if not chosen.blocked and not fit((recovered, chosen.entry)):
        room = "are too large to be held together; to change over, set spec.routing.mode: Exact until that is applied"
        chosen = blocked(chosen, f"the similarity artefacts of policy {chosen.digest} and of the one in force {room}")
    known = {EXACT: PolicyEntry(EXACT_POLICY), **({} if chosen.blocked else {chosen.digest: chosen.entry})}
    if stable not in known and recovered is None:
        stable = EXACT  # the ConfigMap was lost: exact is always right, and the wanted policy comes by its canary again
    refused = recovered is not None and recovered.key is not None and all_misfit(snapshot, recovered.key)
    if refused and replacing(snapshot) is None and (chosen.blocked or chosen.digest != EXACT):
        # The policy in force is of the engine before, so that all pods refuse it; a wanted policy of the same digest
        # needs a canary on the pods of this engine.
        stable = EXACT
    return Choice(chosen, stable, known)


def _entries(snapshot: Snapshot, step: Step, known: dict[str, PolicyEntry]) -> dict[str, PolicyEntry]:
    """The policies that the volume is to hold, by digest, as far as their artefacts fit.

    The policy that was in force before comes last: where there is no room for its artefact, going back to it means exact
    routing.
    """
    entries: dict[str, PolicyEntry] = {}
    candidate = (step.rollout or {}).get("candidate")
    for digest in (step.stable, *step.pod_policy.values(), candidate or EXACT, step.previous or EXACT):
        entry = known.get(digest) or recovered_entry(snapshot, digest)
        if entry is not None and digest != EXACT and fit((*entries.values(), entry)):
            entries[digest] = entry
    return entries


# ---- the objects -------------------------------------------------------------------------------------------------


def _plan_objects(
    snapshot: Snapshot,
    spec: SereDeploymentSpec,
    step: Step,
    entries: dict[str, PolicyEntry],
    deployment: Object,
    plan: Plan,
    contested: Contested,
) -> None:
    """Children in the order in which they need each other, the hand-over of `replicas`, deletions, and pods' annotations."""
    owner = snapshot.object
    config_map = drift.stamped(policy_config_map(owner, step.stable, overridden(snapshot), entries, spec.slo))
    shards = [drift.stamped(body) for body in shard_config_maps(owner, snapshot.shards, entries.values())]
    wanted_bodies = [deployment, children.service(owner), children.disruption_budget(owner, spec)]
    autoscaler = children.autoscaler(owner, spec)
    if autoscaler is not None:
        wanted_bodies.append(autoscaler)
    for body in shards:  # before the policies that need them
        keep(plan, contested, body, snapshot.shards.get(body["metadata"]["name"]))
    for body in (config_map, *map(drift.stamped, wanted_bodies)):
        keep(plan, contested, body, snapshot.children.get(body["kind"]))
    handed_over = children.replicas_handed_over(spec, snapshot.children.get("Deployment"))
    if handed_over is not None:
        plan.hand_over.append(handed_over)
    live_autoscaler = snapshot.children.get("HorizontalPodAutoscaler")
    if autoscaler is None and live_autoscaler is not None and children.owned(owner, live_autoscaler):
        plan.delete.append(live_autoscaler)
    needed = {body["metadata"]["name"] for body in shards}
    plan.delete += [live for name, live in snapshot.shards.items() if name not in needed]
    plan.pods = [patch for pod in snapshot.live_pods if (patch := pod_patch(snapshot, step, config_map, pod)) is not None]


# ---- status and events -------------------------------------------------------------------------------------------


# Reasons that are too common for an event, or that the rollout posts an event of its own for.
_SILENT = frozenset({
    Reason.STARTING, Reason.NOT_REQUESTED, Reason.PODS_NOT_READY, Reason.POLICY_PENDING, Reason.CANARY, Reason.PROMOTING,
    Reason.REJECTED, Reason.INCONCLUSIVE, Reason.AWAITING_APPROVAL, Reason.PENDING, Reason.TUNING,
})  # fmt: skip
_WARNINGS = frozenset({
    Reason.ROLLOUT_BLOCKED, Reason.FAILED, Reason.INFEASIBLE, Reason.NOT_ROUTABLE, Reason.POLICY_STALE, Reason.TUNING_BLOCKED,
    Reason.PROFILE_REQUIRED,
})  # fmt: skip


def _transitions(snapshot: Snapshot, new: Object) -> list[Event]:
    """One event when Ready or Tuned change their status or reason."""
    events = []
    before = {c["type"]: (c["status"], c["reason"]) for c in snapshot.status.get("conditions") or []}
    for condition in new["conditions"]:
        kind, reason = condition["type"], condition["reason"]
        if kind not in ("Ready", "Tuned") or before.get(kind) == (condition["status"], reason) or reason in _SILENT:
            continue
        events.append(Event("Warning" if reason in _WARNINGS else "Normal", reason, condition["message"]))
    return events


def _requeue(snapshot: Snapshot, new: Object, step: Step) -> float:
    """Seconds until the next look without an event: sooner while something is under way, or Ready is not true."""
    ready = next(c for c in new["conditions"] if c["type"] == "Ready")
    waits = [IDLE_POLL_S]
    if step.requeue_after is not None:
        waits.append(step.requeue_after)
    if ready["status"] != "True" and any(pod.ready for pod in snapshot.live_pods):
        waits.append(STARTING_POLL_S)
    elif ready["status"] != "True":
        waits.append(5.0)
    return min(waits)
