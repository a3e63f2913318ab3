"""The cluster of tests/kit/one-node: its node is this machine, so folders become claims and addresses are reached as they are."""

from __future__ import annotations

import sys
from pathlib import Path

from demo import kube
from demo.kube import Object
from sere_ext.contract.names import ENGINE_PORT

# The tests' engine image holds no torch and no vLLM: they come from this process's own environment, mounted read-only.
ENVIRONMENT = "environment"


class OneNode:
    """See `demo.site.Site`."""

    namespace = "default"
    system = "sere-system"
    flags: tuple[str, ...] = ()

    def install(self) -> None:
        kube.make_namespace(self.system)
        kube.install_chart(self.system, "image.tag=dev", "engine.image.tag=dev")
        wait = ("rollout", "status", "deployment/sere-operator", "--timeout=120s")
        kube.kubectl("--namespace", self.system, *wait, timeout_s=150)

    def prepare(self, claims: dict[str, Path]) -> None:
        kube.make_namespace(self.namespace)
        for name, folder in claims.items():
            readable(folder)
            kube.apply(*local_claim(name, folder, self.namespace), namespace=self.namespace)
        claim_environment(self.namespace)

    def spec(self, spec: Object) -> Object:
        return with_environment(kube.small_engine(spec))

    def pod(self, pod: Object) -> str:
        return f"http://{pod['status']['podIP']}:{ENGINE_PORT}"

    def service(self, name: str) -> str:
        spec = kube.existing("service", name, self.namespace)["spec"]
        return f"http://{spec['clusterIP']}:{spec['ports'][0]['port']}"

    def remove(self) -> None:
        """Do nothing: the whole cluster ends with the command that it was started for."""


def claim_environment(namespace: str) -> None:
    """The claim that `with_environment` mounts."""
    kube.apply(*local_claim(ENVIRONMENT, Path(sys.prefix), namespace), namespace=namespace)


def with_environment(spec: Object) -> Object:
    """A SereDeployment's spec whose engines find torch and vLLM where this process has them."""
    volume = {"name": ENVIRONMENT, "claimName": ENVIRONMENT, "mountPath": sys.prefix}
    return {**spec, "volumes": [*spec.get("volumes", []), volume]}


def readable(folder: Path) -> None:
    """Let the pods' unprivileged user read a folder of data that this process made."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def local_claim(name: str, folder: Path, namespace: str, node: str = "node") -> list[Object]:
    """A read-only local PersistentVolume on `folder` of the node, and the claim bound to it."""
    volume = f"{namespace}-{name}"
    size: Object = {"storage": "1Gi"}
    return [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": volume},
            "spec": {
                "capacity": size,
                "accessModes": ["ReadOnlyMany"],
                "storageClassName": "",
                "persistentVolumeReclaimPolicy": "Retain",
                "claimRef": {"namespace": namespace, "name": name},
                "local": {"path": str(folder)},
                "nodeAffinity": {
                    "required": {
                        "nodeSelectorTerms": [
                            {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}]}
                        ]
                    }
                },
            },
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": name},
            "spec": {
                "accessModes": ["ReadOnlyMany"],
                "storageClassName": "",
                "volumeName": volume,
                "resources": {"requests": size},
            },
        },
    ]
