"""The operator as its users run it: a process of its own, which tests may kill at any moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from kubernetes.dynamic.exceptions import NotFoundError

from tests.kit import ROOT


class OperatorProcess:
    """One operator process. Its log goes to a file; `log` reads it."""

    def __init__(self, kubeconfig: str, log: Path, **environment: str) -> None:
        self.path = log
        self._environment = {
            **os.environ,
            "KUBECONFIG": kubeconfig,
            "PYTHONPATH": ":".join(str(ROOT / part) for part in ("sere_ext", "autotune", "operator")),
            "POD_NAMESPACE": "default",
            "SERE_HEALTH_HOST": "127.0.0.1",
            "SERE_HEALTH_PORT": "0",
            "SERE_LEASE_S": "12",
            **environment,
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> OperatorProcess:
        assert not self.running, "kill it first: a second process would outlive the test"
        with self.path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sere_operator.runtime.main"], env=self._environment, stderr=log, stdout=log
            )
        return self

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """Kill the process as the kernel does when memory runs out, without a chance to tidy up."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def stop(self) -> int:
        """Stop the process as a kubelet does, by SIGTERM, and return its exit status."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(timeout=20)

    def metric(self, name: str) -> float:
        """A gauge of the running process's /metrics."""
        (*_, started) = (line for line in self.log().splitlines() if '"event": "started"' in line)
        page = urllib.request.urlopen(f"http://127.0.0.1:{json.loads(started)['port']}/metrics", timeout=10).read().decode()
        return float(next(line.split()[1] for line in page.splitlines() if line.startswith(f"{name} ")))

    def log(self) -> str:
        return self.path.read_text()


def eventually(check: Any, timeout_s: float = 60.0, what: str = "") -> Any:
    """Call `check` until it returns something true. AssertionErrors, failed look-ups and missing objects mean that it is not yet so."""
    until, last = time.monotonic() + timeout_s, None
    while time.monotonic() < until:
        try:
            last = check()
            if last:
                return last
        except (AssertionError, KeyError, IndexError, StopIteration, NotFoundError) as error:
            last = error
        time.sleep(0.1)
    raise AssertionError(f"not within {timeout_s} s: {what or check}: last {last!r}")


def manifest(name: str = "m", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "serving.sere.dev/v1alpha1",
        "kind": "SereDeployment",
        "metadata": {"name": name},
        "spec": {"model": {"name": "fake/model"}, "engine": {"image": "engine:1"}, **spec},
    }


class World:
    """One namespace with an operator and a fake node."""

    def __init__(self, client: Any, namespace: str, node: Any, operator: OperatorProcess) -> None:
        self.client, self.namespace, self.node, self.operator = client, namespace, node, operator

    def api(self, kind: str) -> Any:
        version = {
            "SereDeployment": "serving.sere.dev/v1alpha1", "SereTuningJob": "serving.sere.dev/v1alpha1",
            "SereProfile": "serving.sere.dev/v1alpha1", "Deployment": "apps/v1", "PodDisruptionBudget": "policy/v1",
            "HorizontalPodAutoscaler": "autoscaling/v2", "ReplicaSet": "apps/v1",
            "Job": "batch/v1", "Role": "rbac.authorization.k8s.io/v1", "RoleBinding": "rbac.authorization.k8s.io/v1", "Lease": "coordination.k8s.io/v1",
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

    def ready(self, name: str = "m", timeout_s: float = 120.0) -> None:
        def check() -> bool:
            ready = self.condition("Ready", name)
            assert ready["status"] == "True", (ready["reason"], ready["message"])
            return ready["current"]

        eventually(check, timeout_s, f"{name} Ready")

    def pods(self) -> list[Any]:
        """Fake pods of this world's namespace."""
        return [pod for pod in self.node.pods.values() if pod.namespace == self.namespace]

    def digests(self) -> list[str]:
        return sorted(pod.digest for pod in self.pods())
