"""`decide_tuning(snapshot) -> Plan`: what the operator does for one SereTuningJob. Pure."""

from __future__ import annotations

from sere_ext.contract.errors import SpecError
from sere_operator.api import meta
from sere_operator.api.common import parse_spec
from sere_operator.api.conditions import ConditionType, Reason, find_condition
from sere_operator.api.tuning import SereTuningJobSpec
from sere_operator.plan import status
from sere_operator.plan.objects import children, drift
from sere_operator.plan.objects.children import Defaults
from sere_operator.plan.patch import merge_patch, without_none
from sere_operator.plan.snapshot import Event, Object, Plan, TuningSnapshot
from sere_operator.plan.times import stamp
from sere_operator.plan.tuning.objects import build, result_name, result_names, run_name
from sere_operator.plan.tuning.result import Result, read_result, suspended_by_us

_FEASIBLE = {"Chosen": True, "Infeasible": False}
POLL_S = 60.0
COLLECTED_POLL_S = 2.0


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
    foreign = _not_ours(snapshot, bodies)
    if foreign is not None and not _of_an_earlier_run(snapshot, foreign):
        what = f"{foreign['kind']} {foreign['metadata']['name']} exists and is not ours; rename it or this job"
        _report(snapshot, spec, Result(None, Reason.INVALID_SPEC, what, {}, "refused"), plan)
        return plan
    if foreign is not None:
        waiting = Result(None, Reason.PENDING, "what an earlier run of this name left is being collected", {}, "waiting")
        _report(snapshot, spec, waiting, plan)
        plan.requeue_after = COLLECTED_POLL_S
        return plan
    result = read_result(snapshot, spec)
    for body in bodies if result.outcome is None else ():
        _keep(plan, drift.stamped(body), snapshot.child(body["kind"], body["metadata"]["name"]))
    for body in result.objects:
        if snapshot.child(body["kind"], body["metadata"]["name"]) is None:
            plan.apply.append(body)
    _report(snapshot, spec, result, plan)
    return plan


def _not_ours(snapshot: TuningSnapshot, bodies: list[Object]) -> Object | None:
    """The first live object of a name that this run writes, or lets its tuner write, and that this run did not make.

    Objects left by an earlier run of the same name come last, since those go away by themselves.
    """
    names = [(body["kind"], body["metadata"]["name"]) for body in bodies]
    names += [("ConfigMap", name) for name in result_names(snapshot.name)]
    live = [child for key in names if (child := snapshot.child(*key)) is not None]
    foreign = [child for child in live if not children.owned(snapshot.object, child)]
    return min(foreign, key=lambda child: _of_an_earlier_run(snapshot, child), default=None)


def _of_an_earlier_run(snapshot: TuningSnapshot, live: Object) -> bool:
    """Whether a child still belongs to a deleted SereTuningJob of the same name: to adopt it would be to read its old result."""
    owners = live["metadata"].get("ownerReferences") or []
    return any(
        owner.get("controller") and owner.get("kind") == meta.TUNING_JOB_KIND and owner.get("name") == snapshot.name
        for owner in owners
    )


def _keep(plan: Plan, body: Object, live: Object | None) -> None:
    """Apply what is missing or changed. A Job's template is immutable, so of a live Job only `suspend` is set.

    A Job that a queue has suspended (such as Kueue) stays so until the queue lets it go: only what we suspended, which an
    annotation of ours tells, is resumed.
    """
    if live is None or body["kind"] != "Job":
        if drift.drift(body, live) is not None:
            plan.apply.append(body)
        return
    finished = any(
        c.get("status") == "True" for c in (live.get("status") or {}).get("conditions") or [] if c["type"] != "Suspended"
    )
    wanted, mine = bool(body["spec"]["suspend"]), suspended_by_us(live)
    if finished or wanted == (bool(live["spec"].get("suspend")) if wanted else mine):
        return
    annotations = {**(live["metadata"].get("annotations") or {}), meta.SUSPENDED_ANNOTATION: str(wanted).lower()}
    resumed = {**live, "metadata": {**live["metadata"], "annotations": annotations}}
    plan.replace.append({**resumed, "spec": {**live["spec"], "suspend": wanted}})


def _report(snapshot: TuningSnapshot, spec: SereTuningJobSpec, result: Result, plan: Plan) -> None:
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
