"""`kubectl sere` against a real API server with no operator running: that is when the kill switch matters most."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.dynamic import DynamicClient

from sere_operator.api import meta
from tests.kit.fake_node import KEY
from tests.kit.states import engine_state

from .conftest import SAMPLES, Kubectl

POLICY = "sere-9f3c01d2"
NEWER = "sere-77ab4e10"
NODE_ADDRESS = "192.0.2.1"  # of tests/kit/one-node; the API server refuses to proxy to loopback

Sere = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def plugin(namespace: str) -> Sere:
    """The plug-in as a process, in the test's namespace."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "sere_operator.cli.kubectl", arguments[0], "-n", namespace, *arguments[1:]]
        return subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)

    return run


def pod(name: str, **annotations: str) -> dict[str, Any]:
    labels = dict(pair.split("=") for pair in meta.engine_selector("qwen3-static").split(","))
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": labels, "annotations": annotations},
        "spec": {"containers": [{"name": "engine", "image": "none"}]},
    }


@pytest.fixture
def served(kubectl: Kubectl, sere: Any, namespace: str) -> None:
    """What an operator that has died since left behind: the resource, its policy ConfigMap and two pods."""
    kubectl("apply", "-f", str(SAMPLES / "static.yaml"))
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": meta.policy_config_map("qwen3-static")},
        "data": {"stable": POLICY, f"{POLICY}.json": "{}", f"{NEWER}.json": "{}"},
    }
    kubectl(
        "apply",
        "-f",
        "-",
        stdin=yaml.safe_dump_all([config_map, pod("one"), pod("two"), {**pod("other"), "metadata": {"name": "other"}}]),
    )
    put_status(sere, namespace, {"ready": "2/2", "routing": "Static", "policy": {"stable": POLICY, "previous": "exact"}})


def put_status(sere: Any, namespace: str, status: dict[str, Any]) -> None:
    sere.status.patch(
        body={"status": {"observedGeneration": 1, **status}},
        name="qwen3-static",
        namespace=namespace,
        content_type="application/merge-patch+json",
    )


def annotations(client: DynamicClient, namespace: str, kind: str, name: str) -> dict[str, str]:
    version = "v1" if kind == "Pod" else meta.API_VERSION
    found = client.resources.get(api_version=version, kind=kind).get(name=name, namespace=namespace).to_dict()
    return dict(found["metadata"].get("annotations") or {})


def policies(client: DynamicClient, namespace: str) -> dict[str, str]:
    maps = client.resources.get(api_version="v1", kind="ConfigMap")
    return dict(maps.get(name="qwen3-static-policy", namespace=namespace).to_dict()["data"])


@pytest.mark.usefixtures("served")
def test_exact_reaches_the_resource_the_pods_and_pods_to_come(client: DynamicClient, namespace: str, plugin: Sere) -> None:
    done = plugin("exact", "qwen3-static", "--wait", "0")
    assert (done.returncode, done.stdout) == (0, "kill switch on for qwen3-static: 2 pod(s) ordered\n"), done.stderr
    assert annotations(client, namespace, "SereDeployment", "qwen3-static")[meta.OVERRIDE_ANNOTATION] == "exact"
    nonces = set()
    for name in ("one", "two"):
        found = annotations(client, namespace, "Pod", name)
        assert found[meta.OVERRIDE_ANNOTATION] == "exact"
        nonces.add(found[meta.REFRESH_ANNOTATION])
    assert len(nonces) == 2, "each pod is made to refresh"
    assert policies(client, namespace)["override"] == "exact"
    assert policies(client, namespace)["stable"] == POLICY, "the policy to come back to is kept"
    left = annotations(client, namespace, "Pod", "other")
    assert not any(key.startswith(meta.GROUP) for key in left), "other pods of the namespace are left alone"


@pytest.mark.usefixtures("served")
def test_exact_off_takes_everything_back(client: DynamicClient, namespace: str, plugin: Sere) -> None:
    plugin("exact", "qwen3-static", "--wait", "0")
    done = plugin("exact", "qwen3-static", "--off", "--wait", "0")
    assert (done.returncode, done.stdout) == (0, "kill switch lifted for qwen3-static: 2 pod(s) ordered\n"), done.stderr
    assert meta.OVERRIDE_ANNOTATION not in annotations(client, namespace, "SereDeployment", "qwen3-static")
    assert meta.OVERRIDE_ANNOTATION not in annotations(client, namespace, "Pod", "one")
    assert "override" not in policies(client, namespace)


@pytest.mark.usefixtures("served")
def test_exact_twice_is_exact_once(client: DynamicClient, namespace: str, plugin: Sere) -> None:
    for _ in range(2):
        assert plugin("exact", "qwen3-static", "--wait", "0").returncode == 0
    assert policies(client, namespace)["override"] == "exact"


def test_exact_before_anything_is_deployed(kubectl: Kubectl, client: DynamicClient, namespace: str, plugin: Sere) -> None:
    kubectl("apply", "-f", str(SAMPLES / "static.yaml"))
    done = plugin("exact", "qwen3-static")
    assert done.returncode == 0, done.stderr
    assert "there is no ConfigMap qwen3-static-policy yet" in done.stdout
    assert annotations(client, namespace, "SereDeployment", "qwen3-static")[meta.OVERRIDE_ANNOTATION] == "exact"


@pytest.mark.usefixtures("served")
def test_a_pod_that_cannot_be_changed_does_not_keep_the_others_from_it(
    client: DynamicClient, namespace: str, kubectl: Kubectl, plugin: Sere, kubeconfig: str, tmp_path: Path
) -> None:
    """As a user who may not touch the resource: the pods and the ConfigMap are switched, and the failure is told."""
    rules = [
        {"apiGroups": [meta.GROUP], "resources": [meta.DEPLOYMENTS], "verbs": ["get", "list"]},
        {"apiGroups": [""], "resources": ["pods", "configmaps"], "verbs": ["get", "list", "patch"]},
    ]
    bound = {"name": "oncall", "namespace": namespace}
    kubectl("apply", "-f", "-", stdin=yaml.safe_dump_all([
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": bound},
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": bound, "rules": rules},
        {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": bound,
         "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "oncall"},
         "subjects": [{"kind": "ServiceAccount", **bound}]},
    ]))  # fmt: skip
    config = yaml.safe_load(Path(kubeconfig).read_text())
    config["users"][0]["user"] = {"token": kubectl("create", "token", "oncall").stdout.strip()}
    own = tmp_path / "kubeconfig"
    own.write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "sere_operator.cli.kubectl", "exact", "-n", namespace, "qwen3-static", "--wait", "0"],
        env={**os.environ, "KUBECONFIG": str(own)}, check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "cannot change SereDeployment qwen3-static" in done.stderr
    assert "forbidden" in done.stderr
    assert annotations(client, namespace, "Pod", "one")[meta.OVERRIDE_ANNOTATION] == "exact"
    assert policies(client, namespace)["override"] == "exact"


@pytest.fixture
def engines(kubectl: Kubectl, namespace: str, served: None) -> Iterator[list[str]]:
    """Both pods at an address that answers `GET /sere`. Yields the request lines; a real engine answers in tests/cluster."""
    if "KUBE_DIR" not in os.environ:
        pytest.skip("needs tests/kit/one-node, where the test has the node's address")
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            body = json.dumps(engine_state("exact", KEY, override=True).to_json_dict()).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer((NODE_ADDRESS, 8000), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    status = {"status": {"phase": "Running", "podIP": NODE_ADDRESS, "podIPs": [{"ip": NODE_ADDRESS}]}}
    for name in ("one", "two"):
        kubectl("patch", "pod", name, "--subresource=status", "--type=merge", "-p", json.dumps(status))
    yield asked
    server.shutdown()
    server.server_close()


def test_exact_waits_for_the_pods_to_confirm(engines: list[str], plugin: Sere) -> None:
    done = plugin("exact", "qwen3-static")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "confirmed by 2 pod(s): exact routing"
    assert engines == ["/sere", "/sere"]


def test_pods_that_do_not_confirm_are_said(engines: list[str], plugin: Sere) -> None:
    done = plugin("exact", "qwen3-static", "--off", "--wait", "0.5")
    assert "not confirmed by 2 of 2 pod(s) within 0.5 s" in done.stderr


def test_status_live_shows_what_each_pod_runs(engines: list[str], plugin: Sere) -> None:
    report = json.loads(plugin("status", "qwen3-static", "--live", "--json").stdout)[0]
    assert [one["runs"] for one in report["pods"]] == ["exact (override)"] * 2


@pytest.mark.usefixtures("served")
def test_status(plugin: Sere, client: DynamicClient, kubectl: Kubectl) -> None:
    kubectl("annotate", "pod", "two", f"{meta.POLICY_ANNOTATION}={NEWER}")
    done = plugin("status")
    assert done.stdout.splitlines()[0] == f"qwen3-static   ready 2/2   routing Static   policy {POLICY}"
    assert [line.split() for line in done.stdout.splitlines()[1:]] == [
        ["POD", "READY", "RESTARTS", "WANTED"],
        ["one", "no", "0", POLICY],
        ["two", "no", "0", NEWER],
    ]
    plugin("exact", "qwen3-static", "--wait", "0")
    assert "KILL SWITCH ON" in plugin("status").stdout


@pytest.mark.usefixtures("served")
def test_explain(plugin: Sere) -> None:
    plugin("exact", "qwen3-static", "--wait", "0")
    told = plugin("explain", "qwen3-static").stdout.splitlines()
    assert told[0] == (
        "qwen3-static routes exactly on every pod, because the kill switch is on. "
        f"The policy before was {POLICY}. `kubectl sere exact qwen3-static --off` lifts it."
    )
    assert told[-1] == "0 of 2 pods pass their readiness probe."


@pytest.mark.usefixtures("served")
def test_rollback_of_the_policy_in_force(client: DynamicClient, namespace: str, plugin: Sere) -> None:
    done = plugin("rollback", "qwen3-static")
    assert done.returncode == 0, done.stderr
    assert f"policy {POLICY} is given up, exact is in force" in done.stdout
    assert policies(client, namespace)["stable"] == "exact"
    assert annotations(client, namespace, "SereDeployment", "qwen3-static")[meta.ROLLBACK_ANNOTATION] == POLICY
    again = plugin("rollback", "qwen3-static")
    assert (again.returncode, "nothing to give up" in again.stderr) == (2, True)
    assert plugin("rollback", "qwen3-static", "--off").returncode == 0
    assert meta.ROLLBACK_ANNOTATION not in annotations(client, namespace, "SereDeployment", "qwen3-static")


@pytest.mark.usefixtures("served")
def test_rollback_of_a_canary_leaves_the_stable_policy(
    client: DynamicClient, sere: Any, namespace: str, kubectl: Kubectl, plugin: Sere
) -> None:
    kubectl("annotate", "pod", "two", f"{meta.POLICY_ANNOTATION}={NEWER}")
    put_status(sere, namespace, {"rollout": {"candidate": NEWER, "stage": "Analysing", "canaryPods": ["two"]}})
    done = plugin("rollback", "qwen3-static")
    assert f"policy {NEWER} is given up, {POLICY} is in force" in done.stdout
    assert policies(client, namespace)["stable"] == POLICY
    assert meta.POLICY_ANNOTATION not in annotations(client, namespace, "Pod", "two")
    assert annotations(client, namespace, "SereDeployment", "qwen3-static")[meta.ROLLBACK_ANNOTATION] == NEWER


@pytest.mark.usefixtures("served")
def test_approve(client: DynamicClient, sere: Any, namespace: str, plugin: Sere) -> None:
    nothing = plugin("approve", "qwen3-static")
    assert (nothing.returncode, "no policy is on its way" in nothing.stderr) == (2, True)
    put_status(sere, namespace, {"rollout": {"candidate": NEWER, "stage": "AwaitingApproval"}})
    assert plugin("approve", "qwen3-static").returncode == 0
    assert annotations(client, namespace, "SereDeployment", "qwen3-static")[meta.APPROVED_ANNOTATION] == NEWER


def test_a_name_that_is_not_there(plugin: Sere, namespace: str, crds: list[str]) -> None:
    done = plugin("exact", "nobody")
    assert done.returncode == 2
    assert done.stderr == f"kubectl sere: no SereDeployment nobody in namespace {namespace}; `kubectl get sere -A` lists all\n"


def test_a_server_that_is_not_there(tmp_path: Path, kubeconfig: str) -> None:
    config = yaml.safe_load(Path(kubeconfig).read_text())
    config["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:1"
    own = tmp_path / "kubeconfig"
    own.write_text(yaml.safe_dump(config))
    done = subprocess.run(
        [sys.executable, "-m", "sere_operator.cli.kubectl", "status"],
        env={**os.environ, "KUBECONFIG": str(own)}, check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "kubectl sere: the API server at https://127.0.0.1:1 does not answer" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.usefixtures("served")
def test_kubectl_finds_the_plug_in(kubectl: Kubectl, namespace: str) -> None:
    if shutil.which("kubectl-sere") is None:
        pytest.fail("no kubectl-sere on PATH: install the distribution (`pip install -e .`) and put its bin folder on PATH")
    done = subprocess.run(["kubectl", "sere", "status", "-n", namespace], check=False, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("qwen3-static"), done.stderr
