"""The kill switch's own lane: which pods it patches, and that it needs nothing else."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from sere_ext.contract.errors import NotLeadingError
from sere_operator.runtime.client import Client
from sere_operator.runtime.echoes import Echoes
from sere_operator.runtime.handlers import Wakes
from sere_operator.runtime.reconciler import Key, Place, Reconciler
from sere_operator.runtime.switch import KillSwitch

KEY: Key = ("SereDeployment", "ns", "m")
OFF = {"serving.sere.dev/override": "exact"}


def body(name: str, annotations: dict[str, str] | None = None, **metadata: Any) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "ns", "uid": f"u-{name}", "annotations": annotations, **metadata}}


class Cluster:
    """One SereDeployment with its pods; remembers the patches."""

    def __init__(self, resource: dict[str, Any] | None, *pods: dict[str, Any], refuse: tuple[str, ...] = ()) -> None:
        self.resource, self.pods, self.refuse = resource, list(pods), refuse
        self.patched: list[tuple[str, Any]] = []

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        return self.resource

    async def list(self, kind: str, namespace: str, selector: str) -> list[dict[str, Any]]:
        assert kind == "Pod" and "app.kubernetes.io/instance=m" in selector
        return self.pods

    async def patch(self, kind: str, namespace: str, name: str, patch: dict[str, Any]) -> None:
        if name in self.refuse:
            raise OSError("no route")
        self.patched.append((name, patch["metadata"]))


async def run(cluster: Cluster, leads: bool = True) -> None:
    await KillSwitch(cast("Client", cluster), lambda: leads).work(KEY, Place(asyncio.Semaphore(1)))


async def test_every_pod_that_does_not_have_it_yet_is_switched_off_also_of_a_spec_that_cannot_be_read() -> None:
    resource = {**body("m", OFF), "spec": {"suspend": True, "nonsense": 1}}
    cluster = Cluster(resource, body("a"), body("b", OFF), body("c", {"x": "y"}), body("d", deletionTimestamp="now"))
    await run(cluster)
    assert cluster.patched == [("a", {"uid": "u-a", "annotations": OFF}), ("c", {"uid": "u-c", "annotations": OFF})]


@pytest.mark.parametrize("resource", [None, body("m"), body("m", {"serving.sere.dev/override": "no"})])
async def test_nothing_is_touched_where_the_switch_is_not_pulled(resource: dict[str, Any] | None) -> None:
    cluster = Cluster(resource, body("a"))
    await run(cluster)
    assert cluster.patched == []


async def test_one_pod_that_cannot_be_patched_keeps_no_other_from_it_and_is_tried_again() -> None:
    cluster = Cluster(body("m", OFF), body("a"), body("b"), refuse=("a",))
    with pytest.raises(OSError, match="no route"):
        await run(cluster)
    assert [name for name, _ in cluster.patched] == ["b"]


async def test_without_the_lease_nothing_is_written() -> None:
    cluster = Cluster(body("m", OFF), body("a"))
    with pytest.raises(NotLeadingError):
        await run(cluster, leads=False)
    assert cluster.patched == []


async def test_it_is_woken_by_the_annotation_and_by_pods_that_come_later() -> None:
    async def nothing(key: Key, place: Place) -> float | None:
        return None

    looks, switch = Reconciler(nothing), Reconciler(nothing)
    wakes = Wakes(looks, switch, Echoes())
    wakes.resource("SereDeployment", body("m", resourceVersion="1"), gone=False)
    assert (list(looks.entries), list(switch.entries)) == ([KEY], [])
    wakes.resource("SereDeployment", body("m", OFF, resourceVersion="2"), gone=False)
    assert list(switch.entries) == [KEY]
    switch.entries.clear()
    wakes.child({"serving.sere.dev/deployment": "m"}, "ns")
    assert list(switch.entries) == [KEY], "a new pod must learn of it"
    switch.entries.clear()
    wakes.resource("SereDeployment", body("m", resourceVersion="3"), gone=False)
    wakes.child({"serving.sere.dev/deployment": "m"}, "ns")
    assert list(switch.entries) == []
