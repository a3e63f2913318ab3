"""Why a pod does not come up, in the words of the scheduler, the kubelet or the API server. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

Object = dict[str, Any]

SCHEDULING_GRACE_S = 10.0  # claims are being bound, caches are filling
_ON_ITS_WAY = ("ContainerCreating", "PodInitializing")  # what a container waits for that nothing is wrong with


@dataclass(frozen=True)
class Trouble:
    """What keeps a pod from running.

    reason   the kubelet's own word (`ImagePullBackOff`), or Unschedulable, Crashed, Evicted
    message  a sentence without the pod's name
    """

    reason: str
    message: str

    @property
    def no_room(self) -> bool:
        """No node has what the pod asks for."""
        return self.reason == "Unschedulable" and "Insufficient" in self.message


def not_created(deployment: Object | None) -> str | None:
    """Why a Deployment's pods are not even created (quota, LimitRange, admission, runtime class), in the API server's words."""
    for condition in ((deployment or {}).get("status") or {}).get("conditions") or []:
        if condition.get("type") == "ReplicaFailure" and condition.get("status") == "True":
            return _words(condition.get("message"), str(condition.get("reason") or "no reason is given"))
    return None


def pods_refused(events: Iterable[Object], maker: str) -> str | None:
    """Why no pod of a Job can be created (quota, admission, a missing ServiceAccount), in the API server's words.

    A Job has no condition that tells, only Events. Pods' random names are taken out, so that each try says the same.

    Args:
        events: core/v1 Events about the Job.
        maker: the Job's name.
    """
    told = [event for event in events if event.get("reason") in ("FailedCreate", "SuccessfulCreate")]
    newest = max(told, key=lambda event: str(event.get("lastTimestamp") or event.get("eventTime") or ""), default={})
    if newest.get("reason") != "FailedCreate":
        return None
    text = _words(newest.get("message"), "no reason is given").removeprefix("(combined from similar events): ")
    return re.sub(rf'"{re.escape(maker)}-[a-z0-9]+"', f'"{maker}"', text.removeprefix("Error creating: "))


def trouble(pod: Object, now: float | None = None) -> Trouble | None:
    """What keeps this pod from running, None if nothing is known to.

    Args:
        now: seconds since the epoch; given, a pod that cannot be scheduled is believed only after `SCHEDULING_GRACE_S`.
    """
    status = pod.get("status") or {}
    if pod["metadata"].get("deletionTimestamp"):
        return None
    return _unscheduled(status, now) or _waiting(status) or _ended(pod["metadata"].get("name", ""), status)


def _unscheduled(status: Object, now: float | None) -> Trouble | None:
    for condition in status.get("conditions") or []:
        if condition["type"] != "PodScheduled" or condition["status"] != "False":
            continue
        since = condition.get("lastTransitionTime")
        if now is not None and since and now - datetime.fromisoformat(since).timestamp() < SCHEDULING_GRACE_S:
            continue
        text = _words(condition.get("message"), "no node fits").rstrip(". ")
        cause = "InsufficientGPU: " if "gpu" in text.lower() and "Insufficient" in text else ""
        return Trouble("Unschedulable", cause + text)
    return None


def _containers(status: Object) -> Iterator[Object]:
    yield from (*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or []))


def _waiting(status: Object) -> Trouble | None:
    for container in _containers(status):
        waiting = (container.get("state") or {}).get("waiting") or {}
        reason = str(waiting.get("reason") or "")
        if not reason or reason in _ON_ITS_WAY:
            continue
        text = _words(waiting.get("message"), str(container.get("image") or reason))
        last = (container.get("lastState") or {}).get("terminated")
        return Trouble(reason, f"{_last_words(last)}; {text}" if last else text)
    return None


def _ended(name: str, status: Object) -> Trouble | None:
    """A container that crashed and has not come back yet, or a pod that was evicted."""
    if status.get("phase") == "Failed":
        return Trouble(str(status.get("reason") or "Failed"), _words(status.get("message"), "the pod failed"))
    for container in _containers(status):
        last = (container.get("state") or {}).get("terminated") or (container.get("lastState") or {}).get("terminated")
        if last and int(last.get("exitCode") or 0) != 0 and not container.get("ready"):
            restarts = int(container.get("restartCount") or 0)
            return Trouble("Crashed", f"{_last_words(last)} ({restarts} restarts; kubectl logs {name} --previous tells more)")
    return None


def _last_words(ended: Object) -> str:
    """Exit code and last log lines of a container that ended."""
    told = _words(ended.get("message"), str(ended.get("reason") or ""))[-400:]
    return f"exit code {ended.get('exitCode')}{f': {told}' if told else ''}"


def _words(text: object, otherwise: str) -> str:
    return " ".join(str(text or otherwise).split())[:800]
