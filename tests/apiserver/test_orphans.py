"""`kubectl delete --cascade=orphan` and the same manifest again, on a real API server with its garbage collector."""

from __future__ import annotations

from typing import Any

from tests.kit.operator_process import World, eventually, manifest

from .conftest import Kubectl
from .test_operator import node, world
from .test_tenant import tuning_job

__all__ = ["node", "world"]  # fixtures


def orphan(world: World, kubectl: Kubectl, kind: str, name: str, left: list[tuple[str, str]]) -> None:
    """Delete a resource and leave its children, which the garbage collector then frees of their owner."""
    # The garbage collector looks for kinds that it does not know yet every 30 s, and these CRDs may be younger than that.
    kubectl("delete", kind, name, "--cascade=orphan", "--timeout=90s")
    for child in left:
        eventually(lambda child=child: not world.get(*child)["metadata"].get("ownerReferences"), 60, f"{child} is free")


def taken_back(world: World, child: tuple[str, str], uid: str) -> bool:
    (owner,) = world.get(*child)["metadata"]["ownerReferences"]
    return bool(owner["uid"] == uid and owner["controller"])


def test_the_children_of_a_tuning_job_are_taken_back_and_its_run_goes_on(world: World, kubectl: Kubectl) -> None:
    left = [(kind, "ci-tuner") for kind in ("ServiceAccount", "Role", "RoleBinding", "Job")]
    left += [("ConfigMap", "ci-input"), ("ConfigMap", "ci-result")]
    world.apply(tuning_job("ci"))
    job = eventually(lambda: world.get("Job", "ci-tuner"), 30, "the tuning Job")
    given = world.get("ConfigMap", "ci-input")["data"]
    orphan(world, kubectl, "seretuningjob", "ci", left)
    uid = world.apply(tuning_job("ci"))["metadata"]["uid"]
    for child in left:
        eventually(lambda child=child: taken_back(world, child, uid), 30, f"{child} is taken back")
    assert world.get("Job", "ci-tuner")["metadata"]["uid"] == job["metadata"]["uid"], "the run goes on"
    assert world.get("ConfigMap", "ci-input")["data"] == given, "in the study that it began"

    def not_refused() -> bool:
        status: dict[str, Any] = world.get("SereTuningJob", "ci")["status"]
        (complete,) = (c for c in status["conditions"] if c["type"] == "Complete")
        return complete["reason"] not in ("InvalidSpec", "Refused")

    eventually(not_refused, 20)
    world.delete("SereTuningJob", "ci")
    for child in left:
        eventually(lambda child=child: child[1] not in names(world, child[0]), 60, f"{child} went with its owner")


def names(world: World, kind: str) -> list[str]:
    return [body["metadata"]["name"] for body in world.items(kind)]


def test_the_children_of_a_deployment_are_taken_back_and_no_pod_is_replaced(world: World, kubectl: Kubectl) -> None:
    left = [("Deployment", "m"), ("Service", "m"), ("PodDisruptionBudget", "m"), ("ConfigMap", "m-policy")]
    world.apply(manifest(replicas=2))
    world.ready()
    pods = {pod.uid for pod in world.pods()}
    orphan(world, kubectl, "seredeployment", "m", left)
    uid = world.apply(manifest(replicas=2))["metadata"]["uid"]
    world.ready()
    assert all(taken_back(world, child, uid) for child in left)
    assert {pod.uid for pod in world.pods()} == pods
