"""Leader election by a Lease of coordination.k8s.io, the way client-go does it (tools/leaderelection).

One process leads and reconciles, the others wait. Why not one of those that there are: kopf 1.45 has peering, which is no lock
("NO per-object locks", kopf's peering.py). The Kubernetes client's `kubernetes.leaderelection` has a LeaseLock, but its
loop blocks, so it needs threads beside the event loop; it measures its deadlines with the wall clock, which may be set while
it runs; the work cannot ask it, before each write, whether it still leads; and it never gives the Lease back, so that every
regular restart would cost the whole `lease_s`. Time is judged by the local monotonic clock from when a record was last seen to change, never by
comparing clocks of two machines. A leader that cannot renew within `renew_deadline_s` ends its process; since this is
shorter than `lease_s`, it has stopped writing before another may start.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import structlog

from sere_ext.contract.errors import ApiError, LostLeaseError
from sere_operator.runtime.client import Client

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class LeaseSettings:
    """Seconds as in client-go's defaults: a lost leader is replaced after `lease_s` at most plus one retry.

    Raises:
        ValueError: a leader would still write when another may already have begun.
    """

    namespace: str
    name: str = "sere-operator"
    lease_s: float = 15.0
    renew_deadline_s: float = 10.0
    retry_s: float = 2.0

    def __post_init__(self) -> None:
        if not 2 * self.retry_s <= self.renew_deadline_s < self.lease_s:
            raise ValueError(f"a Lease needs two retries within its deadline and a deadline shorter than itself, not {self}")

    @classmethod
    def of(cls, namespace: str, name: str, lease_s: float) -> LeaseSettings:
        """With deadline and retries in client-go's proportions: 15, 10 and 2 seconds."""
        return cls(namespace, name, lease_s, lease_s * 2 / 3, lease_s * 2 / 15)


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class Elector:
    """Holds the Lease for one identity (unique per process)."""

    def __init__(self, client: Client, settings: LeaseSettings, identity: str) -> None:
        self._client, self._settings, self.identity = client, settings, identity
        self._seen: tuple[str, str] | None = None  # holder and renewTime last seen
        self._seen_at = 0.0
        self.renewed_at = 0.0  # monotonic seconds; 0 before the first time

    @property
    def leads(self) -> bool:
        return self.renewed_at > 0 and time.monotonic() - self.renewed_at < self._settings.renew_deadline_s

    async def _try(self) -> bool:
        """One attempt to take or renew the Lease. False: somebody else holds it."""
        settings = self._settings
        began = time.monotonic()
        lease = await self._client.get("Lease", settings.namespace, settings.name)
        if lease is None:
            body: dict[str, Any] = {
                "apiVersion": "coordination.k8s.io/v1",
                "kind": "Lease",
                "metadata": {"name": settings.name, "namespace": settings.namespace},
                "spec": self._spec(None),
            }
            await self._client.create(body)
        else:
            spec = lease.get("spec") or {}
            holder, renewed = spec.get("holderIdentity") or "", spec.get("renewTime") or ""
            if (holder, renewed) != self._seen:
                self._seen, self._seen_at = (holder, renewed), time.monotonic()
            lasts = float(spec.get("leaseDurationSeconds") or settings.lease_s)
            if holder and holder != self.identity and time.monotonic() - self._seen_at < lasts:
                return False
            lease["spec"] = self._spec(spec if holder == self.identity else None, spec.get("leaseTransitions", 0))
            await self._client.replace(lease)  # guarded by the resourceVersion just read
        self.renewed_at = began
        return True

    def _spec(self, held: dict[str, Any] | None, transitions: int = -1) -> dict[str, Any]:
        now = _now()
        return {
            "holderIdentity": self.identity,
            "leaseDurationSeconds": round(self._settings.lease_s),
            "acquireTime": held["acquireTime"] if held and held.get("acquireTime") else now,
            "renewTime": now,
            "leaseTransitions": held.get("leaseTransitions", 0) if held else transitions + 1,
        }

    async def acquire(self) -> None:
        """Return once this process leads."""
        while True:
            try:
                if await self._try():
                    log.info("leading", identity=self.identity)
                    return
            except ApiError as error:
                if error.status != 409:  # 409: another was quicker, which is normal
                    log.warning("lease", error=str(error))
            await asyncio.sleep(self._settings.retry_s)

    async def hold(self) -> None:
        """Renew for ever.

        Raises:
            LostLeaseError: somebody else holds it, or it could not be renewed within `renew_deadline_s`.
        """
        while True:
            await asyncio.sleep(self._settings.retry_s)
            try:
                left = self._settings.renew_deadline_s - (time.monotonic() - self.renewed_at)
                # Two attempts fit in, so that one lost request does not lose the Lease.
                async with asyncio.timeout(max(0.1, min(left, self._settings.renew_deadline_s / 2))):
                    if not await self._try():
                        raise LostLeaseError(f"the lease {self._settings.name} is held by another process")
            except LostLeaseError:
                raise
            except Exception as error:
                log.warning("lease not renewed", error=repr(error))
            if not self.leads:
                raise LostLeaseError(
                    f"the lease {self._settings.name} was not renewed for {self._settings.renew_deadline_s:.0f} s"
                )

    async def release(self) -> None:
        """Give the Lease back on a regular end, so that a successor need not wait for it to run out."""
        if not self.leads:
            return
        try:
            lease = await self._client.get("Lease", self._settings.namespace, self._settings.name)
            if lease and lease["spec"].get("holderIdentity") == self.identity:
                lease["spec"] = {**lease["spec"], "holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": _now()}
                await self._client.replace(lease)
        except Exception as error:
            log.warning("lease not released", error=repr(error))


async def lead(elector: Elector, work: Callable[[], Awaitable[None]]) -> None:
    """Wait for the Lease, then run `work` until it ends or the Lease is lost.

    Raises:
        LostLeaseError: the caller must end the process at once.
    """
    await elector.acquire()
    holding = asyncio.create_task(elector.hold())
    working = asyncio.ensure_future(work())
    try:
        await asyncio.wait({holding, working}, return_when=asyncio.FIRST_COMPLETED)
        if holding.done():
            holding.result()  # raises LostLeaseError
        working.result()
    finally:
        holding.cancel()
        working.cancel()
        await asyncio.gather(holding, working, return_exceptions=True)
