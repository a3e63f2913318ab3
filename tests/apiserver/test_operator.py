"""The real operator process against a real API server and controller-manager; engine pods are faked at the kubelet's place."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "kit"))
from fake_node import FakeNode
from operator_process import OperatorProcess, eventually

STATIC = {"buckets": [{"minTokens": 8, "maxTokens": 64, "kind": "topk", "S": 2}]}


def manifest(name: str = "m", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "serving.sere.dev/v1alpha1",
        "kind": "SereDeployment",
        "metadata": {"name": name},
        "spec": {"model": {"name": "fake/model"}, "engine": {"image": "engine:1"}, **spec},
    }


class World:
    """One namespace with an operator and a fake node."""

    def __init__(self, client: Any, namespace: str, node: FakeNode, operator: OperatorProcess) -> None:
        self.client, self.namespace, self.node, self.operator = client, namespace, node, operator

    def api(self, kind: str) -> Any:
        version = {
            "SereDeployment": "serving.sere.dev/v1alpha1", "SereTuningJob": "serving.sere.dev/v1alpha1",
            "SereProfile": "serving.sere.dev/v1alpha1", "Deployment": "apps/v1", "PodDisruptionBudget": "policy/v1",
            "Job": "batch/v1", "Role": "rbac.authorization.k8s.io/v1", "Lease": "coordination.k8s.io/v1",
        }.get(kind, "v1")  # fmt: skip
        return self.client.resources.get(api_version=version, kind=kind)

    def get(self, kind: str, name: str) -> dict[str, Any]:
        return self.api(kind).get(name=name, namespace=self.namespace).to_dict()

    def items(self, kind: str, **selectors: str) -> list[dict[str, Any]]:
        return self.api(kind).get(namespace=self.namespace, **selectors).to_dict()["items"]

    def apply(self, body: dict[str, Any]) -> dict[str, Any]:
        return (
            self.api(body["kind"])
            .server_side_apply(body=body, namespace=self.namespace, field_manager="test", force_conflicts=True)
            .to_dict()
        )

    def patch(self, kind: str, name: str, body: dict[str, Any]) -> None:
        self.api(kind).patch(name=name, namespace=self.namespace, body=body, content_type="application/merge-patch+json")

    def delete(self, kind: str, name: str) -> None:
        self.api(kind).delete(name=name, namespace=self.namespace)

    def condition(self, kind: str, name: str = "m") -> dict[str, Any]:
        found = self.get("SereDeployment", name)
        condition = next(c for c in found["status"]["conditions"] if c["type"] == kind)
        current = condition["observedGeneration"] == found["metadata"]["generation"]
        return {**condition, "current": current}

    def ready(self, name: str = "m", timeout_s: float = 40.0) -> None:
        def check() -> bool:
            ready = self.condition("Ready", name)
            assert ready["status"] == "True" and ready["current"], (ready["reason"], ready["message"])
            return True

        eventually(check, timeout_s, f"{name} Ready")

    def digests(self) -> list[str]:
        return sorted(pod.digest for pod in self.node.pods.values() if pod.namespace == self.namespace)


@pytest.fixture
def node(kubeconfig: str, crds: list[str]) -> Iterator[FakeNode]:
    from kubernetes import client as kube
    from kubernetes import config

    configuration = kube.Configuration()
    config.load_kube_config(kubeconfig, client_configuration=configuration)
    with FakeNode(configuration) as fake:
        yield fake


@pytest.fixture
def world(client: Any, namespace: str, node: FakeNode, kubeconfig: str, tmp_path: Path) -> Iterator[World]:
    operator = OperatorProcess(kubeconfig, tmp_path / "operator.log", SERE_LEASE_NAME=namespace).start()
    yield World(client, namespace, node, operator)
    operator.kill()
    print(operator.log()[-6000:])


def test_children_conditions_and_static_policy(world: World) -> None:
    world.apply(manifest(replicas=2))
    world.ready()
    for kind in ("Deployment", "Service", "PodDisruptionBudget"):
        child = world.get(kind, "m")
        assert child["metadata"]["ownerReferences"][0]["kind"] == "SereDeployment"
    status = world.get("SereDeployment", "m")["status"]
    assert status["ready"] == "2/2" and status["policy"]["stable"] == "exact"
    assert world.condition("PolicyApplied")["reason"] == "ExactRouting"

    world.apply(manifest(replicas=2, routing={"mode": "Static", "policy": STATIC}))
    world.ready(timeout_s=60)
    (digest,) = set(world.digests())
    assert digest.startswith("sere-")
    assert world.condition("PolicyApplied")["reason"] == "Applied"
