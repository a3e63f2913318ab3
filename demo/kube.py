"""Kubernetes for the demo and the cluster tests: kubectl as the one client, data by local PersistentVolumes, helm.

Everything is asked of the cluster that KUBECONFIG names; `tests/kit/one-node` sets it.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "helm" / "sere-operator"
SYSTEM = "sere-system"
POLICY_ANNOTATION = "serving.sere.dev/policy"

Object = dict[str, Any]


class KubectlError(RuntimeError):
    """kubectl ended with an error; the message is its own."""


def kubectl(*arguments: str, stdin: str | None = None, timeout_s: float = 120) -> str:
    """Standard output of `kubectl ARGUMENTS`.

    Raises:
        KubectlError: with what kubectl wrote on standard error.
    """
    done = subprocess.run(["kubectl", *arguments], input=stdin, capture_output=True, text=True, check=False, timeout=timeout_s)
    if done.returncode:
        raise KubectlError(f"kubectl {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def apply(*objects: Object, namespace: str) -> None:
    """As a user's `kubectl apply`."""
    kubectl(
        "apply", "--namespace", namespace, "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    )


def get(kind: str, name: str, namespace: str) -> Object | None:
    """The object, or None if there is none."""
    try:
        return json.loads(kubectl("get", kind, name, "--namespace", namespace, "-o", "json"))  # type: ignore[no-any-return]
    except KubectlError as error:
        if "NotFound" in str(error):
            return None
        raise


def items(kind: str, namespace: str, selector: str = "") -> list[Object]:
    arguments = ["--selector", selector] if selector else []
    return json.loads(kubectl("get", kind, "--namespace", namespace, *arguments, "-o", "json"))["items"]  # type: ignore[no-any-return]


def pods(name: str, namespace: str) -> list[Object]:
    """Serving pods of a SereDeployment that are not on their way out, by name."""
    selector = f"app.kubernetes.io/instance={name},app.kubernetes.io/component=engine"
    found = [pod for pod in items("pods", namespace, selector) if "deletionTimestamp" not in pod["metadata"]]
    return sorted(found, key=lambda pod: str(pod["metadata"]["name"]))


def identity(pod: Object) -> tuple[str, int]:
    """(uid, restarts): what must stay the same while a policy changes."""
    restarts = sum(status["restartCount"] for status in pod["status"].get("containerStatuses", []))
    return pod["metadata"]["uid"], restarts


def condition(sere: Object | None, kind: str) -> Object:
    """A condition of a resource, {} if it is not there or was judged on an older generation."""
    for found in ((sere or {}).get("status") or {}).get("conditions", []):
        if found["type"] == kind and found.get("observedGeneration") == (sere or {})["metadata"]["generation"]:
            return dict(found)
    return {}


def wait_for(what: str, ask: Callable[[], Any], timeout_s: float, every_s: float = 0.5) -> Any:
    """Ask until the answer is true; returns it.

    Raises:
        TimeoutError: it never was; an AssertionError of the last question is its cause.
    """
    until, last = time.monotonic() + timeout_s, None
    while True:
        try:
            if answer := ask():
                return answer
        except AssertionError as error:
            last = error
        if time.monotonic() > until:
            raise TimeoutError(f"{what} did not happen within {timeout_s:.0f} s") from last
        time.sleep(every_s)


def claim(name: str, folder: Path, namespace: str, node: str = "node") -> list[Object]:
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


# The tests' engine image holds no torch and no vLLM: they come from this process's own environment, mounted read-only.
ENVIRONMENT_CLAIM = "environment"
ENGINE_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    # vLLM would bind each engine to the same first core, and two engines share two cores here.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def small_engine(spec: Object) -> Object:
    """A SereDeployment's spec with what an engine needs to run on a small machine without a GPU."""
    engine = dict(spec.get("engine") or {})
    given = {variable["name"] for variable in engine.get("env", [])}
    added = [{"name": name, "value": value} for name, value in ENGINE_ENVIRONMENT.items() if name not in given]
    engine["env"] = [*engine.get("env", []), *added]
    volume = {"name": ENVIRONMENT_CLAIM, "claimName": ENVIRONMENT_CLAIM, "mountPath": sys.prefix}
    # Without a request the kernel gives a pod 1/500 of another's share: an engine beside anything busy would never start.
    resources = spec.get("resources") or {"requests": {"cpu": "500m", "memory": "1Gi"}}
    return {**spec, "engine": engine, "resources": resources, "volumes": [*spec.get("volumes", []), volume]}


def readable(folder: Path) -> None:
    """Let the pods' unprivileged user read a folder of data that this process made."""
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)


def prepare_namespace(namespace: str, claims: dict[str, Path]) -> None:
    """A namespace that enforces restricted pods, with a claim for each folder and one for the engine's environment."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": labels}}, namespace="default")
    for name, folder in {**claims, ENVIRONMENT_CLAIM: Path(sys.prefix)}.items():
        apply(*claim(name, folder, namespace), namespace=namespace)


def install(*values: str) -> None:
    """`helm install` of the chart with the images that images/build.py made, until its pod is ready.

    Args:
        values: further `--set` values.
    """
    helm = Path(os.environ.get("KUBEBUILDER_ASSETS", ""), "helm")
    binary = str(helm) if helm.is_file() else shutil.which("helm") or "helm"
    restricted = {"pod-security.kubernetes.io/enforce": "restricted"}
    apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": SYSTEM, "labels": restricted}}, namespace="default")
    # Two engines starting on two cores can starve the operator for longer than a Lease of 15 s.
    settings = ["replicas=1", "image.tag=dev", "engine.image.tag=dev", "leaderElection.leaseSeconds=30", *values]
    command = [binary, "install", "sere", str(CHART), "--namespace", SYSTEM]
    subprocess.run([*command, *(w for value in settings for w in ("--set", value))], check=True, stdout=subprocess.DEVNULL)
    kubectl("--namespace", SYSTEM, "rollout", "status", "deployment/sere-operator", "--timeout=120s", timeout_s=150)


def in_pod(pod: Object, path: str) -> Object:
    """`GET path` of an engine pod, decoded."""
    import urllib.request

    with urllib.request.urlopen(f"http://{pod['status']['podIP']}:8000{path}", timeout=10) as answer:
        return json.loads(answer.read())  # type: ignore[no-any-return]


def service_address(name: str, namespace: str) -> tuple[str, int]:
    service = get("service", name, namespace)
    if service is None:
        raise KubectlError(f"service {name} does not exist in {namespace}")
    return service["spec"]["clusterIP"], int(service["spec"]["ports"][0]["port"])


def config_map(name: str, data: dict[str, str], binary: dict[str, bytes] | None = None) -> Object:
    encoded = {key: base64.b64encode(value).decode() for key, value in (binary or {}).items()}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": data, "binaryData": encoded}
