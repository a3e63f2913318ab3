"""Ready: what it waits for, and that whatever keeps pods from coming up is said in the words of who refused it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.kit.plan_world import World


def settled(replicas: int = 2, **spec: Any) -> World:
    world = World(replicas, **spec)
    world.settle()
    assert world.condition("Ready")["status"] == "True"
    return world


def ready(world: World) -> tuple[str, str]:
    world.step()
    condition = world.condition("Ready")
    return condition["reason"], condition["message"]


def test_a_pod_that_gave_no_token_is_not_ready() -> None:
    world = settled()
    world.unproven = {"m-1"}
    assert ready(world) == ("PodsNotReady", "1 of 2 pods gave no token yet")


def test_without_a_token_through_the_service_it_is_not_ready() -> None:
    world = settled()
    world.routable = False
    assert ready(world) == ("NotRoutable", "pods are ready, but no token came through the Service")
    assert "NotRoutable" in world.events


def test_pods_of_the_generation_before_do_not_make_it_ready() -> None:
    world = settled()
    world.edit(resources={"limits": {"cpu": 2}})
    world.step()
    world.step()
    assert ready(world)[0] == "Starting"
    world.settle()
    assert ready(world)[0] == "Serving"


def test_a_deployment_that_its_controller_has_not_seen_yet_does_not_make_it_ready() -> None:
    """Its status still counts the pods of the template before, all of which are ready."""
    world = settled()
    world.controller_runs = False
    world.edit(resources={"limits": {"cpu": 2}})
    world.step()
    assert world.children["Deployment"]["status"]["updatedReplicas"] == 2
    assert ready(world) == ("Starting", "the newest pod template has not been seen yet")
    world.controller_runs = True
    world.settle()
    assert ready(world)[0] == "Serving"


def test_a_pod_that_cannot_be_reached_is_named_with_its_address_and_the_likely_cause() -> None:
    world = settled()
    world.silent = {"m-1"}
    reason, message = ready(world)
    assert reason == "PodsNotReady"
    assert message == (
        "1 of 2 pods do not answer GET /sere: pod m-1 at http://10.0.0.1:8000; "
        "a NetworkPolicy or strict mTLS may keep the operator out"
    )


def container(state: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"containerStatuses": [{"image": "e:9", "restartCount": 0, "state": state, **more}]}


CRASHED = {"terminated": {"exitCode": 2, "message": "ValueError: unknown flag --tensor"}}


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (
            container({"waiting": {"reason": "ErrImagePull", "message": "e:9: not found"}}),
            "pod m-0: ErrImagePull: e:9: not found",
        ),
        (
            container({"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s"}}, lastState=CRASHED),
            "pod m-0: CrashLoopBackOff: exit code 2: ValueError: unknown flag --tensor; back-off 10s",
        ),
        (
            container({"running": {}}, lastState=CRASHED, restartCount=3),
            "unknown flag --tensor (3 restarts; kubectl logs m-0 --previous tells more)",
        ),
        (
            container({"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "hf" not found'}}),
            'pod m-0: CreateContainerConfigError: secret "hf" not found',
        ),
        (
            {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory."},
            "pod m-0: Evicted: The node",
        ),
        (
            {"conditions": [{"type": "PodScheduled", "status": "False", "message": "0/3 nodes: untolerated taint"}]},
            "pod m-0 cannot be scheduled: 0/3 nodes: untolerated taint",
        ),
    ],
    ids=["image", "crash loop", "crashed, back", "secret", "evicted", "taint"],
)
def test_a_pod_that_does_not_come_up_is_said_with_its_name_in_the_kubelets_words(status: dict[str, Any], words: str) -> None:
    world = World(1)
    world.step()
    world.pods[0].ready = False
    world.pods[0].status = {"phase": "Pending", **status}
    reason, message = ready(world)
    assert reason == "RolloutBlocked"
    assert words in message
    assert world.events.count("RolloutBlocked") == 1
    world.tick(60)
    world.step()
    assert world.events.count("RolloutBlocked") == 1, "warned of once"


def test_pods_that_are_not_even_created_are_said_in_the_api_servers_words() -> None:
    world = World(1)
    world.step()
    world.pods.clear()
    quota = 'pods "m-5f-x" is forbidden: exceeded quota: q, requested: requests.cpu=1'
    failure = {"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate", "message": quota}
    world.deployment_conditions = [failure]
    assert ready(world) == ("RolloutBlocked", f"pods cannot be created: {quota}")


def test_loading_pods_are_just_starting() -> None:
    world = World(1)
    world.step()
    world.pods[0].ready = False
    world.pods[0].status = container({"running": {}})
    assert ready(world)[0] == "PodsNotReady"
