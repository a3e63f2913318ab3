"""What a verdict leaves behind in the status: what is banned, what is tried again and when. Pure."""

from __future__ import annotations

from dataclasses import replace

from sere_operator.api.conditions import Reason
from sere_operator.api.deployment import SereDeploymentSpec
from sere_operator.api.deployment_status import MAX_REJECTED
from sere_operator.plan.objects.revision import revision
from sere_operator.plan.rollout.evidence import Stage
from sere_operator.plan.rollout.step import POLL_S, Step
from sere_operator.plan.rollout.wanted import Wanted
from sere_operator.plan.snapshot import Event, Object, Snapshot
from sere_operator.plan.times import seconds, stamp

BACKOFF_S = 300.0  # before an inconclusive policy is tried again; doubles
MAX_BACKOFF_S = 6 * 3600.0


def refused(base: Step, spec: SereDeploymentSpec, wanted: Wanted) -> Step | None:
    """A policy that was rejected for this model and engine is not tried again."""
    known = next((r for r in base.rejected if r["digest"] == wanted.digest and r.get("revision", "") == revision(spec)), None)
    if known is None:
        return None
    message = f"{known.get('message', '')}; policy {wanted.digest} will not be tried again for this model revision"
    return replace(base, reason=Reason.REJECTED, message=message)


def waiting(snapshot: Snapshot, base: Step, known: Object) -> Step | None:
    """After an inconclusive try: wait out the backoff."""
    until = seconds(known.get("nextAttemptAt"))
    if snapshot.now >= until:
        return None
    message = f"{known.get('message', '')}; tried again after {known['nextAttemptAt']}"
    wait = min(60.0, max(POLL_S, until - snapshot.now))
    return replace(base, rollout=known, reason=Reason.INCONCLUSIVE, message=message, requeue_after=wait)


def reject(base: Step, spec: SereDeploymentSpec, known: Object, now: float, why: str) -> Step:
    entry = {"digest": known["candidate"], "revision": revision(spec), "message": why[:512], "at": stamp(now)}
    rejected = (*(r for r in base.rejected if r["digest"] != entry["digest"]), entry)[-MAX_REJECTED:]
    event = Event("Warning", "PolicyRejected", f"policy {known['candidate']}: {why}")
    message = f"{why}; policy {known['candidate']} will not be tried again for this model revision"
    # The pods go back in this same plan: they are written before the status, and a lost status only repeats the canary.
    return replace(
        base, rejected=rejected, rollout=None, reason=Reason.REJECTED, message=message, events=(event,), requeue_after=POLL_S
    )


def inconclusive(base: Step, known: Object, now: float, why: str) -> Step:
    attempt = int(known.get("attempt") or 1)
    wait = min(MAX_BACKOFF_S, BACKOFF_S * 2 ** (attempt - 1))
    rollout = {
        "candidate": known["candidate"],
        "stage": Stage.ROLLING_BACK.value,
        "attempt": attempt + 1,
        "message": why,
        "nextAttemptAt": stamp(now + wait),
    }
    message = f"{why}; tried again after {rollout['nextAttemptAt']}"
    event = Event("Warning", "PolicyInconclusive", f"policy {known['candidate']}: {message}")
    return replace(base, rollout=rollout, reason=Reason.INCONCLUSIVE, message=message, events=(event,), requeue_after=POLL_S)
