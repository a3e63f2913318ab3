"""The real operator process against a real API server and controller-manager; engine pods are faked at the kubelet's place."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sere_operator.runtime.pacing import MESSAGES_S
from sere_operator.runtime.settings import Settings
from tests.kit.fake_node import FakeNode
from tests.kit.operator_process import OperatorProcess, World, eventually, manifest

STATIC = {"buckets": [{"minTokens": 8, "maxTokens": 64, "kind": "topk", "S": 2}]}


@pytest.fixture
def node(kubeconfig: str, crds: list[str]) -> Iterator[FakeNode]:
    with FakeNode(kubeconfig) as fake:
        yield fake


@pytest.fixture
def world(client: Any, namespace: str, node: FakeNode, kubeconfig: str, tmp_path: Path) -> Iterator[World]:
    # Its own namespace only: what an earlier test left to the garbage collector is not this one's business.
    own = {"SERE_LEASE_NAME": namespace, "SERE_WATCH_NAMESPACES": namespace}
    operator = OperatorProcess(kubeconfig, tmp_path / "operator.log", **own).start()
    made = World(client, namespace, node, operator)
    yield made
    operator.kill()
    made.operator.kill()  # a test may have put another in its place
    print(made.operator.log()[-9000:])


def test_children_conditions_and_static_policy(world: World) -> None:
    world.apply(manifest(replicas=2))
    world.ready()
    for kind in ("Deployment", "Service", "PodDisruptionBudget"):
        child = world.get(kind, "m")
        assert child["metadata"]["ownerReferences"][0]["kind"] == "SereDeployment"
    status = world.get("SereDeployment", "m")["status"]
    assert (status["ready"], status["policy"]["stable"]) == ("2/2", "exact")
    assert world.condition("PolicyApplied")["reason"] == "ExactRouting"
    assert "finalizers" not in world.get("SereDeployment", "m")["metadata"]
    assert not [key for key in world.get("SereDeployment", "m")["metadata"].get("annotations") or {} if "kopf" in key]

    before = {pod.uid for pod in world.pods()}
    template = world.get("Deployment", "m")["metadata"]["generation"]
    writes, began = world.operator.log().count('"event": "writing"'), time.monotonic()
    world.apply(manifest(replicas=2, routing={"mode": "Static", "policy": STATIC}))
    world.ready(timeout_s=60)
    # The pods' histograms count at every read of this canary, which lasts 10 s or longer. Its stages and their pods need six or seven writes;
    # what is written for the counts alone comes at most once in MESSAGES_S.
    counts = (time.monotonic() - began) / MESSAGES_S
    assert world.operator.log().count('"event": "writing"') - writes <= 9 + counts
    (digest,) = set(world.digests())
    assert digest.startswith("sere-")
    assert world.condition("PolicyApplied")["reason"] == "Applied"
    pods = world.pods()
    assert {pod.uid for pod in pods} == before, "a policy change replaced a pod"
    assert world.get("Deployment", "m")["metadata"]["generation"] == template, "a policy change touched the pod template"
    assert [pod.switches for pod in pods] == [[digest], [digest]], "a pod went back and forth"

    def story() -> list[str]:
        posted = sorted(world.items("Event"), key=lambda event: int(event["metadata"]["resourceVersion"]))
        return [event["reason"] for event in posted if event["reason"].startswith(("Canary", "Policy"))]

    eventually(lambda: story() == ["CanaryStarted", "CanaryPassed", "PolicyPromoted"], 10, "the events in their order")


def test_foreign_changes_are_healed(world: World) -> None:
    world.apply(manifest(replicas=2))
    world.ready()
    world.patch("Deployment", "m", {"spec": {"replicas": 5}})
    eventually(lambda: world.get("Deployment", "m")["spec"]["replicas"] == 2)
    foreign = {"name": "engine", "image": "other:1", "env": [{"name": "FOREIGN", "value": "1"}]}
    world.api("Deployment").patch(
        name="m",
        namespace=world.namespace,
        body={"spec": {"template": {"spec": {"containers": [foreign]}}}},
        content_type="application/strategic-merge-patch+json",
    )

    def engine() -> bool:
        container = world.get("Deployment", "m")["spec"]["template"]["spec"]["containers"][0]
        assert container["image"] == "engine:1"
        return all(variable["name"] != "FOREIGN" for variable in container["env"])

    eventually(engine)
    uid = world.get("Service", "m")["metadata"]["uid"]
    world.delete("Service", "m")
    eventually(lambda: world.items("Service") and world.get("Service", "m")["metadata"]["uid"] != uid)
    world.patch("ConfigMap", "m-policy", {"data": {"stable": "sere-00000000", "foreign": "x"}})
    eventually(lambda: world.get("ConfigMap", "m-policy")["data"] == {"stable": "exact"})
    world.ready()


def test_autoscaling_takes_the_replicas_over_without_a_drop(world: World) -> None:
    """Leaving `replicas` out at once would go to its default, one pod. And nobody fights the autoscaler over it."""
    world.apply(manifest(replicas=3))
    world.ready()
    (before,) = world.items("ReplicaSet")
    pods = {pod.uid for pod in world.pods()}
    metric = {"name": "vllm:num_requests_waiting", "averageValue": "2.5"}
    world.apply(manifest(autoscaling={"min": 2, "max": 6, "metric": metric}))

    def handed_over() -> bool:
        owners = [
            entry["manager"]
            for entry in world.get("Deployment", "m")["metadata"]["managedFields"]
            if "f:replicas" in entry["fieldsV1"].get("f:spec", {})
        ]
        return owners == ["sere-operator-replicas"]

    eventually(handed_over)
    (scaler,) = eventually(lambda: world.items("HorizontalPodAutoscaler"))
    assert scaler["spec"]["scaleTargetRef"]["name"] == "m"
    assert scaler["metadata"]["ownerReferences"][0]["kind"] == "SereDeployment"
    assert world.get("Deployment", "m")["spec"]["replicas"] == 3
    world.ready()
    (after,) = world.items("ReplicaSet")
    assert after["metadata"]["generation"] == before["metadata"]["generation"], "its replicas changed on the way"
    assert {pod.uid for pod in world.pods()} == pods

    world.patch("Deployment", "m", {"spec": {"replicas": 4}})  # as the autoscaler's controller does
    eventually(lambda: len(world.pods()) == 4)
    world.ready()
    assert world.get("Deployment", "m")["spec"]["replicas"] == 4
    assert world.operator.log().count("HorizontalPodAutoscaler") == 1, "written again, though nothing changed"

    world.apply(manifest(replicas=2))
    eventually(lambda: world.get("Deployment", "m")["spec"]["replicas"] == 2)
    eventually(lambda: not world.items("HorizontalPodAutoscaler"))


def test_kill_switch_and_back(world: World) -> None:
    world.apply(manifest(replicas=2, routing={"mode": "Static", "policy": STATIC}))
    world.ready(timeout_s=60)
    (digest,) = set(world.digests())
    world.patch("SereDeployment", "m", {"metadata": {"annotations": {"serving.sere.dev/override": "exact"}}})
    eventually(lambda: world.digests() == ["exact", "exact"], 10)
    eventually(lambda: world.condition("PolicyApplied")["reason"] == "Overridden")
    world.ready()
    world.patch("SereDeployment", "m", {"metadata": {"annotations": {"serving.sere.dev/override": None}}})
    eventually(lambda: world.digests() == [digest, digest], 10)


def test_quiet_time_writes_nothing_but_the_lease_and_reads_next_to_nothing(world: World) -> None:
    for name in ("a", "b"):
        world.apply(manifest(name, routing={"mode": "Static", "policy": STATIC}))
    for name in ("a", "b"):
        world.ready(name, timeout_s=60)

    def versions() -> dict[str, str]:
        kinds = ("SereDeployment", "Deployment", "Service", "ConfigMap", "Pod", "PodDisruptionBudget", "Event")
        return {
            f"{kind}/{item['metadata']['name']}": item["metadata"]["resourceVersion"]
            for kind in kinds
            for item in world.items(kind)
        }

    def at_rest() -> bool:  # no status waits any more for its turn to be written
        found = versions()
        time.sleep(1.5 * MESSAGES_S)
        return versions() == found

    eventually(at_rest, 90, "nothing is written any more")
    before, lease, began = versions(), _lease(world), time.monotonic()
    reads = world.operator.metric("sere_operator_reads_total")
    time.sleep(50)  # longer than the idle poll, so that pods were asked again
    reads, took_s = world.operator.metric("sere_operator_reads_total") - reads, time.monotonic() - began
    after = versions()
    assert {key for key in {*before, *after} if before.get(key) != after.get(key)} == set()
    assert _lease(world) != lease
    # Both were looked at without a read, and the watch was compared with a list of each of the two kinds, at most as often as `resync` does.
    passes = 1 + took_s // (0.8 * Settings.resync_s / 5)
    assert reads <= 2 * passes, (reads, took_s)


def _lease(world: World) -> str:
    lease = world.api("Lease").get(name=world.namespace, namespace="default").to_dict()
    return str(lease["metadata"]["resourceVersion"])


def test_deletion_leaves_nothing(world: World) -> None:
    world.apply(manifest())
    world.ready()
    world.delete("SereDeployment", "m")
    for kind in ("Deployment", "Service", "PodDisruptionBudget", "Pod"):
        eventually(lambda kind=kind: not world.items(kind), 40, f"{kind} gone")
    eventually(lambda: [c["metadata"]["name"] for c in world.items("ConfigMap")] == ["kube-root-ca.crt"])


def test_killed_at_any_moment_it_ends_in_the_same_state(world: World) -> None:
    world.operator.kill()
    quick = OperatorProcess(world.node.kubeconfig, world.operator.path, SERE_LEASE_NAME=world.namespace, SERE_LEASE_S="2")
    world.apply(manifest(replicas=3, routing={"mode": "Static", "policy": STATIC}))
    randomness = random.Random(7)
    for _ in range(6):
        before = quick.path.read_text().count('"leading"')
        quick.start()
        eventually(lambda before=before: quick.path.read_text().count('"leading"') > before, 30, "leads")
        time.sleep(randomness.uniform(0.05, 2.5))
        quick.kill()
    world.operator = quick.start()
    world.ready(timeout_s=90)
    assert len(set(world.digests())) == 1
    assert world.digests()[0].startswith("sere-")
    for pod in world.items("Pod"):
        assert "serving.sere.dev/policy" not in pod["metadata"]["annotations"]
    rollout = world.get("SereDeployment", "m")["status"].get("rollout")
    assert rollout is None
    for pod in world.pods():
        assert len(pod.switches) == 1, f"{pod.name} went back and forth: {pod.switches}"


def test_two_operators_and_a_lost_leader(world: World, kubeconfig: str, tmp_path: Path) -> None:
    own = {"SERE_LEASE_NAME": world.namespace, "SERE_WATCH_NAMESPACES": world.namespace}
    second = OperatorProcess(kubeconfig, tmp_path / "second.log", **own).start()
    try:
        world.apply(manifest(replicas=2))
        world.ready()
        logs = [world.operator.log(), second.log()]
        assert sum('"leading"' in log for log in logs) == 1
        assert sum('"writing"' in log for log in logs) == 1
        leader, other = (world.operator, second) if '"leading"' in logs[0] else (second, world.operator)
        assert leader.stop() == 0
        world.apply(manifest(replicas=1))
        eventually(lambda: world.get("Deployment", "m")["spec"]["replicas"] == 1, 30)
        assert '"leading"' in other.log()
    finally:
        second.kill()


def test_namespaced_it_leaves_other_namespaces_alone(world: World, kubeconfig: str, tmp_path: Path) -> None:
    world.operator.kill()
    namespaces = world.api("Namespace")
    other = f"{world.namespace}-other"
    namespaces.create(body={"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": other}})
    environment = {"SERE_LEASE_NAME": other, "SERE_WATCH_NAMESPACES": world.namespace}
    world.operator = OperatorProcess(kubeconfig, tmp_path / "namespaced.log", **environment).start()
    world.api("SereDeployment").create(body=manifest("elsewhere"), namespace=other)
    world.apply(manifest())
    world.ready()
    assert world.api("Deployment").get(namespace=other).to_dict()["items"] == []
    namespaces.delete(name=other)
