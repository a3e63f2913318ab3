"""The operator process: wait for the Lease, then watch and reconcile until a signal ends it or the Lease is lost.

Run by `sere operator run` or `python -m sere_operator.runtime.main`.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import math
import os
import random
import signal
import sys
import time
from dataclasses import replace
from functools import partial

import kopf
import structlog

from sere_ext.contract.errors import ApiError, LostLeaseError, NotLeadingError
from sere_operator.api import meta
from sere_operator.kube import Api, in_cluster_or_kubeconfig
from sere_operator.plan.decide import decide
from sere_operator.plan.ownership import YIELD_S, marked, yielded
from sere_operator.plan.snapshot import Event, Plan, Resource, Snapshot
from sere_operator.plan.tuning.decide import decide_tuning
from sere_operator.runtime import handlers
from sere_operator.runtime.attention import Attention
from sere_operator.runtime.cache import Cache, FreshReads, RememberedReads
from sere_operator.runtime.client import Client
from sere_operator.runtime.echoes import Echoes
from sere_operator.runtime.enact import enact
from sere_operator.runtime.health import Health
from sere_operator.runtime.lease import Elector, LeaseSettings, lead
from sere_operator.runtime.observe import Reads, Told, observe, observe_tuning
from sere_operator.runtime.pacing import Progress, Rollouts
from sere_operator.runtime.probe import Prober
from sere_operator.runtime.reconciler import Key, Place, Reconciler
from sere_operator.runtime.settings import Settings
from sere_operator.runtime.switch import KillSwitch

log = structlog.get_logger(__name__)


def configure_logging() -> None:
    """JSON lines on stderr, kopf's among them."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.processors.JSONRenderer()],
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(processor=structlog.processors.JSONRenderer(), foreign_pre_chain=shared)
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)


class Operator:
    """Wires the parts of one process together."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.client = Client(Api(in_cluster_or_kubeconfig(), meta.FIELD_MANAGER))
        self.prober = Prober()
        self.reconciler = Reconciler(self.work, workers=settings.workers)
        # The kill switch and the Lease have threads and connections of their own, so that nothing else delays them.
        self.urgent = Client(Api(in_cluster_or_kubeconfig(), meta.FIELD_MANAGER, timeout_s=5.0), threads=8)
        self.switch = Reconciler(KillSwitch(self.urgent, lambda: self.elector.leads).work, workers=settings.workers)
        self.attention = Attention()
        self._token_problems: dict[Key, str] = {}  # the last Warning about refused tokens, by resource
        self.rollouts = Rollouts(settings.engine_rollouts)
        self.progress = Progress()
        self.cache = Cache()
        self._read_at: dict[Key, float] = {}  # when a resource was last read from the API server, monotonic seconds
        self._challenged: dict[str, float] = {}  # by uid: when another operator's ownership was last asked about
        self.echoes = Echoes()
        self.wakes = handlers.Wakes(self.reconciler, self.switch, self.echoes)
        self.health = Health(self.reconciler, (self.client, self.urgent))
        lease = LeaseSettings.of(settings.namespace, settings.lease_name, settings.lease_s)
        self.elector = Elector(self.urgent, lease, settings.identity)
        self._stop = asyncio.Event()

    async def work(self, key: Key, place: Place) -> float | None:
        """Reconcile one resource. Returns the seconds until it is due again, None if it is gone."""
        watched_s = self.attention.begin(key)
        next_s = await self._reconcile(key, watched_s, place)
        self.attention.end(key, next_s)
        return next_s

    async def _reconcile(self, key: Key, watched_s: float, place: Place) -> float | None:
        """Decide by what the watches have shown; where that is not to be trusted, or something is to be written, by new reads."""
        kind, namespace, name = key
        api_key, problem = await self._api_key(key)
        prober = self.prober.for_resource(partial(self.reconciler.wake, key), place.aside, api_key)
        told: Told = {}
        if time.monotonic() - self._read_at.get(key, -math.inf) < self.settings.resync_s:
            remembered = await self._decided(key, RememberedReads(self.client, self.cache), prober, watched_s, told, problem)
            quiet = self._quiet(key, *remembered) if remembered is not None else None
            if quiet is not None:
                return quiet.requeue_after
        found = await self._decided(key, FreshReads(self.client, self.cache), prober, watched_s, told, problem)
        if found is None:
            self._forget(key)
            return None
        self._read_at[key] = time.monotonic()
        seen, plan = found
        if isinstance(seen, Snapshot):
            plan = self.rollouts.paced(key, seen, plan)
            self._warn_of_tokens(key, plan, seen.tokens_refused)
        plan = self.progress.paced(key, seen, self._claimed(seen, plan) or marked(seen, plan, self.settings.instance))
        if plan.writes:
            log.info(
                "writing", kind=kind, namespace=namespace, name=name, generation=seen.generation,
                replace=[body["kind"] for body in plan.replace],
                hand_over=[body["kind"] for body in plan.hand_over], apply=[body["kind"] for body in plan.apply],
                pods={patch.name: patch.annotations for patch in plan.pods}, delete=[body["kind"] for body in plan.delete],
                status=sorted(plan.status or {}),
            )  # fmt: skip
        written = await enact(self.client, seen, plan, lambda: self.elector.leads, self.echoes)
        return self.progress.written(key, seen, written).requeue_after

    async def _decided(
        self, key: Key, reads: Reads, prober: Prober, watched_s: float, told: Told, problem: str
    ) -> tuple[Resource, Plan] | None:
        """What these reads show of a resource, and what is to be done for it; None where it is gone."""
        kind, namespace, name = key
        defaults = self.settings.defaults
        if kind == meta.TUNING_JOB_KIND:
            run = await observe_tuning(reads, prober, namespace, name, defaults)
            return None if run is None else (run, decide_tuning(run, defaults))
        snapshot = await observe(reads, prober, namespace, name, defaults, told)
        if snapshot is None:
            return None
        refused = problem or "; ".join(prober.refusals)
        snapshot = replace(snapshot, watched_s=watched_s, tokens_refused=refused)
        return snapshot, decide(snapshot, defaults)

    def _quiet(self, key: Key, seen: Resource, plan: Plan) -> Plan | None:
        """The plan for a resource of this operator's, if nothing is to be written or said for it now."""
        if seen.status.get("operator") != self.settings.instance:
            return None
        plan = marked(seen, plan, self.settings.instance)  # whose patch would else take the operator's name out
        plan = self.progress.paced(key, seen, plan)
        said = not isinstance(seen, Snapshot) or seen.tokens_refused == self._token_problems.get(key, "")
        return plan if said and not plan.writes and not plan.events else None

    def _forget(self, key: Key) -> None:
        """The resource is gone."""
        self.rollouts.forget(key)
        self.progress.forget(key)
        self._token_problems.pop(key, None)
        self._read_at.pop(key, None)

    async def _api_key(self, key: Key) -> tuple[str | None, str]:
        """The key that this resource's engines ask for, and why it cannot be had ("": nothing is wrong)."""
        named = self.wakes.api_keys.get(key)
        if named is None:
            return None, ""
        name, field = named
        try:
            secret = await self.client.get("Secret", key[1], name)
            return base64.b64decode((secret or {"data": {}})["data"][field]).decode().strip(), ""
        except ApiError as error:
            if error.status != 403:
                raise
            return None, f"the operator may not read Secret {name}; list it in the chart's rbac.apiKeySecrets"
        except (LookupError, TypeError, ValueError):
            return None, f"Secret {name} has no key {field}, which spec.engine.apiKeySecret names"

    def _warn_of_tokens(self, key: Key, plan: Plan, problem: str) -> None:
        """Add one Warning about tokens that pods refuse; another one only when the reason changes."""
        if problem and self._token_problems.get(key) != problem:
            plan.events.append(Event("Warning", "TokenRefused", problem))
        self._token_problems[key] = problem

    def _claimed(self, seen: Resource, plan: Plan) -> Plan | None:
        """What is written instead of the plan where another operator looks after the resource."""
        uid, now = seen.object["metadata"]["uid"], time.monotonic()
        may_challenge = now - self._challenged.get(uid, -YIELD_S) >= YIELD_S
        instead = yielded(seen, self.settings.instance, may_challenge)
        if instead is not None and instead.status is not None:
            self._challenged[uid] = now
        return instead

    async def resync(self) -> None:
        """Look at everything now and then, spread out, and see whether the watch still shows what a list shows."""
        suspects: dict[str, tuple[str, float]] = {}
        while True:
            await asyncio.sleep(self.settings.resync_s / 5 * random.uniform(0.8, 1.2))
            self.prober.forget()
            try:
                suspects = await self._check_watch(suspects)
            except Exception as error:
                log.warning("resync", error=repr(error))

    async def _check_watch(self, suspects: dict[str, tuple[str, float]]) -> dict[str, tuple[str, float]]:
        now, missed, uids = time.monotonic(), {}, set()
        for namespace in self.settings.namespaces or (None,):
            for kind in (meta.DEPLOYMENT_KIND, meta.TUNING_JOB_KIND):
                for found in await self.client.list(kind, namespace):
                    metadata = found["metadata"]
                    uids.add(metadata["uid"])
                    shown = self.wakes.seen.get(metadata["uid"], ("", 0))[0]
                    if shown != metadata["resourceVersion"]:
                        before = suspects.get(metadata["uid"])
                        # Counted only if the watch has shown nothing new at all since the last pass.
                        missed[metadata["uid"]] = before if before is not None and before[0] == shown else (shown, now)
                    key: Key = (kind, metadata["namespace"], metadata["name"])
                    self.reconciler.wake_in(key, random.uniform(0, self.settings.resync_s))
        since = [when for _, when in missed.values() if when < now]
        self.health.blind_since = min(since) if since else None
        if since:
            log.warning("the watch misses changes", resources=len(since))
        return missed

    async def lead(self) -> None:
        """What only the leader does."""
        self.health.leading = True
        namespaced = bool(self.settings.namespaces)
        async with asyncio.TaskGroup() as group:
            group.create_task(self.reconciler.run())
            group.create_task(self.switch.run())
            group.create_task(self.resync())
            existing = asyncio.all_tasks()
            tasks = await kopf.spawn_tasks(
                registry=handlers.registry(self.wakes, self.cache),
                settings=handlers.kopf_settings(namespaced),
                clusterwide=not namespaced,
                namespaces=list(self.settings.namespaces),
                standalone=True,
            )
            self._listen_to_signals()  # kopf has put its own in the place of ours
            group.create_task(kopf.run_tasks(tasks, ignored=existing))

    def _listen_to_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stop.set)

    async def run(self) -> int:
        """Returns the process's exit status: 0 after a signal, 1 when the Lease was lost."""
        port = await self.health.serve(self.settings.health_host, self.settings.health_port)
        log.info("started", identity=self.settings.identity, port=port, namespaces=self.settings.namespaces or "all")
        self._listen_to_signals()
        leading = asyncio.create_task(lead(self.elector, self.lead))
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait({leading, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if stopping.done():
            # Stop writing first, then give the Lease back, so that a successor starts at once.
            leading.cancel()
            await asyncio.wait({leading}, timeout=5.0)
            await self.elector.release()
            log.info("stopped")
            return 0
        try:
            leading.result()
        except BaseExceptionGroup as group:
            log.error("ended", error=[repr(error) for error in group.exceptions])
        except (LostLeaseError, NotLeadingError) as error:
            log.error("ended", error=repr(error))
        return 1


def main() -> None:
    """Run until SIGTERM. Ends hard, so that no thread of a lost leader can write any more."""
    configure_logging()
    status = asyncio.run(_main())
    sys.stderr.flush()
    os._exit(status)


async def _main() -> int:
    return await Operator(Settings.from_environment()).run()


if __name__ == "__main__":
    main()
