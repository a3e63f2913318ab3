"""Reconciliations in which nothing is to be done read nothing; what is written is decided by new reads alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from sere_operator.plan.snapshot import Event, Plan, Snapshot
from sere_operator.runtime import main
from sere_operator.runtime.cache import Cache, FreshReads, RememberedReads
from sere_operator.runtime.client import Client
from sere_operator.runtime.echoes import Echoes
from sere_operator.runtime.pacing import Progress
from sere_operator.runtime.reconciler import Key

KEY: Key = ("SereDeployment", "ns", "m")
LABELS = "app=m,part=engine"


def body(name: str, version: int, **fields: Any) -> dict[str, Any]:
    metadata = {
        "name": name,
        "namespace": "ns",
        "resourceVersion": str(version),
        "labels": {"app": "m", "part": "engine", "x": "y"},
    }
    return {"metadata": metadata, **fields}


class Cluster:
    """Counts reads, and has what it is given."""

    def __init__(self, *bodies: dict[str, Any]) -> None:
        self.bodies = {one["metadata"]["name"]: one for one in bodies}
        self.reads = 0
        self.meanwhile: Any = lambda: None  # happens between a read and its answer

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        self.reads += 1
        found = self.bodies.get(name)
        self.meanwhile()
        return found

    async def list(self, kind: str, namespace: str, selector: str = "", fields: str = "") -> list[dict[str, Any]]:
        self.reads += 1
        found = list(self.bodies.values())
        self.meanwhile()
        return found


def names(found: list[dict[str, Any]]) -> list[str]:
    return [one["metadata"]["name"] for one in found]


async def test_what_was_shown_is_read_without_a_request() -> None:
    cluster, cache = Cluster(), Cache()
    reads = RememberedReads(cast("Client", cluster), cache)
    cache.shown("Pod", body("a", 1))
    cache.shown("Pod", {"metadata": {**body("b", 2)["metadata"], "labels": {"app": "other"}}})
    assert await reads.get("Pod", "ns", "a") == {"apiVersion": "v1", "kind": "Pod", **body("a", 1)}
    assert names(await reads.list("Pod", "ns", LABELS)) == ["a"]
    assert await reads.get("Pod", "elsewhere", "a") is None
    assert await reads.get("Deployment", "ns", "a") is None
    assert cluster.reads == 0


def test_an_older_version_that_comes_late_changes_nothing() -> None:
    cache = Cache()
    cache.shown("Pod", body("a", 9, status="new"))
    cache.shown("Pod", body("a", 8, status="old"))
    cache.shown("Pod", body("a", 8), gone=True)
    found = cache.get("Pod", "ns", "a")
    assert found is not None and found["status"] == "new"
    cache.shown("Pod", body("a", 10), gone=True)
    assert cache.get("Pod", "ns", "a") is None


async def test_new_reads_correct_what_a_watch_has_lost() -> None:
    cluster, cache = Cluster(body("a", 5)), Cache()
    for name in ("a", "gone", "also-gone"):
        cache.shown("Pod", body(name, 1))
    reads = FreshReads(cast("Client", cluster), cache)
    assert await reads.get("Pod", "ns", "also-gone") is None
    assert names(await reads.list("Pod", "ns", LABELS)) == ["a"]
    assert names(cache.list("Pod", "ns", "")) == ["a"]
    found = cache.get("Pod", "ns", "a")
    assert found is not None and found["metadata"]["resourceVersion"] == "5"


async def test_what_a_watch_shows_during_a_read_is_newer_than_its_answer() -> None:
    cluster, cache = Cluster(), Cache()
    cache.shown("Pod", body("a", 1))
    cluster.meanwhile = lambda: (cache.shown("Pod", body("a", 7)), cache.shown("Pod", body("b", 8)))
    reads = FreshReads(cast("Client", cluster), cache)
    assert await reads.list("Pod", "ns", LABELS) == []
    assert names(cache.list("Pod", "ns", "")) == ["a", "b"]


async def test_the_megabytes_of_an_artefact_are_not_kept() -> None:
    cluster, cache = Cluster(body("s", 1, binaryData={"x": "AAAA"})), Cache()
    cache.shown("ConfigMap", body("s", 1, binaryData={"x": "AAAA"}))
    kept = cache.get("ConfigMap", "ns", "s")
    assert kept is not None and kept["binaryData"] is None
    reads = RememberedReads(cast("Client", cluster), cache)
    for found in (await reads.get("ConfigMap", "ns", "s"), *await reads.list("ConfigMap", "ns", LABELS)):
        assert found is not None and found["binaryData"] == {"x": "AAAA"}
    assert cluster.reads == 2


class Operator:
    """What `_reconcile` needs of one. `remembered` and `fresh` are the plans that each kind of reads leads to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(main.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(main, "enact", self._enact)
        self.settings = SimpleNamespace(resync_s=300.0, instance="ns/lease")
        self.client, self.cache = cast("Client", Cluster()), Cache()
        self._read_at: dict[Key, float] = {}
        self._token_problems: dict[Key, str] = {}
        self.prober = SimpleNamespace(for_resource=lambda *_: None)
        self.reconciler = SimpleNamespace(wake=lambda *_: None)
        self.rollouts = SimpleNamespace(paced=lambda key, seen, plan: plan, forget=lambda key: None)
        self.progress, self.echoes = Progress(), Echoes()
        self.elector = SimpleNamespace(leads=True)
        # As `decide` makes it: of the operator's name in the status it knows nothing.
        self.remembered: Plan | None = Plan(status={"operator": None}, requeue_after=45.0)
        self.fresh: Plan | None = Plan(status={"operator": None}, requeue_after=45.0)
        self.owner, self.asked, self.written = "ns/lease", list[str](), list[Plan]()

    async def _api_key(self, key: Key) -> tuple[None, str]:
        return None, ""

    async def _decided(self, key: Key, reads: Any, *_: Any) -> tuple[Snapshot, Plan] | None:
        kind = "remembered" if isinstance(reads, RememberedReads) else "fresh"
        self.asked.append(kind)
        plan = getattr(self, kind)
        found = {"kind": "SereDeployment", "metadata": {"name": "m", "namespace": "ns"}, "status": {"operator": self.owner}}
        return None if plan is None else (Snapshot(now=0.0, object=found), plan)

    def _claimed(self, seen: Snapshot, plan: Plan) -> Plan | None:
        return None

    async def _enact(self, client: Any, seen: Snapshot, plan: Plan, leads: Any, echoes: Any) -> Plan:
        self.written.append(plan)
        return plan

    def __getattr__(self, name: str) -> Any:
        return getattr(main.Operator, name).__get__(self)

    async def reconcile(self) -> list[str]:
        self.asked = []
        place = SimpleNamespace(aside=None)
        self.next_s = await main.Operator._reconcile(cast("main.Operator", self), KEY, 0.0, cast("Any", place))
        return self.asked


async def test_a_quiet_resource_is_read_anew_only_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = Operator(monkeypatch)
    assert await operator.reconcile() == ["fresh"], "the first time of a process"
    for _ in range(5):
        assert await operator.reconcile() == ["remembered"]
    assert operator.next_s == 45.0
    operator.now += 301
    assert await operator.reconcile() == ["fresh"]


@pytest.mark.parametrize(
    "seems",
    [Plan(apply=[{"kind": "Service"}]), Plan(status={"ready": "0/1"}), Plan(events=[Event("Normal", "X", "x")]), None],
    ids=["a write", "a status", "an event", "gone"],
)
async def test_nothing_is_written_because_of_what_is_remembered(monkeypatch: pytest.MonkeyPatch, seems: Plan | None) -> None:
    operator = Operator(monkeypatch)
    await operator.reconcile()
    operator.remembered, operator.written = seems, []
    assert await operator.reconcile() == ["remembered", "fresh"]
    assert [(plan.apply, plan.status, plan.events) for plan in operator.written] == [([], None, [])]


async def test_a_resource_of_another_operator_is_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = Operator(monkeypatch)
    await operator.reconcile()
    operator.owner = "other/lease"
    assert await operator.reconcile() == ["remembered", "fresh"]


async def test_a_resource_that_is_gone_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = Operator(monkeypatch)
    await operator.reconcile()
    operator.remembered = operator.fresh = None
    assert await operator.reconcile() == ["remembered", "fresh"]
    assert operator.next_s is None and operator._read_at == {}
