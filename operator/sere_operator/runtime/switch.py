"""The kill switch on a lane of its own: from the annotation on a SereDeployment to its pods, past everything else.

It has its own threads and connections to the API server and asks no pod anything, so neither many resources nor pods that
hang can delay it. It reads no spec, so it works for resources that are suspended or invalid. It only turns re-routing off;
turning it on again, and the policy ConfigMap, are the reconciler's business.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import structlog

from sere_ext.contract.errors import ApiError, NotLeadingError
from sere_operator.api import meta
from sere_operator.plan.snapshot import Object, PodPatch
from sere_operator.runtime.client import Client
from sere_operator.runtime.reconciler import Key, Place

log = structlog.get_logger(__name__)


def pulled(resource: Object) -> bool:
    """Whether the annotation on a SereDeployment turns re-routing off."""
    return bool((resource["metadata"].get("annotations") or {}).get(meta.OVERRIDE_ANNOTATION) == meta.OVERRIDE_EXACT)


def patches(pods: Iterable[Object]) -> list[PodPatch]:
    """What turns re-routing off in the pods that do not have it off yet."""
    wanted: dict[str, str | None] = {meta.OVERRIDE_ANNOTATION: meta.OVERRIDE_EXACT}
    return [
        PodPatch(pod["metadata"]["name"], pod["metadata"]["uid"], wanted)
        for pod in pods
        if not pulled(pod) and not pod["metadata"].get("deletionTimestamp")
    ]


class KillSwitch:
    """`work` is for a Reconciler that has no other work."""

    def __init__(self, client: Client, leads: Callable[[], bool]) -> None:
        self._client, self._leads = client, leads

    async def work(self, key: Key, _: Place) -> None:
        """Place re-routing off in every pod of this SereDeployment, if its annotation says so.

        Raises:
            NotLeadingError: the Lease is not held any more.
            ApiError: the API server refused something other than a patch of a pod that is gone.
        """
        kind, namespace, name = key
        found = await self._client.get(kind, namespace, name)
        if found is None or not pulled(found):
            return
        wanted = patches(await self._client.list("Pod", namespace, meta.engine_selector(name)))
        if not wanted:
            return
        log.info("kill switch", namespace=namespace, name=name, pods=[patch.name for patch in wanted])
        results = await asyncio.gather(*(self._patch(namespace, patch) for patch in wanted), return_exceptions=True)
        for result in results:  # one pod that cannot be patched must not keep the others from it
            if isinstance(result, BaseException):
                raise result

    async def _patch(self, namespace: str, patch: PodPatch) -> None:
        if not self._leads():
            raise NotLeadingError
        try:
            body = {"metadata": {"uid": patch.uid, "annotations": patch.annotations}}
            await self._client.patch("Pod", namespace, patch.name, body)
        except ApiError as error:
            if error.status not in (404, 409):  # gone, or another pod of that name
                raise
