"""The operator's own writes of a status wake nobody, and counts in messages are written now and then alone."""

from __future__ import annotations

import asyncio
import copy
import itertools
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from sere_operator.api import meta
from sere_operator.plan.patch import merge_patch, merged, only_messages
from sere_operator.plan.snapshot import Plan, Snapshot, TuningSnapshot
from sere_operator.runtime import main, pacing
from sere_operator.runtime.attention import Attention
from sere_operator.runtime.cache import Cache
from sere_operator.runtime.echoes import Echoes
from sere_operator.runtime.handlers import Wakes
from sere_operator.runtime.pacing import Progress, Rollouts
from sere_operator.runtime.reconciler import Key, Reconciler
from sere_operator.runtime.settings import Settings

KEY: Key = (meta.DEPLOYMENT_KIND, "ns", "m")
HOUR_S = 3600.0


class Server:
    """An API server with one SereDeployment, whose watch shows every write a moment later."""

    def __init__(self) -> None:
        metadata = {"name": "m", "namespace": "ns", "uid": "u", "generation": 1, "resourceVersion": "1"}
        self.object: dict[str, Any] = {"kind": KEY[0], "metadata": metadata, "spec": {}, "status": {}}
        self.writes: list[dict[str, Any]] = []
        self.watch: Any = None
        self.unseen = 0  # changes that the watch has not shown yet

    def change(self, status: dict[str, Any] | None = None, **metadata: Any) -> None:
        """A write of anybody's."""
        old = self.object
        version = str(int(old["metadata"]["resourceVersion"]) + 1)
        known = {**old["metadata"], **metadata, "resourceVersion": version, "managedFields": [{"time": version}]}
        self.object = {**old, "metadata": known, "status": merged(old["status"], status or {})}
        self.unseen += 1
        asyncio.get_running_loop().call_later(0.001, self._show, copy.deepcopy(self.object))

    def _show(self, shown: dict[str, Any]) -> None:
        self.unseen -= 1
        self.watch(KEY[0], shown, False)

    async def patch(self, kind: str, namespace: str, name: str, body: dict[str, Any], *, subresource: str) -> None:
        assert subresource == "status"
        self.writes.append(body["status"])
        self.change(body["status"])
        await asyncio.sleep(0.005)  # the watch is quicker than the answer


class Operator(main.Operator):
    """The operator's own loop, around a decision that counts requests at every read, as that of a canary does."""

    def __init__(self, server: Server) -> None:
        self.settings = Settings(namespaces=("ns",))
        self.server, self.client = server, cast("Any", server)
        self.reconciler = Reconciler(self.work)
        self.now = 0.0  # of the clock that paces what is written, which stands still until a test moves it
        self.progress = Progress(clock=lambda: self.now)
        self.attention, self.rollouts, self.cache = Attention(), Rollouts(1), Cache()
        self._token_problems, self._read_at, self._challenged = {}, {}, {}
        self.prober = cast("Any", SimpleNamespace(for_resource=lambda *_: None))
        self.elector = cast("Any", SimpleNamespace(leads=True))
        self.echoes = Echoes()
        self.wakes = Wakes(self.reconciler, Reconciler(self.work), self.echoes)
        server.watch = self.wakes.resource
        self.requests = 0
        self.stage, self.poll_s = "Analysing", HOUR_S

    async def _decided(self, *_: Any) -> tuple[Snapshot, Plan]:
        self.requests += 1
        seen = Snapshot(now=0.0, object=copy.deepcopy(self.server.object))
        message = f"canary finished {self.requests} of 60 requests"
        new = {"conditions": [{"type": "Ready", "status": "False", "message": message}], "rollout": {"stage": self.stage}}
        return seen, Plan(status=merge_patch(new, seen.status), requeue_after=self.poll_s)

    @property
    def at_rest(self) -> bool:
        """Every change was shown, nothing is looked at, and nothing is due soon."""
        entry = self.reconciler.entries[KEY]
        idle = not entry.queued and not entry.running and entry.timer is not None
        return idle and not self.server.unseen and entry.due - asyncio.get_running_loop().time() > HOUR_S / 2


async def until(reached: Callable[[], bool]) -> None:
    """Wait for what the operator comes to, however slow the machine is."""
    async with asyncio.timeout(20):
        for _ in itertools.count():
            if reached():
                return
            await asyncio.sleep(0.002)


@pytest.fixture
async def operator(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Operator]:
    """One that runs, has written its first status, and has followed it up."""
    monkeypatch.setattr(pacing, "MESSAGES_S", HOUR_S)  # so that no test is long enough for it
    made = Operator(Server())
    running = asyncio.create_task(made.reconciler.run())
    made.reconciler.wake(KEY)
    await until(lambda: made.requests >= 2 and made.at_rest)
    made.server.writes.clear()
    yield made
    running.cancel()


async def test_counts_are_written_now_and_then(operator: Operator) -> None:
    operator.poll_s, before = 0.005, operator.requests
    operator.reconciler.wake(KEY)
    await until(lambda: operator.requests >= before + 4)
    assert operator.server.writes == []
    operator.now += HOUR_S
    await until(lambda: bool(operator.server.writes))
    before = operator.requests
    await until(lambda: operator.requests >= before + 4)
    (status,) = operator.server.writes
    assert list(status) == ["conditions"] and " of 60 requests" in status["conditions"][0]["message"]


async def test_an_own_write_wakes_nobody(operator: Operator) -> None:
    """Else each count that is written leads to a read, and the read to the next count."""
    operator.progress.clock = itertools.count(HOUR_S, 2 * HOUR_S).__next__  # each may be written at once
    operator.reconciler.wake(KEY)
    await until(lambda: bool(operator.server.writes) and operator.at_rest)
    assert len(operator.server.writes) == 1


async def test_what_changes_otherwise_is_written_at_once_and_followed_up(operator: Operator) -> None:
    operator.stage, looks = "Promoting", operator.requests
    operator.reconciler.wake(KEY)
    await until(lambda: bool(operator.server.writes) and operator.at_rest)
    (status,) = operator.server.writes
    assert status["rollout"] == {"stage": "Promoting"}
    assert operator.requests - looks == 3, "by what is remembered, by new reads, and once more for the next step"


@pytest.mark.parametrize(
    "change",
    [
        {"status": {"challenger": {"name": "other/lease", "since": "2027-01-01T00:00:00Z"}}},
        {"status": {"operator": "other/lease"}},
        {"status": {"rollout": None}},
        {"generation": 2},
        {"annotations": {"serving.sere.dev/override": "exact"}},
        {"deletionTimestamp": "2027-01-01T00:00:00Z"},
    ],
    ids=["challenger", "owner", "lost", "spec", "annotation", "deletion"],
)
@pytest.mark.parametrize("together", [False, True], ids=["alone", "shown together with the operator's own write"])
async def test_what_others_change_wakes(operator: Operator, change: dict[str, Any], together: bool) -> None:
    woken: list[Key] = []
    cast("Any", operator.reconciler).wake = woken.append
    if together:
        seen = Snapshot(now=0.0, object=copy.deepcopy(operator.server.object))
        operator.echoes.expect(seen, {"ready": "1/1"})
        change = {**change, "status": {**change.get("status", {}), "ready": "1/1"}}
    operator.server.change(**change)
    await until(lambda: not operator.server.unseen)
    assert woken == [KEY]


async def test_a_tuning_jobs_own_status_wakes_the_deployment_that_waits_for_it() -> None:
    looks, echoes = Reconciler(cast("Any", None)), Echoes()
    wakes = Wakes(looks, Reconciler(cast("Any", None)), echoes)
    labels = {meta.DEPLOYMENT_LABEL: "m"}
    job = {"metadata": {"name": "t", "namespace": "ns", "uid": "t", "resourceVersion": "1", "labels": labels}, "status": {}}
    wakes.resource(KEY[0], Server().object, gone=False)
    looks.entries.clear()
    echoes.expect(TuningSnapshot(now=0.0, object=job), {"outcome": "Chosen"})
    wakes.resource(meta.TUNING_JOB_KIND, {**job, "status": {"outcome": "Chosen"}}, gone=False)
    assert list(looks.entries) == [KEY]
    wakes.resource(meta.TUNING_JOB_KIND, {**job, "status": {"outcome": "Chosen"}}, gone=True)
    assert list(looks.entries) == [KEY, (meta.TUNING_JOB_KIND, "ns", "t")], "that it is gone is never the operator's own write"


def test_only_what_is_written_for_people_counts_as_message() -> None:
    condition = {"type": "Ready", "reason": "Canary", "message": "36 of 60"}
    before = {"conditions": [condition], "ready": "1/1", "rollout": {"stage": "Canary", "message": "a"}}
    assert only_messages(before, {**before, "conditions": [{**condition, "message": "37 of 60"}]})
    assert only_messages(before, {**before, "rollout": {"stage": "Canary", "message": "b"}})
    assert not only_messages(before, {**before, "conditions": [{**condition, "reason": "Serving"}]})
    assert not only_messages(before, {**before, "ready": "0/1"})
    assert not only_messages(before, {**before, "rollout": {"stage": "Analysing", "message": "a"}})
