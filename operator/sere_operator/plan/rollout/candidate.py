"""One policy on its way: canary pods first, judged, then the rest, or back. Pure state machine.

    (none) -> Baseline -> Canary -> Analysing -> [AwaitingApproval] -> Promoting -> (none)
                             \\__________\\____________\\-> RollingBack -> (none)

One pod alone is both sides: in Baseline it answers the golden prompts under the stable policy (skipped elsewhere), and
while it is analysed the two policies take turns on it, so that a load that drifts meets both. A verdict is written to
the status one step before it is acted on; acting on it again changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sere_operator.api import meta
from sere_operator.api.conditions import Reason
from sere_operator.api.deployment import Approval, SereDeploymentSpec
from sere_operator.plan.rollout import analysis
from sere_operator.plan.rollout.aftermath import inconclusive, reject, waiting
from sere_operator.plan.rollout.analysis import Outcome
from sere_operator.plan.rollout.evidence import (
    Stage,
    arms,
    collect_golden,
    golden_answers,
    golden_beyond_reach,
    golden_count,
    with_state,
)
from sere_operator.plan.rollout.step import POLL_S, Step, seconds, stamp
from sere_operator.plan.rollout.wanted import Wanted
from sere_operator.plan.snapshot import Event, Object, PodView, Snapshot

APPLY_GRACE_S = 60.0  # a canary that names an error for so long will not apply the policy
FRESH_LOOK_S = 60.0  # no deadline is called over before the operator has looked for so long without a gap
SETTLE_S = 10.0  # a Static policy is looked at for this long
WATCH_S = 30.0  # a canary that looks slower is watched for so long before it is rejected: it may be a passing disturbance
TURN_S = 20.0  # of the first two turns of one pod alone


@dataclass(frozen=True)
class Attempt:
    """A candidate with its canary pods. `known` is `status.rollout` as it was read, and as the look goes on changes it."""

    snapshot: Snapshot
    spec: SereDeploymentSpec
    base: Step
    wanted: Wanted
    known: Object
    canaries: list[PodView]

    @property
    def now(self) -> float:
        return self.snapshot.now

    @property
    def state(self) -> Object:
        return self.known.get("state") or {}

    @property
    def in_stage_s(self) -> float:
        return self.now - seconds(self.state.get("since") or self.known.get("startedAt"))

    @property
    def overdue(self) -> bool:
        """Whether the stage takes longer than the canary may, and not only because the operator did not look."""
        limit_s = self.spec.rollout.canary.deadline_seconds
        return self.in_stage_s > limit_s and self.snapshot.watched_s >= min(limit_s, FRESH_LOOK_S)

    def noting(self, **changes: Any) -> Attempt:
        return replace(self, known=with_state(self.known, **changes))

    def step(self, message: str, *, annotated: bool = True, **changes: Any) -> Step:
        """Go on in this stage. `annotated`: the canary pods run the candidate."""
        pod_policy = {pod.name: self.wanted.digest for pod in self.canaries} if annotated else {}
        step = replace(self.base, pod_policy=pod_policy, rollout=self.known, reason=Reason.CANARY, message=message)
        return replace(step, **{"requeue_after": POLL_S, **changes})

    def to(self, stage: Stage, message: str, **state: Any) -> Attempt:
        """The next stage; counters begin anew there."""
        moved = with_state(self.known, since=stamp(self.now), start=None, stableStart=None, **state)
        return replace(self, known={**moved, "stage": stage.value, "message": message})

    def back(self, why: str) -> Step:
        return inconclusive(self.base, self.known, self.now, why)


def look(snapshot: Snapshot, spec: SereDeploymentSpec, base: Step, wanted: Wanted) -> Step:
    """Where the candidate stands after this snapshot; begins with it where nothing is under way."""
    known = snapshot.status.get("rollout") or {}
    if known.get("candidate") != wanted.digest:
        known = {"candidate": wanted.digest, "attempt": 1}
    if "stage" not in known or known["stage"] == Stage.ROLLING_BACK:
        return waiting(snapshot, base, known) or _begin(snapshot, spec, base, wanted, known)
    pods = {pod.name: pod for pod in snapshot.live_pods}
    canaries = [pods[name] for name in known.get("canaryPods") or [] if name in pods]
    attempt = Attempt(snapshot, spec, base, wanted, known, canaries)
    restarts: Object = attempt.state.get("restarts") or {}
    if not canaries or any(restarts.get(pod.uid) != pod.restarts for pod in canaries):
        return attempt.back("a canary pod was replaced or restarted before it could be judged")
    match Stage(known["stage"]):
        case Stage.BASELINE:
            return _baseline(attempt)
        case Stage.CANARY:
            return _await_canary(attempt)
        case Stage.ANALYSING:
            return _analyse(attempt)
        case Stage.AWAITING_APPROVAL:
            return _await_approval(attempt)
    step = attempt.step(str(known.get("message", "")), reason=Reason.PROMOTING)
    return replace(step, stable=wanted.digest, previous=base.stable)


def _begin(snapshot: Snapshot, spec: SereDeploymentSpec, base: Step, wanted: Wanted, known: Object) -> Step:
    """Choose canary pods: ready ones that show the stable policy; those already annotated first (a lost status)."""
    live = [pod for pod in snapshot.live_pods if pod.ready and pod.state is not None and not _is_old(snapshot, pod)]
    total = spec.wanted_replicas if spec.wanted_replicas is not None else len(snapshot.live_pods)
    if not live or len(live) < total:
        message = f"policy {wanted.digest} waits for its canary until all pods are ready ({len(live)} of {total} are)"
        return replace(base, rollout=None, reason=Reason.POLICY_PENDING, message=message, requeue_after=5.0)
    live.sort(key=lambda pod: (pod.annotations.get(meta.POLICY_ANNOTATION) != wanted.digest, pod.name))
    count = min(spec.rollout.canary.replicas, max(1, len(live) - 1))
    chosen = live[:count]
    alone = count == len(live)
    message = f"policy {wanted.digest} ({wanted.entry.policy.describe()}) is tried on {', '.join(pod.name for pod in chosen)}"
    rollout = {
        "candidate": wanted.digest, "attempt": known.get("attempt", 1), "canaryPods": [pod.name for pod in chosen],
        "startedAt": stamp(snapshot.now), "stage": (Stage.BASELINE if alone and golden_count(wanted) else Stage.CANARY).value,
        "state": {"restarts": {pod.uid: pod.restarts for pod in chosen}, "alone": alone, "since": stamp(snapshot.now)},
        "message": message,
    }  # fmt: skip
    event = Event("Normal", "CanaryStarted", message)
    return replace(base, rollout=rollout, reason=Reason.CANARY, message=message, events=(event,), requeue_after=0.1)


def _is_old(snapshot: Snapshot, pod: PodView) -> bool:
    """Belongs to a ReplicaSet that the Deployment is replacing (told by the Deployment's newest pod-template-hash)."""
    hashes = {
        p.labels.get("pod-template-hash"): str(p.object["metadata"].get("creationTimestamp", "")) for p in snapshot.live_pods
    }
    if len(hashes) < 2:
        return False
    return pod.labels.get("pod-template-hash") != max(hashes, key=lambda key: hashes[key])


def _baseline(attempt: Attempt) -> Step:
    """One pod alone: the stable side of the golden prompts is answered before the switch."""
    attempt = replace(attempt, known=collect_golden(attempt.snapshot, attempt.known, "stable", attempt.base.stable))
    message = str(attempt.known.get("message", ""))
    if golden_answers(attempt.known, "stable"):
        attempt = attempt.to(Stage.CANARY, "the stable side has answered the golden prompts")
        return attempt.step(message, annotated=False, requeue_after=0.1)
    if attempt.overdue:
        return attempt.back("the golden prompts were not answered before the switch")
    return attempt.step(message, annotated=False)


def _await_canary(attempt: Attempt) -> Step:
    """Every canary must show the policy on all ranks and give a real token under it.

    A pod that names an error is believed after a short grace; one that is merely slow has until the canary's deadline.
    """
    digest, now = attempt.wanted.digest, attempt.now
    if all(pod.ready and pod.digest == digest and pod.proven == digest for pod in attempt.canaries):
        message = "canary pods run the policy; it is being compared"
        return attempt.to(Stage.ANALYSING, message).step(message, requeue_after=0.5)
    refused = next((pod.state.error for pod in attempt.canaries if pod.state and pod.state.error), None)
    since = attempt.state.get("refusedSince")
    if bool(refused) != bool(since):
        attempt = attempt.noting(refusedSince=stamp(now) if refused else None)
    elif refused and now - seconds(since) > APPLY_GRACE_S and attempt.snapshot.watched_s >= APPLY_GRACE_S:
        return attempt.back(f"the canary did not apply the policy: {refused}")
    if attempt.overdue:
        return attempt.back("the canary did not show the policy in time")
    return attempt.step(f"waiting for the canary to show {digest}" + (f": {refused}" if refused else ""), requeue_after=1.0)


def _analyse(attempt: Attempt) -> Step:
    wanted, now, alone = attempt.wanted, attempt.now, bool(attempt.state["alone"])
    turns = alone and not wanted.by_hand
    # None: a pod does not answer, or not with one voice
    if any(pod.digest not in (None, wanted.digest, attempt.base.stable if turns else None) for pod in attempt.canaries):
        return attempt.back("the canary stopped running the policy while it was being compared")
    known = collect_golden(attempt.snapshot, attempt.known, "canary", wanted.digest)
    if not alone:
        known = collect_golden(attempt.snapshot, known, "stable", attempt.base.stable)
    attempt, prompts = replace(attempt, known=known), golden_count(wanted)
    if prompts and not attempt.overdue and not (golden_answers(known, "canary") and golden_answers(known, "stable")):
        # Latency is counted from after the golden prompts on: they are not the traffic that is served.
        return attempt.step(f"golden prompts are being answered by the canary and the stable side ({prompts} each)")
    if wanted.profile is not None and not prompts:
        return _ask(attempt, "the profile has no golden prompts, so the canary cannot be checked for harm to answers")
    if wanted.profile is not None and (why := golden_beyond_reach(wanted.profile.policy)):
        return _ask(attempt, why)
    known, stable, canary = arms(attempt.snapshot, attempt.base.stable, wanted.digest, known, attempt.canaries)
    attempt = replace(attempt, known=known)
    if stable is None or canary is None:
        return attempt.noting(countedSince=stamp(now)).step("counting requests from now on")
    needed = 0 if wanted.by_hand else attempt.spec.rollout.canary.min_requests
    verdict = analysis.judge(
        stable, canary, attempt.spec.slo, min_requests=needed,
        golden_prompts=prompts, deadline_over=attempt.overdue, side_by_side=not alone,
        watched=now - seconds(attempt.state.get("countedSince")) >= WATCH_S,
    )  # fmt: skip
    unsettled = wanted.by_hand and attempt.in_stage_s < SETTLE_S and verdict.outcome is Outcome.PASSED
    if verdict.outcome is Outcome.PENDING or unsettled:
        lacking = (canary.requests < needed, stable.requests < needed)
        mine = not turns or candidates_turn(now - seconds(attempt.state.get("countedSince")), *lacking)
        step = attempt.step(verdict.message, annotated=mine)
        return replace(step, in_turns=frozenset(pod.name for pod in attempt.canaries)) if turns else step
    if verdict.outcome is Outcome.REJECTED:
        return reject(attempt.base, attempt.spec, attempt.known, now, verdict.message)
    if verdict.outcome is Outcome.INCONCLUSIVE:
        return attempt.back(verdict.message)
    lacks = wanted.profile.evidence.shortfall if wanted.profile is not None else None
    if attempt.spec.rollout.approval is Approval.MANUAL or lacks is not None:
        return _ask(attempt, verdict.message if lacks is None else f"{verdict.message}; the profile is {lacks}")
    event = Event("Normal", "CanaryPassed", verdict.message)
    return _promote(attempt, verdict.message, events=(event,))


def candidates_turn(elapsed_s: float, candidate_lacks: bool, stable_lacks: bool) -> bool:
    """Whose turn it is on one pod alone: the side's that lacks requests, else by the clock, the candidate first.

    Each pair of turns is twice as long as the one before: a request that sees a switch counts for neither side, and
    requests that last for minutes must begin and end within one turn, too.
    """
    if candidate_lacks != stable_lacks:
        return candidate_lacks
    turn_s = TURN_S
    while elapsed_s >= 2 * turn_s:
        elapsed_s, turn_s = elapsed_s - 2 * turn_s, 2 * turn_s
    return elapsed_s < turn_s


def _promote(attempt: Attempt, message: str, **changes: Any) -> Step:
    moved = attempt.to(Stage.PROMOTING, message)
    return moved.step(message, reason=Reason.PROMOTING, requeue_after=0.1, **changes)


def _ask(attempt: Attempt, why: str) -> Step:
    moved = attempt.to(Stage.AWAITING_APPROVAL, why)
    return _await_approval(moved, events=(Event("Normal", "AwaitingApproval", _approve_by(moved)),))


def _await_approval(attempt: Attempt, **changes: Any) -> Step:
    if attempt.snapshot.annotations.get(meta.APPROVED_ANNOTATION) == attempt.wanted.digest:
        return _promote(attempt, "approved")
    return attempt.step(_approve_by(attempt), reason=Reason.AWAITING_APPROVAL, requeue_after=30.0, **changes)


def _approve_by(attempt: Attempt) -> str:
    why = attempt.known.get("message", "")
    return f"{why}; approve by annotation {meta.APPROVED_ANNOTATION}={attempt.wanted.digest}"
