"""`decide(snapshot) -> Plan`: everything that the operator does for one SereDeployment, as one checklist. Pure."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace

from sere_ext.contract.errors import SereError
from sere_ext.contract.policy import EXACT_POLICY, Policy, canonical_json
from sere_ext.contract.profile import ProfileKey

from sere_operator.api import meta
from sere_operator.api.common import SpecError, parse_spec
from sere_operator.api.conditions import Reason
from sere_operator.api.deployment import RoutingMode, SereDeploymentSpec
from sere_operator.api.tuning import SereTuningJobSpec
from sere_operator.plan import status
from sere_operator.plan.objects import children, drift
from sere_operator.plan.objects import revision as engine
from sere_operator.plan.objects import volume as policies
from sere_operator.plan.objects.children import Defaults
from sere_operator.plan.objects.volume import PolicyEntry
from sere_operator.plan.rollout import advance as rollout
from sere_operator.plan.rollout import tuning_first
from sere_operator.plan.rollout import wanted as routing
from sere_operator.plan.rollout.step import Step
from sere_operator.plan.rollout.wanted import EXACT, Wanted
from sere_operator.plan.snapshot import Event, Object, Plan, PodPatch, PodView, Snapshot

IDLE_POLL_S = 45.0  # how often pods are asked when nothing is going on
STARTING_POLL_S = 2.0
REFRESH_AGAIN_S = 15.0  # a pod that does not show its policy so long after the last refresh gets another nonce


def decide(snapshot: Snapshot, defaults: Defaults) -> Plan:
    """What to write now.

    1. being deleted           nothing: owner references let the garbage collector take the children
    2. spec cannot be read     say so, touch nothing
    3. suspended               say so, touch nothing
    4. a child's name is taken by somebody else's object: say so, touch nothing
    5. otherwise               policy, pods, children, tuning, status
    """
    if snapshot.object["metadata"].get("deletionTimestamp"):
        return Plan()
    try:
        spec = parse_spec(SereDeploymentSpec, snapshot.spec)
    except SpecError as error:
        return _say(snapshot, Reason.INVALID_SPEC, str(error))
    if spec.suspend:
        return _say(snapshot, Reason.SUSPENDED, "spec.suspend is true: the operator changes nothing, what runs goes on")
    autoscaled = children.autoscaler(snapshot.object, spec) is not None
    wanted = {kind: child for kind, child in snapshot.children.items() if kind != "HorizontalPodAutoscaler" or autoscaled}
    taken = next(
        (child for child in (*wanted.values(), *snapshot.shards.values()) if not children.owned(snapshot.object, child)), None
    )
    if taken is not None:
        what = f"{taken['kind']} {taken['metadata']['name']}"
        return _say(snapshot, Reason.INVALID_SPEC, f"{what} exists and is not ours; rename it or this resource")
    return _carry_out(snapshot, engine.effective(snapshot, spec, defaults.engine_image), defaults)


def _say(snapshot: Snapshot, reason: Reason, message: str) -> Plan:
    new = status.problem(snapshot, reason, message)
    return Plan(status=status.merge_patch(status.without_none(new), snapshot.status), requeue_after=IDLE_POLL_S)


def stable_digest(snapshot: Snapshot) -> str:
    """What pods without an annotation run: the ConfigMap's word, else (it was deleted) the status's, else exact."""
    held = (snapshot.children.get("ConfigMap") or {}).get("data") or {}
    digest = held.get(meta.STABLE_KEY) or (snapshot.status.get("policy") or {}).get("stable") or EXACT
    return str(digest)


def recovered_entry(snapshot: Snapshot, digest: str) -> PolicyEntry | None:
    """A policy as the live ConfigMaps hold it, None if it is not there whole."""
    if digest == EXACT:
        return PolicyEntry(EXACT_POLICY)
    data = (snapshot.children.get("ConfigMap") or {}).get("data") or {}
    try:
        policy = Policy.parse(data[f"{digest}.json"])
        key = ProfileKey.model_validate_json(data[f"{digest}.key.json"]) if f"{digest}.key.json" in data else None
    except (KeyError, ValueError, SereError):
        return None
    if policy.digest != digest:
        return None
    if not policy.needs_similarity():
        return PolicyEntry(policy, key)
    shards = policies.recovered_shards(snapshot.shards.values(), policy.similarity_digest or "")
    return PolicyEntry(policy, key, (policy.similarity_digest or "", shards)) if shards else None


def _carry_out(snapshot: Snapshot, spec: SereDeploymentSpec, defaults: Defaults) -> Plan:
    wanted = routing.wanted(snapshot, spec)
    stable = stable_digest(snapshot)
    recovered = recovered_entry(snapshot, stable)
    if not wanted.hold and (why := policies.too_large(wanted.entry)) is not None:
        wanted = routing.held(wanted, f"policy {wanted.digest} cannot be rolled out: {why}")
    if not wanted.hold and not policies.fit((recovered, wanted.entry)):
        room = "are too large to be held together; to change over, set spec.routing.mode: Exact until that is applied"
        wanted = routing.held(wanted, f"the similarity artefacts of policy {wanted.digest} and of the one in force {room}")
    known = {EXACT: PolicyEntry(EXACT_POLICY), **({} if wanted.hold else {wanted.digest: wanted.entry})}
    if stable not in known and recovered is None:
        stable = EXACT  # the ConfigMap was lost: exact is always right, and the wanted policy comes by its canary again
    refused = recovered is not None and recovered.key is not None and routing.stale_reason(snapshot, recovered.key) is not None
    if refused and engine.replacing(snapshot) is None and (wanted.hold or wanted.digest != EXACT):
        stable = EXACT  # of the engine before, so all pods refuse it, and a policy of the same digest needs its canary here
    deployment = children.deployment(snapshot.object, spec, defaults)
    hold = tuning_first.held(snapshot, spec, wanted, stable, deployment["spec"]["template"])
    step = rollout.advance(snapshot, spec, wanted, stable)

    entries: dict[str, PolicyEntry] = {}
    candidate = (step.rollout or {}).get("candidate")
    # The one before comes last: where there is no room for its artefact, going back to it means exact routing.
    for digest in (step.stable, *step.pod_policy.values(), candidate or EXACT, step.previous or EXACT):
        entry = known.get(digest) or recovered_entry(snapshot, digest)
        if entry is not None and digest != EXACT and policies.fit((*entries.values(), entry)):
            entries[digest] = entry
    if step.stable != EXACT and step.stable not in entries:
        step = replace(step, stable=EXACT)  # `stable` must never name what is not there: pods would keep what they have

    owner, plan = snapshot.object, Plan()
    if hold is not None:
        deployment = engine.kept(deployment, snapshot.children["Deployment"])
    config_map = drift.stamped(policies.policy_config_map(owner, step.stable, routing.overridden(snapshot), entries))
    shards = [drift.stamped(body) for body in policies.shard_config_maps(owner, snapshot.shards, entries.values())]
    bodies = [
        *shards,  # before the policies that need them
        config_map,
        drift.stamped(deployment),
        drift.stamped(children.service(owner)),
        drift.stamped(children.disruption_budget(owner, spec)),
    ]
    handed_over = children.replicas_handed_over(spec, snapshot.children.get("Deployment"))
    if handed_over is not None:
        plan.hand_over.append(handed_over)
    autoscaler, live_autoscaler = children.autoscaler(owner, spec), snapshot.children.get("HorizontalPodAutoscaler")
    if autoscaler is not None:
        bodies.append(drift.stamped(autoscaler))
    elif live_autoscaler is not None and children.owned(owner, live_autoscaler):
        plan.delete.append(live_autoscaler)
    kept = {body["metadata"]["name"] for body in shards}
    plan.delete += [live for name, live in snapshot.shards.items() if name not in kept]
    for body in bodies:
        name = body["metadata"]["name"]
        live = snapshot.shards.get(name) if name in kept else snapshot.children.get(body["kind"])
        cleaned = drift.without_foreign(body, live) if live is not None and _same_config(body, live) else None
        if cleaned is not None:
            plan.replace.append(cleaned)
            plan.events.append(
                Event("Normal", "Healed", f"foreign parts of {body['kind']} {body['metadata']['name']} were removed")
            )
        where = drift.drift(body, live)
        if where is not None:
            plan.apply.append(body)
            if live is not None and _same_config(body, live):
                plan.events.append(Event("Normal", "Healed", f"{body['kind']} {body['metadata']['name']}: {where} was put back"))
    plan.pods = [patch for pod in snapshot.live_pods if (patch := pod_patch(snapshot, step, config_map, pod)) is not None]
    _tune(snapshot, spec, plan)
    new = status.without_none(status.build(snapshot, spec, wanted, step, hold))
    plan.status = status.merge_patch(new, snapshot.status)
    plan.events += [*step.events, *_transitions(snapshot, new)]
    plan.requeue_after = IDLE_POLL_S if hold is not None and step.requeue_after is None else _requeue(snapshot, new, step)
    return plan


def _same_config(body: Object, live: Object) -> bool:
    key = meta.CONFIG_HASH_ANNOTATION
    return bool((live["metadata"].get("annotations") or {}).get(key) == body["metadata"]["annotations"][key])


# ---- pods --------------------------------------------------------------------------------------------------------


def pod_patch(snapshot: Snapshot, step: Step, config_map: Object, pod: PodView) -> PodPatch | None:
    """The annotations that steer this pod's policy, None if they are as they should be."""
    override = meta.OVERRIDE_EXACT if routing.overridden(snapshot) else None
    wanted: dict[str, str | None] = {
        meta.POLICY_ANNOTATION: step.pod_policy.get(pod.name),
        meta.OVERRIDE_ANNOTATION: override,
        meta.REFRESH_ANNOTATION: refresh_nonce(snapshot, step, config_map, pod),
    }
    changed = {key: value for key, value in wanted.items() if pod.annotations.get(key) != value}
    return PodPatch(pod.name, pod.uid, changed) if changed else None


def refresh_nonce(snapshot: Snapshot, step: Step, config_map: Object, pod: PodView) -> str:
    """`<hash of the ConfigMap's content>.<unix seconds>`: changes with the content, so that the kubelet looks at once.

    The kubelet may have looked into a cache that was a moment old; a pod that answers, names no error and still shows
    another policy a while later gets a new time, and so another look.
    """
    content = {key: config_map.get(key) for key in ("data", "binaryData")}
    fingerprint = hashlib.sha256(canonical_json(content)).hexdigest()[:10]
    match = re.fullmatch(r"([0-9a-f]{10})\.(\d+)", pod.annotations.get(meta.REFRESH_ANNOTATION, ""))
    if match is None or match[1] != fingerprint:
        return f"{fingerprint}.{int(snapshot.now)}"
    silent = pod.state is None or bool(pod.state.get("error")) or not pod.state.get("ready")
    behind = pod.digest != status.expected_digest(snapshot, step, pod)
    if behind and not silent and snapshot.now - int(match[2]) > REFRESH_AGAIN_S:
        return f"{fingerprint}.{int(snapshot.now)}"
    return match[0]


# ---- tuning ------------------------------------------------------------------------------------------------------


def _tune(snapshot: Snapshot, spec: SereDeploymentSpec, plan: Plan) -> None:
    """In mode Tuned: one SereTuningJob for this spec, begun once a pod answers (serving gets the first GPU)."""
    current = routing.tuning_job_name(snapshot.name, spec) if spec.routing.mode is RoutingMode.TUNED else None
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
    """Whether a run would now have what its name does not tell: another place for its study or its pod, other claims."""
    try:
        then = parse_spec(SereTuningJobSpec, job["spec"])
    except SpecError:
        return False  # made by another release
    fields = ("volumes", "node_selector", "tolerations", "runtime_class_name")
    storage = spec.tuning.storage if spec.tuning is not None else None
    return then.tuning.storage != storage or any(getattr(then, field) != getattr(spec, field) for field in fields)


def tuning_job(owner: Object, spec: SereDeploymentSpec, name: str) -> Object:
    """The run as an object: an immutable copy of what is tuned."""
    fields = ("model", "engine", "resources", "slo", "accuracy", "tuning", "volumes", "node_selector", "tolerations",
              "runtime_class_name")  # fmt: skip
    whole = spec.to_json_dict()
    names = {SereDeploymentSpec.model_fields[field].alias or field for field in fields}
    body = {key: value for key, value in whole.items() if key in names}
    return {
        "apiVersion": meta.API_VERSION,
        "kind": meta.TUNING_JOB_KIND,
        "metadata": children.metadata(owner, name, meta.TUNER_COMPONENT),
        "spec": {"deployment": owner["metadata"]["name"], **body},
    }


# ---- status ------------------------------------------------------------------------------------------------------


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
    ready = next(c for c in new["conditions"] if c["type"] == "Ready")
    waits = [IDLE_POLL_S]
    if step.requeue_after is not None:
        waits.append(step.requeue_after)
    if ready["status"] != "True" and any(pod.ready for pod in snapshot.live_pods):
        waits.append(STARTING_POLL_S)
    elif ready["status"] != "True":
        waits.append(5.0)
    return min(waits)


__all__ = ["Wanted", "decide"]
