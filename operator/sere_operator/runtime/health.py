"""/healthz, /readyz and /metrics of the operator process."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from aiohttp import web
from prometheus_client import CollectorRegistry, Gauge, generate_latest

from sere_operator.runtime.client import Client
from sere_operator.runtime.reconciler import Reconciler

STALE_WATCH_S = 120.0


@dataclass
class Health:
    """What is known about the process itself.

    A watch may die without an error. Its age shows by comparison: the resync lists the resources, and one whose
    version the watch has not shown by the next pass means that the watch is blind since then.
    """

    reconciler: Reconciler
    clients: tuple[Client, ...]
    leading: bool = False
    blind_since: float | None = None  # monotonic seconds
    _registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        for name, text, value in (
            ("sere_operator_leading", "1 where this process holds the Lease", lambda: float(self.leading)),
            ("sere_operator_resources", "resources known", lambda: float(len(self.reconciler.entries))),
            ("sere_operator_reconciliations_total", "reconciliations that succeeded", lambda: float(self.reconciler.reconciled)),
            ("sere_operator_reconciliation_errors_total", "reconciliations that failed", lambda: float(self.reconciler.failed)),
            ("sere_operator_reads_total", "reads of the API server, but for the Lease", lambda: float(self.clients[0].reads)),
            (
                "sere_operator_writes_total",
                "writes to the API server",
                lambda: float(sum(client.writes for client in self.clients)),
            ),
            ("sere_operator_watch_blind_seconds", "since when the watch misses changes", self.blind_s),
        ):
            Gauge(name, text, registry=self._registry).set_function(value)

    def blind_s(self) -> float:
        return 0.0 if self.blind_since is None else time.monotonic() - self.blind_since

    @property
    def healthy(self) -> bool:
        return self.blind_s() < STALE_WATCH_S

    async def serve(self, host: str | None, port: int) -> int:
        """Start to answer; returns the port. Host None: on every address, IPv4 and IPv6."""

        async def healthz(_: web.Request) -> web.Response:
            text = "ok" if self.healthy else f"the watch misses changes since {self.blind_s():.0f} s"
            return web.Response(status=200 if self.healthy else 503, text=text)

        async def readyz(_: web.Request) -> web.Response:  # a standby is ready too: it waits for the Lease
            return web.Response(text="leading" if self.leading else "standby")

        async def metrics(_: web.Request) -> web.Response:
            return web.Response(body=generate_latest(self._registry), content_type="text/plain")

        app = web.Application()
        app.add_routes([web.get("/healthz", healthz), web.get("/readyz", readyz), web.get("/metrics", metrics)])
        runner = web.AppRunner(app, handle_signals=False, shutdown_timeout=1.0)
        await runner.setup()
        site = web.TCPSite(runner, host, port)
        await site.start()
        return int(runner.addresses[0][1])
