"""The API-server rung: a real etcd, kube-apiserver and controller-manager, no node.

    tests/kit/one-node -k -- python -m pytest tests/apiserver

starts them in namespaces of their own. A cluster that the user names by SERE_TEST_KUBECONFIG serves as well;
KUBECONFIG alone is not taken, lest tests write to whatever cluster a shell happens to point at.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml
from kubernetes import client as kube
from kubernetes import config
from kubernetes.dynamic import DynamicClient

from tests.kit import ROOT

CRDS = ROOT / "manifests" / "crd"
SAMPLES = ROOT / "manifests" / "samples"

Kubectl = Callable[..., "subprocess.CompletedProcess[str]"]


def _missing() -> str | None:
    """One line on what is missing and what mends it, or None."""
    if not os.environ.get("SERE_TEST_KUBECONFIG") and not (os.environ.get("KUBE_DIR") and os.environ.get("KUBECONFIG")):
        return "no API server: run `tests/kit/one-node -k -- python -m pytest tests/apiserver`, or set SERE_TEST_KUBECONFIG"
    if shutil.which("kubectl") is None:
        return "no kubectl on PATH: add the folder that KUBEBUILDER_ASSETS names, or install kubectl"
    return None


@pytest.fixture(scope="session")
def kubeconfig() -> str:
    """Path of the kubeconfig of a cluster that may be written to."""
    if reason := _missing():
        if os.environ.get("SERE_REQUIRE_RUNGS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    path = os.environ.get("SERE_TEST_KUBECONFIG") or os.environ["KUBECONFIG"]
    os.environ["KUBECONFIG"] = path  # for kubectl and for processes that tests start
    return path


@pytest.fixture(scope="session")
def crds(kubeconfig: str) -> list[str]:
    """The project's CRDs, installed and established. Their names."""
    subprocess.run(["kubectl", "apply", "--server-side", "-k", str(CRDS)], check=True, capture_output=True, text=True, timeout=60)
    names = [yaml.safe_load(path.read_text())["metadata"]["name"] for path in sorted(CRDS.glob("sere*.yaml"))]
    subprocess.run(
        ["kubectl", "wait", "--for=condition=Established", "--timeout=30s", *(f"crd/{name}" for name in names)],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    # Established comes before discovery lists the resources; kubectl and the dynamic client go by discovery.
    until = time.monotonic() + 30
    while True:
        listed = subprocess.run(
            ["kubectl", "api-resources", "--api-group=serving.sere.dev", "-o", "name"],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
        )
        if listed.stdout.split() == names:
            return names
        assert time.monotonic() < until, f"discovery lists {listed.stdout.split()} of {names}"
        time.sleep(0.2)


@pytest.fixture(scope="session")
def client(kubeconfig: str, crds: list[str]) -> DynamicClient:
    """The official dynamic client, as cluster-admin, with the CRDs there."""
    return DynamicClient(kube.ApiClient(configuration=_configuration(kubeconfig)))


def _configuration(kubeconfig: str) -> kube.Configuration:
    configuration = kube.Configuration()
    config.load_kube_config(kubeconfig, client_configuration=configuration)
    return configuration


@pytest.fixture
def namespace(client: DynamicClient) -> Iterator[str]:
    """A fresh namespace, deleted afterwards (without waiting)."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    namespaces = client.resources.get(api_version="v1", kind="Namespace")
    namespaces.create(body={"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    yield name
    namespaces.delete(name=name)


@pytest.fixture
def kubectl(kubeconfig: str, crds: list[str], namespace: str) -> Kubectl:
    """`kubectl("get", "sere")` in the test's namespace. `stdin` may be an object; `check=False` takes failures."""

    def run(*arguments: str, stdin: Any = None, check: bool = True) -> subprocess.CompletedProcess[str]:
        text = stdin if isinstance(stdin, str) or stdin is None else yaml.safe_dump(stdin)
        done = subprocess.run(
            ["kubectl", "-n", namespace, *arguments], check=False, input=text, capture_output=True, text=True, timeout=120
        )
        assert not check or done.returncode == 0, f"kubectl {' '.join(arguments)}: {done.stderr}"
        return done

    return run


@pytest.fixture
def sere(client: DynamicClient) -> Any:
    """The dynamic client's SereDeployment resource."""
    return client.resources.get(api_version="serving.sere.dev/v1alpha1", kind="SereDeployment")
