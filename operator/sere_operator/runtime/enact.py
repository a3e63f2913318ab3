"""Every write of the operator: carries out a Plan, in the plan's order. Each write may be repeated without harm."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, datetime
from functools import partial

import structlog

from sere_ext.contract.errors import ApiError, NotLeadingError
from sere_operator.api import meta
from sere_operator.plan.refusal import Refusal, refused
from sere_operator.plan.snapshot import Event, Object, Plan, Resource
from sere_operator.runtime.client import Client
from sere_operator.runtime.echoes import Echoes

log = structlog.get_logger(__name__)


# HTTP statuses by which the API server refuses an object as it is; 500 is its answer where a webhook is down.
REFUSALS = frozenset({400, 403, 405, 413, 422, 500})


async def enact(client: Client, resource: Resource, plan: Plan, leads: Callable[[], bool], echoes: Echoes) -> Plan:
    """Write what the plan says: children, then status, then events. Returns the plan that its status and events are of.

    What the API server refuses stands in the status at once (`plan.refusal`), with the server's own sentence.

    Args:
        leads: whether this process holds the Lease.
        echoes: learns of a status before it is written, since the watch may show it before the API server answers.

    Raises:
        NotLeadingError: before a write, when `leads()` is false.
        ApiError: a write failed in a way that the next try may mend: the server cannot be reached, or somebody was quicker.
    """

    def guard() -> None:
        if not leads():
            raise NotLeadingError

    owner, namespace = resource.object, resource.namespace
    refusals: list[Refusal] = []
    for kind, name, write in _writes(client, namespace, plan):
        guard()
        try:
            await write()
        except ApiError as error:
            if kind == "Pod" and error.status in (404, 409):
                continue  # gone, or another pod of that name: the next reconciliation sees it
            if error.status not in REFUSALS:
                raise
            refusals.append(Refusal(kind, name, error.words))
            if refusals[-1].ends_the_plan:
                break
    if refusals:
        log.warning(
            "refused", kind=owner["kind"], namespace=namespace, name=resource.name, refused=[str(one) for one in refusals]
        )
        plan = refused(resource, plan, refusals)
    if plan.status is not None:
        guard()
        body = {"metadata": {"uid": owner["metadata"]["uid"]}, "status": plan.status}
        echoes.expect(resource, plan.status)
        try:
            await client.patch(owner["kind"], namespace, resource.name, body, subresource="status")
        except ApiError as error:
            if error.status not in (404, 409):
                raise
    for event in plan.events:
        guard()
        await post(client, owner, event)
    return plan


def _writes(client: Client, namespace: str, plan: Plan) -> Iterator[tuple[str, str, Callable[[], Awaitable[object]]]]:
    """The writes to children in the plan's order: kind, name, and what carries it out."""
    for body in plan.replace:
        yield body["kind"], body["metadata"]["name"], partial(client.replace, body)
    for body in plan.hand_over:
        yield body["kind"], body["metadata"]["name"], partial(client.apply, body, manager=meta.REPLICAS_MANAGER)
    for body in plan.apply:
        yield body["kind"], body["metadata"]["name"], partial(client.apply, body)
    for patch in plan.pods:
        annotated = {"metadata": {"uid": patch.uid, "annotations": patch.annotations}}
        yield "Pod", patch.name, partial(client.patch, "Pod", namespace, patch.name, annotated)
    for body in plan.delete:
        metadata = body["metadata"]
        yield body["kind"], metadata["name"], partial(client.delete, body["kind"], namespace, metadata["name"], metadata["uid"])


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
        "source": {"component": meta.FIELD_MANAGER},
        "reportingComponent": meta.FIELD_MANAGER,
        "firstTimestamp": now,
        "lastTimestamp": now,
        "count": 1,
    }
    try:
        await client.create(body)
    except ApiError as error:
        if error.status != 409:
            log.warning("event not posted", reason=event.reason, error=str(error))
