r"""One policy on its way: canary pods first, judged, then the rest, or back. Pure state machine.

    (none) -> Baseline -> Canary -> Analysing -> [AwaitingApproval] -> Promoting -> (none)
                             \__________\____________\-> RollingBack -> (none)

One pod alone is both sides: in Baseline it answers the golden prompts under the stable policy (skipped elsewhere), and
while it is analysed the two policies take turns on it, so that a load that drifts meets both. A verdict is written to
the status one step before it is acted on; acting on it again changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from sere_operator.api import meta
from sere_operator.api.conditions import Reason
from sere_operator.api.deployment import MAX_CANARY_PODS, Approval, SereDeploymentSpec
from sere_operator.plan.rollout import analysis
from sere_operator.plan.rollout.aftermath import inconclusive, reject, waiting
from sere_operator.plan.rollout.analysis import Outcome, Side, Verdict
from sere_operator.plan.rollout.evidence import (
    Stage,
    collect_golden,
    golden_answers,
    golden_beyond_reach,
    golden_count,
    sides,
    with_state,
)
from sere_operator.plan.rollout.step import POLL_S, Step
from sere_operator.plan.rollout.wanted import Wanted, suited
from sere_operator.plan.snapshot import Event, Object, PodView, Snapshot
from sere_operator.plan.times import seconds, stamp

CALM_S = 2.0  # the same policy must have been wanted for so long: in a storm of edits none is tried
APPLY_GRACE_S = 60.0  # a canary that names an error for so long will not apply the policy
FRESH_LOOK_S = 60.0  # no deadline is over before the operator has observed for so long without a gap
SETTLE_S = 10.0  # a Static policy is observed for this long
WATCH_S = 30.0  # a canary that looks slower is observed for so long before it is rejected: it may be a passing disturbance
WINDOW_S = 600.0  # while a canary waits for approval, its evidence is gathered anew this often
TURN_S = 20.0  # of the first two turns of one pod alone
MAX_MOVES = 3  # canaries that may be taken away (scale-down, drain) before the attempt counts as inconclusive


@dataclass(frozen=True)
class Attempt:
    """A candidate with its canary pods. `known` is `status.rollout` as read, and as this step changes it."""

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
    def alone(self) -> bool:
        """There is no other pod to compare with."""
        return bool(self.state.get("alone"))

    @property
    def in_stage_s(self) -> float:
        return self.now - seconds(self.state.get("since") or self.known.get("startedAt"))

    @property
    def counted_s(self) -> float:
        """Seconds since requests are counted; 0 before."""
        since = self.state.get("countedSince")
        return self.now - seconds(since) if since else 0.0

    @property
    def overdue(self) -> bool:
        """Whether the stage takes longer than the canary may, and not only because the operator did not observe."""
        limit_s = self.spec.rollout.canary.deadline_seconds
        return self.in_stage_s > limit_s and self.snapshot.watched_s >= min(limit_s, FRESH_LOOK_S)

    @property
    def needed(self) -> int:
        """Finished requests that each side must have."""
        return 0 if self.wanted.by_hand else self.spec.rollout.canary.min_requests

    def noting(self, **changes: Any) -> Attempt:
        return replace(self, known=with_state(self.known, **changes))

    def step(self, message: str, *, annotated: bool = True, **changes: Any) -> Step:
        """Go on in this stage. `annotated`: the canary pods run the candidate."""
        pod_policy = {pod.name: self.wanted.digest for pod in self.canaries} if annotated else {}
        step = replace(self.base, pod_policy=pod_policy, rollout=self.known, reason=Reason.CANARY, message=message)
        return replace(step, **{"requeue_after": POLL_S, **changes})

    def to(self, stage: Stage, message: str, **state: Any) -> Attempt:
        """The next stage; counters begin anew there."""
        moved = with_state(self.known, since=stamp(self.now), start=None, stableStart=None, countedSince=None, **state)
        return replace(self, known={**moved, "stage": stage.value, "message": message})

    def back(self, why: str) -> Step:
        return inconclusive(self.base, self.known, self.now, why)

    def compared(self) -> tuple[Attempt, Side | None, Side | None]:
        """(this attempt with what counting changed, stable side, canary)."""
        known, stable, canary = sides(self.snapshot, self.base.stable, self.wanted, self.known, self.canaries, self.spec.slo)
        return replace(self, known=known), stable, canary

    def judged(self, stable: Side, canary: Side, *, deadline_over: bool) -> Verdict:
        case = analysis.Case(
            stable, canary, self.spec.slo, min_requests=self.needed, golden_prompts=golden_count(self.wanted),
            deadline_over=deadline_over, side_by_side=not self.alone, watched=self.counted_s >= WATCH_S,
        )  # fmt: skip
        return analysis.judge(case)


def proceed(snapshot: Snapshot, spec: SereDeploymentSpec, base: Step, wanted: Wanted) -> Step:
    """Where the candidate stands after this snapshot; begins with it where nothing is under way."""
    known = snapshot.status.get("rollout") or {}
    if known.get("candidate") != wanted.digest:
        known = {"candidate": wanted.digest, "attempt": 1}
    if "stage" not in known or known["stage"] == Stage.ROLLING_BACK:
        return waiting(snapshot, base, known) or _begin(snapshot, spec, base, wanted, known)
    pods = {pod.name: pod for pod in suited(snapshot, wanted)}
    canaries = [pods[name] for name in known.get("canaryPods") or [] if name in pods]
    attempt = Attempt(snapshot, spec, base, wanted, known, canaries)
    restarts: Object = attempt.state.get("restarts") or {}
    if any(restarts.get(pod.uid) != pod.restarts for pod in canaries):
        return attempt.back("a canary pod was replaced or restarted before it could be judged")
    if known["stage"] == Stage.PROMOTING:
        step = attempt.step(str(known.get("message", "")), reason=Reason.PROMOTING)
        return replace(step, stable=wanted.digest, previous=base.stable)
    if not canaries:
        return _elsewhere(attempt)
    match Stage(known["stage"]):
        case Stage.BASELINE:
            return _baseline(attempt)
        case Stage.CANARY:
            return _await_canary(attempt)
        case Stage.AWAITING_APPROVAL:
            return _await_approval(attempt)
    return _analyse(attempt)


def _elsewhere(attempt: Attempt) -> Step:
    """A scale-down, a drain or a rollout of the engine took the canaries: the policy is tried on other pods."""
    moves = int(attempt.state.get("moves") or 0) + 1
    if moves > MAX_MOVES:
        return attempt.back(f"the canary pods were taken away {moves} times before they could be judged")
    known = {"candidate": attempt.wanted.digest, "attempt": attempt.known.get("attempt", 1), "state": {"moves": moves}}
    return _begin(attempt.snapshot, attempt.spec, attempt.base, attempt.wanted, known)


def _begin(snapshot: Snapshot, spec: SereDeploymentSpec, base: Step, wanted: Wanted, known: Object) -> Step:
    """Choose canary pods: ready ones of the newest template; those already annotated first (the status was lost)."""
    pods = suited(snapshot, wanted)
    live = [pod for pod in pods if pod.ready and pod.state is not None and not _is_old(snapshot, pod)]
    total = spec.wanted_replicas if spec.wanted_replicas is not None else len(snapshot.live_pods)
    floor = least_ready(total - len(wanted.misfits), spec.rollout.unavailable)
    moves = (known.get("state") or {}).get("moves")
    kept = known if moves else None  # so that the number of moves is not forgotten while pods are waited for
    if not live or len(live) < floor:
        message = f"policy {wanted.digest} waits for its canary until {floor} pods are ready ({len(live)} of {total} are)"
        return replace(base, rollout=kept, reason=Reason.POLICY_PENDING, message=message, requeue_after=5.0)
    policy = snapshot.status.get("policy") or {}
    since = seconds(policy.get("wantedSince")) if policy.get("wanted") == wanted.digest else snapshot.now
    if snapshot.now - since < CALM_S:
        message = f"policy {wanted.digest} is tried once the spec has been left alone for {CALM_S:g} s"
        return replace(base, rollout=kept, reason=Reason.POLICY_PENDING, message=message, requeue_after=CALM_S)
    live.sort(key=lambda pod: (pod.annotations.get(meta.POLICY_ANNOTATION) != wanted.digest, pod.name))
    count = min(spec.rollout.canary.replicas, max(1, len(live) - 1), MAX_CANARY_PODS)
    chosen = live[:count]
    alone = count == len(live)
    message = f"policy {wanted.digest} ({wanted.entry.policy.describe()}) is tried on {', '.join(pod.name for pod in chosen)}"
    state = {"restarts": {pod.uid: pod.restarts for pod in chosen}, "alone": alone, "since": stamp(snapshot.now)}
    rollout = {
        "candidate": wanted.digest, "attempt": known.get("attempt", 1), "canaryPods": [pod.name for pod in chosen],
        "startedAt": stamp(snapshot.now), "stage": (Stage.BASELINE if alone and golden_count(wanted) else Stage.CANARY).value,
        "state": {**state, "moves": moves} if moves else state, "message": message,
    }  # fmt: skip
    event = Event("Normal", "CanaryMoved" if moves else "CanaryStarted", message[:1000])
    return replace(base, rollout=rollout, reason=Reason.CANARY, message=message, events=(event,), requeue_after=0.1)


def least_ready(total: int, unavailable: int) -> int:
    """Pods that must be ready before a canary begins: a fleet that is never whole must not keep a policy for ever.

    As many may be missing as may be drained; but with more than one pod there are two, one to compare with.
    """
    return max(min(2, total), total - max(1, unavailable))


def _is_old(snapshot: Snapshot, pod: PodView) -> bool:
    """Belongs to a ReplicaSet that the Deployment is replacing: not of the newest pods' pod-template-hash."""
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
    refused = next((f"pod {pod.name} says: {pod.error}" for pod in attempt.canaries if pod.error), None)
    since = attempt.state.get("refusedSince")
    if bool(refused) != bool(since):
        attempt = attempt.noting(refusedSince=stamp(now) if refused else None)
    elif refused and now - seconds(since) > APPLY_GRACE_S and attempt.snapshot.watched_s >= APPLY_GRACE_S:
        return attempt.back(f"the canary did not apply the policy; {refused}")
    if attempt.overdue:
        return attempt.back("the canary did not show the policy in time")
    return attempt.step(f"waiting for the canary to show {digest}" + (f"; {refused}" if refused else ""), requeue_after=1.0)


def _strayed(attempt: Attempt, *, turns: bool) -> bool:
    """Whether a canary runs something else than it should; one that does not answer, or not with one voice, has not."""
    right = (None, attempt.wanted.digest, attempt.base.stable if turns else None)
    return any(pod.digest not in right for pod in attempt.canaries)


def _with_golden(attempt: Attempt) -> Attempt:
    known = collect_golden(attempt.snapshot, attempt.known, "canary", attempt.wanted.digest)
    if not attempt.alone:
        known = collect_golden(attempt.snapshot, known, "stable", attempt.base.stable)
    return replace(attempt, known=known)


def _analyse(attempt: Attempt) -> Step:
    wanted, prompts = attempt.wanted, golden_count(attempt.wanted)
    turns = attempt.alone and not wanted.by_hand
    if _strayed(attempt, turns=turns):
        return attempt.back("the canary stopped running the policy while it was being compared")
    attempt = _with_golden(attempt)
    answered = golden_answers(attempt.known, "canary") and golden_answers(attempt.known, "stable")
    if prompts and not attempt.overdue and not answered:
        # Latency is counted from after the golden prompts on: they are not the traffic that is served.
        return attempt.step(
            f"{prompts} golden prompts, of known answer, go to the canary and to the stable side, pods under the old policy"
        )
    if wanted.profile is not None and not prompts:
        return _ask(attempt, "the profile has no golden prompts, so the canary cannot be checked for harm to answers")
    if wanted.profile is not None and (why := golden_beyond_reach(wanted.profile.policy)):
        return _ask(attempt, why)
    attempt, stable, canary = attempt.compared()
    if stable is None or canary is None:
        if attempt.overdue:
            return attempt.back("the latency histograms of both sides could not be read in time")
        return attempt.step("counting requests from now on")
    verdict = attempt.judged(stable, canary, deadline_over=attempt.overdue)
    unsettled = wanted.by_hand and attempt.in_stage_s < SETTLE_S and verdict.outcome is Outcome.PASSED
    if verdict.outcome is Outcome.PENDING or unsettled:
        lacking = (canary.requests < attempt.needed, stable.requests < attempt.needed)
        mine = not turns or candidates_turn(attempt.counted_s, *lacking)
        step = attempt.step(verdict.message, annotated=mine)
        return replace(step, in_turns=frozenset(pod.name for pod in attempt.canaries)) if turns else step
    if verdict.outcome is Outcome.REJECTED:
        return reject(attempt.base, attempt.spec, attempt.known, attempt.now, verdict.message)
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

    Args:
        elapsed_s: seconds since requests are counted.
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
    step = _await_approval(moved)
    return replace(step, events=(*step.events, Event("Normal", "AwaitingApproval", _approve_by(moved))))


def _await_approval(attempt: Attempt) -> Step:
    """Nobody has approved yet. Canaries beside other pods run the policy and are judged on; one pod alone goes back.

    Evidence is gathered in windows of `WINDOW_S`, so that harm that begins late is not outweighed by what was good before.
    """
    if attempt.snapshot.annotations.get(meta.APPROVED_ANNOTATION) == attempt.wanted.digest:
        return _promote(attempt, "approved")
    if attempt.alone:
        message = f"{_approve_by(attempt)}; until then the only pod runs {attempt.base.stable}"
        return attempt.step(message, annotated=False, reason=Reason.AWAITING_APPROVAL, requeue_after=30.0)
    if _strayed(attempt, turns=False):
        return attempt.back("the canary stopped running the policy while it waited for approval")
    if attempt.counted_s >= WINDOW_S:
        attempt = attempt.noting(start=None, stableStart=None, countedSince=None, golden=None)
    attempt, stable, canary = _with_golden(attempt).compared()
    if stable is not None and canary is not None:
        verdict = attempt.judged(stable, canary, deadline_over=False)
        if verdict.outcome is Outcome.REJECTED:
            return reject(attempt.base, attempt.spec, attempt.known, attempt.now, verdict.message)
    return attempt.step(_approve_by(attempt), reason=Reason.AWAITING_APPROVAL, requeue_after=10.0)


def _approve_by(attempt: Attempt) -> str:
    why = attempt.known.get("message", "")
    return f"{why}; approve by annotation {meta.APPROVED_ANNOTATION}={attempt.wanted.digest}"
