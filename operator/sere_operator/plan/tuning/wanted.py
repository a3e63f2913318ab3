"""Mode Tuned: which SereTuningJob a SereDeployment wants, and which of its jobs go. Pure."""

from __future__ import annotations

from sere_ext.contract.errors import SpecError

from sere_operator.api import meta
from sere_operator.api.common import parse_spec
from sere_operator.api.deployment import RoutingMode, SereDeploymentSpec
from sere_operator.api.tuning import SereTuningJobSpec
from sere_operator.plan.objects import children
from sere_operator.plan.rollout.wanted import tuning_job_name
from sere_operator.plan.snapshot import Event, Object, Plan, Snapshot

# What a SereTuningJob copies from the SereDeployment.
_COPIED = (
    "model", "engine", "resources", "slo", "accuracy", "tuning", "volumes", "node_selector", "tolerations", "runtime_class_name",
)  # fmt: skip


def plan_tuning(snapshot: Snapshot, spec: SereDeploymentSpec, plan: Plan) -> None:
    """Add to `plan` what mode Tuned needs: one SereTuningJob for this spec, begun once a pod answers.

    Serving gets the first accelerator, so a run waits for a pod that answers. Jobs of other specs that have not ended are
    deleted, and so is a job that failed and would now be given something else.

    Args:
        spec: with the engine image that the pods get (`revision.effective`).
    """
    current = tuning_job_name(snapshot.name, spec) if spec.routing.mode is RoutingMode.TUNED else None
    for job in snapshot.tuning_jobs:
        outcome, name = (job.get("status") or {}).get("outcome"), job["metadata"]["name"]
        again = name == current and outcome == "Failed" and _given_otherwise(job, spec)
        if ((name != current and outcome is None) or again) and not job["metadata"].get("deletionTimestamp"):
            plan.delete.append(job)
            if again:
                plan.events.append(Event("Normal", "TuningAgain", f"{name} failed; with what the spec gives now it begins anew"))
    if current is None or any(job["metadata"]["name"] == current for job in snapshot.tuning_jobs):
        return
    if any(pod.ready for pod in snapshot.live_pods):
        plan.apply.append(tuning_job(snapshot.object, spec, current))
        plan.events.append(Event("Normal", "TuningStarted", f"SereTuningJob {current} searches a policy; serving goes on"))


def _given_otherwise(job: Object, spec: SereDeploymentSpec) -> bool:
    """Whether a run would now have what its name does not tell: another claim for its study, other nodes, other volumes."""
    try:
        then = parse_spec(SereTuningJobSpec, job["spec"])
    except SpecError:
        return False
    fields = ("volumes", "node_selector", "tolerations", "runtime_class_name")
    storage = spec.tuning.storage if spec.tuning is not None else None
    return then.tuning.storage != storage or any(getattr(then, field) != getattr(spec, field) for field in fields)


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
