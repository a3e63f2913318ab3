"""Every write of the operator: carries out a Plan, in the plan's order. Each write may be repeated without harm."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import UTC, datetime

import structlog

from sere_operator.api import meta
from sere_operator.plan.snapshot import Event, Object, Plan
from sere_operator.runtime.client import FIELD_MANAGER, ApiError, Client

log = structlog.get_logger(__name__)


class NotLeadingError(Exception):
    """The Lease is not held any more; nothing may be written."""


async def enact(client: Client, owner: Object, plan: Plan, leads: Callable[[], bool]) -> None:
    """Write what the plan says.

    Raises:
        NotLeadingError: before a write, when `leads()` is false.
        ApiError: the API server refused something other than a lost race on a pod or a deleted owner.
    """

    def guard() -> None:
        if not leads():
            raise NotLeadingError

    namespace = owner["metadata"]["namespace"]
    for body in plan.replace:
        guard()
        await client.replace(body)
    for body in plan.hand_over:
        guard()
        await client.apply(body, manager=meta.REPLICAS_MANAGER)
    for body in plan.apply:
        guard()
        await client.apply(body)
    for patch in plan.pods:
        guard()
        body = {"metadata": {"uid": patch.uid, "annotations": patch.annotations}}
        try:
            await client.patch("Pod", namespace, patch.name, body)
        except ApiError as error:
            if error.status not in (404, 409):  # gone, or another pod of that name: the next look sees it
                raise
    for body in plan.delete:
        guard()
        await client.delete(body["kind"], namespace, body["metadata"]["name"], body["metadata"]["uid"])
    if plan.status is not None:
        guard()
        try:
            await client.patch(
                owner["kind"], namespace, owner["metadata"]["name"],
                {"metadata": {"uid": owner["metadata"]["uid"]}, "status": plan.status}, subresource="status",
            )  # fmt: skip
        except ApiError as error:
            if error.status not in (404, 409):
                raise
    for event in plan.events:
        guard()
        await post(client, owner, event)


async def post(client: Client, owner: Object, event: Event) -> None:
    """A core/v1 Event. The same words within one second are one event; a lost event is only logged."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    text = f"{owner['metadata']['uid']}/{event.reason}/{event.message}/{now}"
    name = f"{owner['metadata']['name'][:200]}.{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    body: Object = {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": name, "namespace": owner["metadata"]["namespace"]},
        "involvedObject": {
            "apiVersion": meta.API_VERSION,
            "kind": owner["kind"],
            "name": owner["metadata"]["name"],
            "namespace": owner["metadata"]["namespace"],
            "uid": owner["metadata"]["uid"],
            "resourceVersion": owner["metadata"].get("resourceVersion"),
        },
        "type": event.type,
        "reason": event.reason,
        "message": event.message[:1024],
        "source": {"component": FIELD_MANAGER},
        "reportingComponent": FIELD_MANAGER,
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }
    try:
        await client.create(body)
    except ApiError as error:
        if error.status != 409:
            log.warning("event not posted", reason=event.reason, error=str(error))
