"""What the operator could write at once, and writes little by little: pods of an upgrade, and counts in a status.

Without the first, an upgrade with another default image replaces every engine of the cluster within seconds. What a user edits
never waits: it replaces the pods of one model, and the user knows of it. Without the second, a canary writes a status at every
read of its pods' histograms, only to say that one more request has finished.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import structlog

from sere_operator.api import meta
from sere_operator.plan.objects.revision import replacing
from sere_operator.plan.patch import merged, only_messages
from sere_operator.plan.snapshot import Object, Plan, Resource, Snapshot
from sere_operator.runtime.reconciler import Key

log = structlog.get_logger(__name__)

STUCK_S = 1800.0  # after which a rollout that does not end keeps no other waiting
RETRY_S = 15.0
MESSAGES_S = 5.0  # between two writes of a status in which nothing but a message has changed
FOLLOW_S = 0.1  # after a status that changed otherwise: it may call for the next step, and no event will tell


@dataclass
class Rollouts:
    """Which Deployments are replacing pods, as the last reconciliation of each saw it. In memory: a new process sees them again.

    limit  Deployments at a time, 1 or more
    """

    limit: int
    clock: Callable[[], float] = time.monotonic
    _began: dict[Key, float] = field(default_factory=dict)

    def paced(self, key: Key, snapshot: Snapshot, plan: Plan) -> Plan:
        """The plan, without its Deployment where too many others are replacing pods."""
        live, now = snapshot.children.get("Deployment"), self.clock()
        if live is None or replacing(snapshot) is None:
            self._began.pop(key, None)
        else:
            self._began.setdefault(key, now)
        wanted = next((body for body in plan.apply if body["kind"] == "Deployment"), None)
        if live is None or wanted is None or _hash(wanted) == _hash(live):
            return plan  # the first one, or nothing new: a foreign edit that is put back
        others = [began for other, began in self._began.items() if other != key and now - began < STUCK_S]
        edited = snapshot.generation > int(snapshot.status.get("observedGeneration") or 0)
        if edited or len(others) < self.limit:
            self._began[key] = now
            return plan
        log.info("rollout waits", namespace=key[1], name=key[2], under_way=len(others))
        waits = RETRY_S if plan.requeue_after is None else min(RETRY_S, plan.requeue_after)
        return replace(plan, apply=[body for body in plan.apply if body is not wanted], requeue_after=waits)

    def forget(self, key: Key) -> None:
        """The resource is gone."""
        self._began.pop(key, None)


def _hash(deployment: Object) -> str | None:
    """Of what the operator means the Deployment to be."""
    found = (deployment["metadata"].get("annotations") or {}).get(meta.CONFIG_HASH_ANNOTATION)
    return str(found) if found is not None else None


@dataclass
class Progress:
    """When the status of each resource was last written. In memory: a new process may write at once."""

    clock: Callable[[], float] = time.monotonic
    _written: dict[Key, float] = field(default_factory=dict)

    def paced(self, key: Key, seen: Resource, plan: Plan) -> Plan:
        """The plan; without its status where that is all there is to write, only messages change, and one was written a moment ago."""
        left_s = self._written.get(key, -math.inf) + MESSAGES_S - self.clock()
        if plan.status is None or plan.writes > 1 or plan.events or left_s <= 0 or not _only_messages(seen, plan):
            return plan
        waits_s = left_s if plan.requeue_after is None else min(left_s, plan.requeue_after)
        return replace(plan, status=None, requeue_after=waits_s)

    def written(self, key: Key, seen: Resource, plan: Plan) -> Plan:
        """The plan that was carried out; due again soon where its status has changed in more than messages."""
        if plan.status is None:
            return plan
        self._written[key] = self.clock()
        if _only_messages(seen, plan):
            return plan
        waits_s = FOLLOW_S if plan.requeue_after is None else min(FOLLOW_S, plan.requeue_after)
        return replace(plan, requeue_after=waits_s)

    def forget(self, key: Key) -> None:
        """The resource is gone."""
        self._written.pop(key, None)


def _only_messages(seen: Resource, plan: Plan) -> bool:
    return only_messages(seen.status, merged(seen.status, plan.status or {}))
