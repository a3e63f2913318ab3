"""The hot rollout of a routing policy: canary pods first, judged, then the rest, or back. Pure state machine.

    (none) -> Baseline -> Canary -> Analysing -> [AwaitingApproval] -> Promoting -> (none)
                             \\__________\\____________\\-> RollingBack -> (none)

Baseline is passed through at once unless there is one pod alone, which then is stable's side first and the canary's
after. What is true stands in three places, so that a restart between any two writes goes on:
the policy ConfigMap's `stable`, the pods' policy annotation, and `status.rollout` (bookkeeping and evidence).
A verdict is written to the status one step before it is acted on; acting on it again changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from sere_operator.api import meta
from sere_operator.api.conditions import Reason, timestamp
from sere_operator.api.deployment import MAX_REJECTED, Approval, SereDeploymentSpec
from sere_operator.plan import analysis, histogram
from sere_operator.plan.analysis import Outcome
from sere_operator.plan.evidence import Stage, arms, collect_golden, golden_answers, golden_count, measured, with_state
from sere_operator.plan.routing import EXACT, Wanted, overridden, revision
from sere_operator.plan.snapshot import Event, Object, PodView, Snapshot

POLL_S = 2.0  # while something is under way
APPLY_GRACE_S = 60.0  # a canary that names an error for so long will not apply the policy
FRESH_LOOK_S = 60.0  # no deadline is called over before the operator has looked for so long without a gap
SETTLE_S = 10.0  # a Static policy is looked at for this long
WATCH_S = 30.0  # a canary that looks slower is watched for so long before it is rejected: it may be a passing disturbance
BACKOFF_S = 300.0  # before an inconclusive policy is tried again; doubles
MAX_BACKOFF_S = 6 * 3600.0


@dataclass(frozen=True)
class Step:
    """Where the rollout stands after looking at a snapshot.

    stable      digest for the policy ConfigMap
    pod_policy  digest for the annotation of the pods named; the others have none
    rollout     `status.rollout` to be, None: nothing under way
    applied     condition PolicyApplied: True, False, and why
    """

    stable: str
    pod_policy: dict[str, str] = field(default_factory=dict)
    rollout: Object | None = None
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


def advance(snapshot: Snapshot, spec: SereDeploymentSpec, wanted: Wanted, stable: str) -> Step:
    """The checklist, in order; the first that applies decides.

    1. kill switch on                     every pod exact, rollout dropped, stable untouched
    2. the wanted policy cannot be had    stable kept, rollout dropped
    3. a person gave it up                back to the one before
    4. rejected for this revision         stable kept
    5. already stable                     finish: all pods must show it
    6. exact is wanted                    at once: it can harm no answer
    7. otherwise                          canary, analysis, promotion or back
    """
    status = snapshot.status
    rejected = tuple(status.get("rejected") or ())
    previous = (status.get("policy") or {}).get("previous")
    base = Step(stable=stable, rejected=rejected, previous=previous)
    if overridden(snapshot):
        return _override(snapshot, base)
    if wanted.hold:
        return replace(base, reason=wanted.problem or Reason.PROFILE_MISSING, message=wanted.message, requeue_after=30.0)
    if wanted.digest != EXACT and snapshot.annotations.get(meta.ROLLBACK_ANNOTATION) == wanted.digest:
        return _given_up(snapshot, base, wanted)
    if wanted.digest == stable:
        return _settle(snapshot, base, wanted)
    if wanted.digest == EXACT:
        return _go_exact(base, wanted)
    refusal = next((r for r in rejected if r["digest"] == wanted.digest and r.get("revision", "") == revision(spec)), None)
    if refusal is not None:
        message = f"{refusal.get('message', '')}; policy {wanted.digest} will not be tried again for this model revision"
        return replace(base, reason=Reason.REJECTED, message=message)
    return _try(snapshot, spec, base, wanted)


def _override(snapshot: Snapshot, base: Step) -> Step:
    behind = [pod.name for pod in snapshot.live_pods if pod.digest != EXACT]
    message = "the kill switch is on (annotation serving.sere.dev/override): every pod routes exactly"
    if behind:
        message = f"the kill switch is on; {len(behind)} of {len(snapshot.live_pods)} pods do not confirm exact routing yet"
    requeue = POLL_S if behind else None
    return replace(base, applied=False, reason=Reason.OVERRIDDEN, message=message, requeue_after=requeue)


def _given_up(snapshot: Snapshot, base: Step, wanted: Wanted) -> Step:
    target = base.stable
    if base.stable == wanted.digest:
        target = base.previous if base.previous and base.previous != wanted.digest else EXACT
    message = f"policy {wanted.digest} was given up by annotation {meta.ROLLBACK_ANNOTATION}; {target} is in force"
    return replace(base, stable=target, reason=Reason.ROLLED_BACK, message=message, requeue_after=_until_shown(snapshot, target))


def _until_shown(snapshot: Snapshot, digest: str) -> float | None:
    return POLL_S if any(pod.digest != digest for pod in snapshot.live_pods) else None


def _settle(snapshot: Snapshot, base: Step, wanted: Wanted) -> Step:
    """The wanted policy is stable. Canary annotations go last, when all other pods show it, so that none flips back."""
    pods = snapshot.live_pods
    behind = [pod for pod in pods if pod.digest != wanted.digest]
    keep = {pod.name: wanted.digest for pod in pods if pod.annotations.get(meta.POLICY_ANNOTATION) == wanted.digest}
    under_way = snapshot.status.get("rollout") or {}
    promoting = under_way.get("stage") == Stage.PROMOTING and under_way.get("candidate") == wanted.digest
    if behind:
        refused = next((str(pod.state["error"]) for pod in behind if pod.state and pod.state.get("error")), None)
        reason, message = Reason.POLICY_PENDING, f"{len(behind)} of {len(pods)} pods do not show {wanted.digest} yet"
        if promoting:
            reason = Reason.PROMOTING
        if refused:
            reason, message = Reason.APPLY_FAILED, f"{message}: {refused}"
        rollout = {**under_way, "stage": Stage.PROMOTING.value, "message": message} if promoting else None
        return replace(
            base, pod_policy=keep if promoting else {}, rollout=rollout, reason=reason, message=message, requeue_after=POLL_S
        )
    done = Event("Normal", "PolicyPromoted", f"all {len(pods)} pods run policy {wanted.digest}")
    events = (done,) if promoting else ()
    if wanted.problem is not None:
        return replace(base, applied=False, reason=wanted.problem, message=wanted.message, events=events)
    if wanted.digest == EXACT:
        return replace(base, applied=True, reason=Reason.EXACT_ROUTING, message="routing is exact", events=events)
    what = wanted.entry.policy.describe()
    return replace(base, applied=True, reason=Reason.APPLIED, message=f"every pod runs {wanted.digest}: {what}", events=events)


def _go_exact(base: Step, wanted: Wanted) -> Step:
    message = wanted.message or "going back to exact routing"
    event = Event("Normal" if wanted.problem is None else "Warning", "PolicyExact", message)
    return replace(
        base, stable=EXACT, previous=base.stable, reason=wanted.problem or Reason.POLICY_PENDING, message=message,
        events=(event,), requeue_after=POLL_S,
    )  # fmt: skip


# ---- one candidate -----------------------------------------------------------------------------------------------


def _try(snapshot: Snapshot, spec: SereDeploymentSpec, base: Step, wanted: Wanted) -> Step:
    now, known = snapshot.now, snapshot.status.get("rollout") or {}
    if known.get("candidate") != wanted.digest:
        known = {"candidate": wanted.digest, "attempt": 1}
    if "stage" not in known or known["stage"] == Stage.ROLLING_BACK:
        back = _still_back(snapshot, base, known)
        if back is not None:
            return back
        return _begin(snapshot, spec, base, wanted, known)
    pods = {pod.name: pod for pod in snapshot.live_pods}
    canaries = [pods[name] for name in known.get("canaryPods") or [] if name in pods]
    if not canaries or _restarted(known, canaries):
        return _inconclusive(base, known, now, "a canary pod was replaced or restarted before it could be judged")
    stage = Stage(known["stage"])
    if stage is Stage.PROMOTING:
        return replace(
            base, stable=wanted.digest, previous=base.stable, pod_policy={pod.name: wanted.digest for pod in canaries},
            rollout=known, reason=Reason.PROMOTING, message=str(known.get("message", "")), requeue_after=POLL_S,
        )  # fmt: skip
    if stage is Stage.BASELINE:
        return _baseline(snapshot, spec, base, wanted, known, canaries)
    annotated = replace(base, pod_policy={pod.name: wanted.digest for pod in canaries}, requeue_after=POLL_S)
    if stage is Stage.CANARY:
        return _await_canary(snapshot, spec, annotated, base, wanted, known, canaries)
    if stage is Stage.AWAITING_APPROVAL:
        return _await_approval(snapshot, annotated, wanted, known)
    return _analyse(snapshot, spec, annotated, base, wanted, known, canaries)


def _still_back(snapshot: Snapshot, base: Step, known: Object) -> Step | None:
    """After an inconclusive try: wait out the backoff."""
    until = seconds(known.get("nextAttemptAt"))
    if snapshot.now >= until:
        return None
    message = f"{known.get('message', '')}; tried again after {known['nextAttemptAt']}"
    wait = min(60.0, max(POLL_S, until - snapshot.now))
    return replace(base, rollout=known, reason=Reason.INCONCLUSIVE, message=message, requeue_after=wait)


def _begin(snapshot: Snapshot, spec: SereDeploymentSpec, base: Step, wanted: Wanted, known: Object) -> Step:
    """Choose canary pods: ready ones that show the stable policy; those already annotated first (a lost status)."""
    live = [pod for pod in snapshot.live_pods if pod.ready and pod.state is not None and not pod_is_old(snapshot, pod)]
    total = spec.wanted_replicas if spec.wanted_replicas is not None else len(snapshot.live_pods)
    if not live or len(live) < total:
        message = f"policy {wanted.digest} waits for its canary until all pods are ready ({len(live)} of {total} are)"
        return replace(base, rollout=None, reason=Reason.POLICY_PENDING, message=message, requeue_after=5.0)
    live.sort(key=lambda pod: (pod.annotations.get(meta.POLICY_ANNOTATION) != wanted.digest, pod.name))
    count = min(spec.rollout.canary.replicas, max(1, len(live) - 1))
    chosen = live[:count]
    alone = count == len(live)
    state: Object = {"restarts": {pod.uid: pod.restarts for pod in chosen}, "alone": alone}
    rollout = {
        "candidate": wanted.digest, "attempt": known.get("attempt", 1), "canaryPods": [pod.name for pod in chosen],
        "startedAt": stamp(snapshot.now), "stage": (Stage.BASELINE if alone and not wanted.vouched else Stage.CANARY).value,
        "state": {**state, "since": stamp(snapshot.now)},
    }  # fmt: skip
    names = ", ".join(pod.name for pod in chosen)
    message = f"policy {wanted.digest} ({wanted.entry.policy.describe()}) is tried on {names}"
    rollout["message"] = message
    event = Event("Normal", "CanaryStarted", message)
    return replace(base, rollout=rollout, reason=Reason.CANARY, message=message, events=(event,), requeue_after=0.1)


def pod_is_old(snapshot: Snapshot, pod: PodView) -> bool:
    """Belongs to a ReplicaSet that the Deployment is replacing (told by the Deployment's newest pod-template-hash)."""
    hashes = {
        p.labels.get("pod-template-hash"): str(p.object["metadata"].get("creationTimestamp", "")) for p in snapshot.live_pods
    }
    if len(hashes) < 2:
        return False
    return pod.labels.get("pod-template-hash") != max(hashes, key=lambda key: hashes[key])


def _restarted(known: Object, canaries: list[PodView]) -> bool:
    before: Object = (known.get("state") or {}).get("restarts") or {}
    return any(before.get(pod.uid) != pod.restarts for pod in canaries)


def _to_stage(known: Object, stage: Stage, now: float, message: str, **changes: Any) -> Object:
    moved = with_state(known, since=stamp(now), start=None, stableStart=None, **changes)
    return {**moved, "stage": stage.value, "message": message}


def _in_stage_s(known: Object, now: float) -> float:
    return now - seconds((known.get("state") or {}).get("since") or known.get("startedAt"))


def _overdue(snapshot: Snapshot, known: Object, limit_s: float) -> bool:
    """Whether a stage has taken too long, and not only because the operator did not look."""
    return _in_stage_s(known, snapshot.now) > limit_s and snapshot.watched_s >= min(limit_s, FRESH_LOOK_S)


def _baseline(
    snapshot: Snapshot, spec: SereDeploymentSpec, base: Step, wanted: Wanted, known: Object, canaries: list[PodView]
) -> Step:
    """One pod alone: stable's side of the comparison is taken on it before the switch."""
    now = snapshot.now
    step = replace(base, reason=Reason.CANARY, message=str(known.get("message", "")), requeue_after=POLL_S)
    known = collect_golden(snapshot, known, "stable", base.stable)
    if golden_count(wanted) and not golden_answers(known, "stable"):
        if _overdue(snapshot, known, spec.rollout.canary.deadline_seconds):
            return _inconclusive(base, known, now, "the golden prompts were not answered before the switch")
        return replace(step, rollout=known)
    known, arm = measured(known, canaries, base.stable)
    if arm is not None and arm.requests >= spec.rollout.canary.min_requests:
        moved = _to_stage(
            known, Stage.CANARY, now, f"baseline taken over {arm.requests} requests",
            baseline={"tpot": histogram.packed(arm.tpot), "ttft": histogram.packed(arm.ttft)},
        )  # fmt: skip
        return replace(step, rollout=moved, requeue_after=0.1)
    if _overdue(snapshot, known, spec.rollout.canary.deadline_seconds):
        seen = arm.requests if arm else 0
        return _inconclusive(
            base, known, now, f"{seen} of {spec.rollout.canary.min_requests} requests that are needed were seen before the switch"
        )
    return replace(step, rollout=known)


def _await_canary(
    snapshot: Snapshot,
    spec: SereDeploymentSpec,
    annotated: Step,
    base: Step,
    wanted: Wanted,
    known: Object,
    canaries: list[PodView],
) -> Step:
    """Every canary must show the policy on all ranks and give a real token under it.

    A pod that names an error is believed after a short grace; one that is merely slow has until the canary's deadline.
    """
    now = snapshot.now
    if all(pod.ready and pod.digest == wanted.digest and pod.proven == wanted.digest for pod in canaries):
        moved = _to_stage(known, Stage.ANALYSING, now, "canary pods run the policy; it is being compared")
        return replace(annotated, rollout=moved, reason=Reason.CANARY, message=moved["message"], requeue_after=0.5)
    refused = next((str(pod.state["error"]) for pod in canaries if pod.state and pod.state.get("error")), None)
    since = known["state"].get("refusedSince")
    if bool(refused) != bool(since):
        known = with_state(known, refusedSince=stamp(now) if refused else None)
    elif refused and now - seconds(since) > APPLY_GRACE_S and snapshot.watched_s >= APPLY_GRACE_S:
        return _inconclusive(base, known, now, f"the canary did not apply the policy: {refused}")
    if _overdue(snapshot, known, spec.rollout.canary.deadline_seconds):
        return _inconclusive(base, known, now, "the canary did not show the policy in time")
    message = f"waiting for the canary to show {wanted.digest}" + (f": {refused}" if refused else "")
    return replace(annotated, rollout=known, reason=Reason.CANARY, message=message, requeue_after=1.0)


def _analyse(
    snapshot: Snapshot,
    spec: SereDeploymentSpec,
    annotated: Step,
    base: Step,
    wanted: Wanted,
    known: Object,
    canaries: list[PodView],
) -> Step:
    now, canary_spec, state = snapshot.now, spec.rollout.canary, known["state"]
    if any(pod.digest not in (None, wanted.digest) for pod in canaries):  # None: it does not answer, or not with one voice
        return _inconclusive(base, known, now, "the canary stopped running the policy while it was being compared")
    known = collect_golden(snapshot, known, "canary", wanted.digest)
    if not state["alone"]:
        known = collect_golden(snapshot, known, "stable", base.stable)
    prompts = golden_count(wanted)
    over = _overdue(snapshot, known, canary_spec.deadline_seconds)
    if prompts and not over and not (golden_answers(known, "canary") and golden_answers(known, "stable")):
        # Latency is counted from after the golden prompts on: they are not the traffic that is served.
        message = f"golden prompts are being answered by the canary and the stable side ({prompts} each)"
        return replace(annotated, rollout=known, reason=Reason.CANARY, message=message)
    if wanted.profile is not None and not prompts:
        message = "the profile has no golden prompts, so the canary cannot be checked for harm to answers"
        return _ask(annotated, known, now, wanted, message)
    known, stable, canary = arms(snapshot, base.stable, wanted.digest, known, canaries)
    if stable is None or canary is None:
        known = with_state(known, countedSince=stamp(now))
        return replace(annotated, rollout=known, reason=Reason.CANARY, message="counting requests from now on")
    least = 0 if wanted.vouched else canary_spec.min_requests
    verdict = analysis.judge(
        stable, canary, spec.slo, min_requests=least, golden_prompts=prompts, deadline_over=over,
        side_by_side=not state["alone"], watched=now - seconds(known["state"].get("countedSince")) >= WATCH_S,
    )  # fmt: skip
    if verdict.outcome is Outcome.PENDING or (wanted.vouched and _in_stage_s(known, now) < SETTLE_S
                                              and verdict.outcome is Outcome.PASSED):  # fmt: skip
        return replace(annotated, rollout=known, reason=Reason.CANARY, message=verdict.message)
    if verdict.outcome is Outcome.REJECTED:
        return _reject(base, spec, known, now, verdict.message)
    if verdict.outcome is Outcome.INCONCLUSIVE:
        return _inconclusive(base, known, now, verdict.message)
    certified = wanted.profile is None or wanted.profile.evidence.certified
    if spec.rollout.approval is Approval.MANUAL or not certified:
        why = verdict.message if certified else f"{verdict.message}; the profile is advisory, not certified"
        return _ask(annotated, known, now, wanted, why)
    moved = _to_stage(known, Stage.PROMOTING, now, verdict.message)
    event = Event("Normal", "CanaryPassed", verdict.message)
    return replace(annotated, rollout=moved, reason=Reason.PROMOTING, message=verdict.message, events=(event,), requeue_after=0.1)


def _ask(annotated: Step, known: Object, now: float, wanted: Wanted, why: str) -> Step:
    moved = _to_stage(known, Stage.AWAITING_APPROVAL, now, why)
    message = f"{why}; approve by annotation {meta.APPROVED_ANNOTATION}={wanted.digest}"
    event = Event("Normal", "AwaitingApproval", message)
    return replace(
        annotated, rollout=moved, reason=Reason.AWAITING_APPROVAL, message=message, events=(event,), requeue_after=30.0
    )


def _await_approval(snapshot: Snapshot, annotated: Step, wanted: Wanted, known: Object) -> Step:
    if snapshot.annotations.get(meta.APPROVED_ANNOTATION) == wanted.digest:
        moved = _to_stage(known, Stage.PROMOTING, snapshot.now, "approved")
        return replace(annotated, rollout=moved, reason=Reason.PROMOTING, message="approved", requeue_after=0.1)
    message = f"{known.get('message', '')}; approve by annotation {meta.APPROVED_ANNOTATION}={wanted.digest}"
    return replace(annotated, rollout=known, reason=Reason.AWAITING_APPROVAL, message=message, requeue_after=30.0)


def _reject(base: Step, spec: SereDeploymentSpec, known: Object, now: float, why: str) -> Step:
    entry = {"digest": known["candidate"], "revision": revision(spec), "message": why[:512], "at": stamp(now)}
    rejected = (*(r for r in base.rejected if r["digest"] != entry["digest"]), entry)[-MAX_REJECTED:]
    event = Event("Warning", "PolicyRejected", f"policy {known['candidate']}: {why}")
    message = f"{why}; policy {known['candidate']} will not be tried again for this model revision"
    # The pods go back in this same plan: they are written before the status, and a lost status only repeats the canary.
    return replace(
        base, rejected=rejected, rollout=None, reason=Reason.REJECTED, message=message, events=(event,), requeue_after=POLL_S
    )


def _inconclusive(base: Step, known: Object, now: float, why: str) -> Step:
    attempt = int(known.get("attempt") or 1)
    wait = min(MAX_BACKOFF_S, BACKOFF_S * 2 ** (attempt - 1))
    rollout = {
        "candidate": known["candidate"], "stage": Stage.ROLLING_BACK.value, "attempt": attempt + 1, "message": why,
        "nextAttemptAt": stamp(now + wait),
    }  # fmt: skip
    message = f"{why}; tried again after {rollout['nextAttemptAt']}"
    event = Event("Warning", "PolicyInconclusive", f"policy {known['candidate']}: {message}")
    return replace(base, rollout=rollout, reason=Reason.INCONCLUSIVE, message=message, events=(event,), requeue_after=POLL_S)
