"""`decide_tuning(snapshot) -> Plan`: what the operator does for one SereTuningJob. Pure."""

from __future__ import annotations

import copy

from sere_ext.contract.errors import SpecError
from sere_operator.api import meta
from sere_operator.api.common import parse_spec
from sere_operator.api.conditions import ConditionType, Reason, find_condition
from sere_operator.api.tuning import SereTuningJobSpec
from sere_operator.plan import status
from sere_operator.plan.objects import drift
from sere_operator.plan.objects.children import Defaults
from sere_operator.plan.objects.contested import Contested, keep
from sere_operator.plan.patch import merge_patch, without_none
from sere_operator.plan.snapshot import Event, Object, Plan, TuningSnapshot
from sere_operator.plan.times import stamp
from sere_operator.plan.tuning.objects import build, result_name, run_name
from sere_operator.plan.tuning.orphans import being_collected, not_ours, of_another_spec, orphaned, shards_taken_back
from sere_operator.plan.tuning.result import Result, read_result, suspended_by_us, waits_for_a_pod

_FEASIBLE = {"Chosen": True, "Infeasible": False}
POLL_S = 60.0
COLLECTED_POLL_S = 2.0
POD_POLL_S = 5.0


def decide_tuning(snapshot: TuningSnapshot, defaults: Defaults) -> Plan:
    """What to write now for one SereTuningJob. Once it has ended, nothing."""
    if snapshot.object["metadata"].get("deletionTimestamp"):
        return Plan()
    try:
        spec = parse_spec(SereTuningJobSpec, snapshot.spec)
    except SpecError as error:
        conditions = list(snapshot.status.get("conditions") or [])
        judgement = (False, Reason.INVALID_SPEC, str(error))
        conditions = status.with_condition(snapshot, conditions, ConditionType.COMPLETE, judgement)
        new = {**snapshot.status, "observedGeneration": snapshot.generation, "conditions": conditions}
        return Plan(status=merge_patch(new, snapshot.status), requeue_after=POLL_S)
    plan = Plan(requeue_after=POLL_S)
    if snapshot.status.get("outcome"):
        return plan
    bodies = build(snapshot, spec, defaults)
    foreign = not_ours(snapshot, bodies)
    if foreign is not None and not being_collected(snapshot, foreign):
        what = f"{foreign['kind']} {foreign['metadata']['name']} exists and is not ours; rename it or this job"
        _report(snapshot, spec, Result(None, Reason.INVALID_SPEC, what, {}, "refused"), plan)
        return plan
    if foreign is not None:
        waiting = Result(None, Reason.PENDING, "what an earlier run of this name left is being collected", {}, "waiting")
        _report(snapshot, spec, waiting, plan)
        plan.requeue_after = COLLECTED_POLL_S
        return plan
    left = of_another_spec(snapshot, bodies)
    if left is not None:
        what = f"{left['kind']} {left['metadata']['name']} is left of a run of this name with another spec"
        _report(snapshot, spec, Result(None, Reason.INVALID_SPEC, f"{what}; delete it or rename this job", {}, "refused"), plan)
        return plan
    result, contested = read_result(snapshot, spec), Contested.read(snapshot)
    plan.apply += shards_taken_back(snapshot)  # first: where the plan is cut off after them, the other orphans are still found
    for body in bodies:
        live = snapshot.child(body["kind"], body["metadata"]["name"])
        if result.outcome is None or orphaned(snapshot, live):
            _keep(snapshot, plan, contested, drift.stamped(body), live)
    for body in result.objects:
        if snapshot.child(body["kind"], body["metadata"]["name"]) is None:
            plan.apply.append(body)
    plan.events += contested.events
    if waits_for_a_pod(snapshot) and result.reason in (Reason.PENDING, Reason.TUNING_BLOCKED):
        plan.requeue_after = POD_POLL_S  # nothing that is watched tells that a Job's pods are refused
    _report(snapshot, spec, result, plan, contested.told())
    return plan


def _keep(snapshot: TuningSnapshot, plan: Plan, contested: Contested, body: Object, live: Object | None) -> None:
    """Apply what is missing or changed. A Job's template is immutable, so of a live Job only owner and `suspend` are set.

    A Job that a queue has suspended (such as Kueue) stays so until the queue lets it go: only what we suspended, which an
    annotation of ours tells, is resumed.
    """
    if body["metadata"]["name"] == result_name(snapshot.name):  # its content is the tuner's
        if drift.drift(body, live) is not None:
            plan.apply.append(body)
        return
    if live is None or body["kind"] != "Job":
        keep(plan, contested, body, live)
        return
    finished = any(
        c.get("status") == "True" for c in (live.get("status") or {}).get("conditions") or [] if c["type"] != "Suspended"
    )
    wanted, mine = bool(body["spec"]["suspend"]), suspended_by_us(live)
    changed = copy.deepcopy(live)
    if orphaned(snapshot, live):
        changed["metadata"]["ownerReferences"] = body["metadata"]["ownerReferences"]
    if not finished and wanted != (bool(live["spec"].get("suspend")) if wanted else mine):
        changed["metadata"].setdefault("annotations", {})[meta.SUSPENDED_ANNOTATION] = str(wanted).lower()
        changed["spec"]["suspend"] = wanted
    if changed != live:
        plan.replace.append(changed)


def _report(
    snapshot: TuningSnapshot, spec: SereTuningJobSpec, result: Result, plan: Plan, contested: list[Object] | None = None
) -> None:
    conditions = list(snapshot.status.get("conditions") or [])
    before = (find_condition(conditions, ConditionType.COMPLETE) or {}).get("reason")
    done = result.outcome is not None
    feasible = _FEASIBLE.get(result.outcome or "")
    for kind, judgement in (
        (ConditionType.COMPLETE, (done, result.reason, result.message)),
        (ConditionType.FEASIBLE, (feasible, result.reason, result.message)),
    ):
        conditions = status.with_condition(snapshot, conditions, kind, judgement)
    job_status = (snapshot.child("Job", run_name(snapshot.name)) or {}).get("status") or {}
    # A run that fails may tell no counters; what was counted before stays true.
    trials = {**(snapshot.status.get("trials") or {}), **result.trials}
    new = without_none(
        {
            "observedGeneration": snapshot.generation,
            "conditions": conditions,
            "trials": trials or None,
            "progress": f"{trials.get('completed', 0)}/{spec.tuning.trials}",
            "stage": result.stage,
            "outcome": result.outcome,
            "startTime": job_status.get("startTime") or snapshot.status.get("startTime"),
            "completionTime": stamp(snapshot.now) if done else None,
            "resultConfigMap": result_name(snapshot.name),
            "profile": result.profile,
            "contested": contested,
            **result.told,
        }
    )
    plan.status = merge_patch(new, snapshot.status)
    if result.reason in (Reason.TUNING_BLOCKED, Reason.INVALID_SPEC) and before != result.reason:
        plan.events.append(Event("Warning", result.reason.value, result.message))
    if done:
        plan.events.append(Event("Normal" if result.outcome == "Chosen" else "Warning", result.reason.value, result.message))
        if result.profile is not None:
            plan.events.append(Event("Normal", "ProfileMade", f"SereProfile {result.profile}"))
