"""Mode Tuned: which SereTuningJob a SereDeployment wants, which of its jobs go, and which runs it remembers. Pure.

A run is remembered in `status.tuningRuns`, so that deleting its SereTuningJob spends no budget anew.
"""

from __future__ import annotations

from sere_ext.contract.errors import SpecError
from sere_operator.api import meta
from sere_operator.api.common import parse_spec
from sere_operator.api.conditions import ConditionType, find_condition
from sere_operator.api.deployment import RoutingMode, SereDeploymentSpec
from sere_operator.api.deployment_status import MAX_RUNS
from sere_operator.api.tuning import SereTuningJobSpec
from sere_operator.plan.objects import children
from sere_operator.plan.rollout.wanted import tuning_job_name
from sere_operator.plan.snapshot import Event, Object, Plan, Snapshot

# What a SereTuningJob copies from the SereDeployment.
_COPIED = (
    "model", "engine", "resources", "slo", "accuracy", "tuning", "volumes", "node_selector", "tolerations", "runtime_class_name",
)  # fmt: skip
HISTORY = 3  # SereTuningJobs of other specs that are kept after they have ended

Runs = dict[str, Object]  # by the SereTuningJob's name, oldest first


def plan_tuning(snapshot: Snapshot, spec: SereDeploymentSpec, plan: Plan) -> list[Object]:
    """Add to `plan` what mode Tuned needs; returns the runs to remember.

    One SereTuningJob for this spec is begun once a pod answers, since serving gets the first accelerator. A run that has
    begun is never begun again by itself, also where its job was deleted: that is asked for by annotation.

    Args:
        spec: with the engine image that the pods get (`revision.effective`).
    """
    current = tuning_job_name(snapshot.name, spec) if spec.routing.mode is RoutingMode.TUNED else None
    runs = _known(snapshot)
    asked = snapshot.annotations.get(meta.RETUNE_ANNOTATION, "")
    asks_again = current is not None and asked.split("/")[0] == current and asked != runs.get(current, {}).get("asked", "")
    _clean_up(snapshot, spec, current, plan, runs, asks_again=asks_again)
    live = {job["metadata"]["name"]: job for job in snapshot.tuning_jobs}
    if current is not None and current in live:
        if not children.owned(snapshot.object, live[current]):  # orphaned: it is taken back as it is
            plan.apply.append({**tuning_job(snapshot.object, spec, current), "spec": live[current]["spec"]})
    elif current is not None:
        _begin(snapshot, spec, current, plan, runs, asked if asks_again else None)
    return list(runs.values())[-MAX_RUNS:]


def _known(snapshot: Snapshot) -> Runs:
    """The remembered runs, with what their jobs say by now."""
    runs: Runs = {run["name"]: run for run in snapshot.status.get("tuningRuns") or []}
    for job in snapshot.tuning_jobs:
        status, name = job.get("status") or {}, job["metadata"]["name"]
        complete = find_condition(status.get("conditions") or [], ConditionType.COMPLETE) or {}
        told = {key: status.get(key) for key in ("outcome", "profile", "deviceHours", "startTime")}
        message = str(complete.get("message") or "")[:512] if status.get("outcome") else None
        told = {key: value for key, value in {**told, "message": message}.items() if value}
        runs[name] = {**runs.get(name, {}), "name": name, **told}
    return runs


def _clean_up(
    snapshot: Snapshot, spec: SereDeploymentSpec, current: str | None, plan: Plan, runs: Runs, *, asks_again: bool
) -> None:
    """Delete jobs of other specs that have not ended, those of long ago, and this spec's where it is to begin anew."""
    ended = []
    for job in snapshot.tuning_jobs:
        outcome, name = (job.get("status") or {}).get("outcome"), job["metadata"]["name"]
        if job["metadata"].get("deletionTimestamp"):
            continue
        otherwise = name == current and outcome == "Failed" and _given_otherwise(job, spec)
        if otherwise:
            plan.events.append(Event("Normal", "TuningAgain", f"{name} failed; with what the spec gives now it begins anew"))
        if otherwise or (name != current and outcome is None):
            plan.delete.append(job)
            runs.pop(name, None)
        elif name == current and outcome is not None and asks_again:
            plan.delete.append(job)
        elif name != current:
            ended.append(job)
    ended.sort(key=lambda job: str(job["metadata"].get("creationTimestamp", "")))
    plan.delete += ended[: max(0, len(ended) - HISTORY)]


def _begin(snapshot: Snapshot, spec: SereDeploymentSpec, name: str, plan: Plan, runs: Runs, asked: str | None) -> None:
    run = runs.get(name, {})
    if run.get("outcome") and asked is None:
        return
    if run.get("startTime") and not run.get("outcome") and asked is None:
        again = f"tune again with annotation {meta.RETUNE_ANNOTATION}={name}"
        runs[name] = {**run, "outcome": "Failed", "message": f"SereTuningJob {name} was deleted before it had ended; {again}"}
        return
    if any(pod.ready for pod in snapshot.live_pods):
        plan.apply.append(tuning_job(snapshot.object, spec, name))
        plan.events.append(Event("Normal", "TuningStarted", f"SereTuningJob {name} searches a policy; serving goes on"))
        runs.pop(name, None)
        runs[name] = {"name": name, **({"asked": asked} if asked else {})}


def _given_otherwise(job: Object, spec: SereDeploymentSpec) -> bool:
    """Whether a run would now have what its name does not tell: another claim for its study, nodes, volumes, or pod template."""
    try:
        then = parse_spec(SereTuningJobSpec, job["spec"])
    except SpecError:
        return False
    fields = ("volumes", "node_selector", "tolerations", "runtime_class_name")
    now = spec.tuning
    kept = now is not None and (then.tuning.storage, then.tuning.pod_template) == (now.storage, now.pod_template)
    return not kept or any(getattr(then, field) != getattr(spec, field) for field in fields)


def tuning_job(owner: Object, spec: SereDeploymentSpec, name: str) -> Object:
    """The SereTuningJob of that name: an immutable copy of what is tuned."""
    names = {SereDeploymentSpec.model_fields[field].alias or field for field in _COPIED}
    body = {key: value for key, value in spec.to_json_dict().items() if key in names}
    body["engine"] = {key: value for key, value in body.get("engine", {}).items() if key != "apiKeySecret"}  # it serves nobody
    return {
        "apiVersion": meta.API_VERSION,
        "kind": meta.TUNING_JOB_KIND,
        "metadata": children.metadata(owner, name, meta.TUNER_COMPONENT),
        "spec": {"deployment": owner["metadata"]["name"], **body},
    }
