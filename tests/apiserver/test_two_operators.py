"""Two operators with different default images that see one namespace, and a controller that undoes what the operator writes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.operator_process import OperatorProcess, World, eventually, manifest

from .test_operator import node, world

__all__ = ["node", "world"]  # fixtures


@pytest.fixture
def other(world: World, kubeconfig: str, tmp_path: Path) -> Iterator[OperatorProcess]:
    """A second release over the same namespace."""
    process = OperatorProcess(
        kubeconfig,
        tmp_path / "other.log",
        SERE_LEASE_NAME=f"{world.namespace}-b",
        SERE_WATCH_NAMESPACES=world.namespace,
        SERE_ENGINE_IMAGE="sere-engine:other",
    )
    yield process
    process.kill()
    print(process.log()[-3000:])


def test_the_second_yields_and_says_whose_the_resource_is(world: World, other: OperatorProcess) -> None:
    world.apply(manifest(engine={}))
    world.ready()
    before = world.get("Deployment", "m")
    pods = {pod.uid for pod in world.pods()}
    other.start()
    eventually(lambda: "NotOurs" in [event["reason"] for event in world.items("Event")], 40, "it says so")
    time.sleep(8)  # they fought about twice a second
    after = world.get("Deployment", "m")
    assert after["metadata"]["generation"] == before["metadata"]["generation"]
    assert {pod.uid for pod in world.pods()} == pods
    status = world.get("SereDeployment", "m")["status"]
    assert status["operator"] == f"default/{world.namespace}"
    assert "challenger" not in status, "the owner has answered"
    (event,) = (event for event in world.items("Event") if event["reason"] == "NotOurs")
    assert f"operator default/{world.namespace} looks after this" in event["message"]
    world.ready()


def test_a_field_that_a_controller_changes_after_every_write_is_left_to_it_with_a_warning(world: World) -> None:
    world.apply(manifest())
    world.ready()
    ended = threading.Event()

    def undo() -> None:
        while not ended.wait(0.1):
            world.patch("Deployment", "m", {"spec": {"template": {"spec": {"terminationGracePeriodSeconds": 5}}}})

    undoing = threading.Thread(target=undo)
    undoing.start()
    try:
        eventually(lambda: "FieldLeft" in [event["reason"] for event in world.items("Event")], 40, "it says so")
        begun = world.get("Deployment", "m")["metadata"]["generation"]
        time.sleep(10)
        assert world.get("Deployment", "m")["metadata"]["generation"] - begun <= 2
    finally:
        ended.set()
        undoing.join()
