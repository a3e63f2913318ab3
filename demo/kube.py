"""Kubernetes for the demo and the cluster tests: kubectl and helm as the only clients.

Everything is asked of the cluster that KUBECONFIG names; `demo/site.py` says which one that is.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "helm" / "sere-operator"

Object = dict[str, Any]


class KubectlError(RuntimeError):
    """kubectl or helm ended with an error, or a pod did not answer. The message is what they printed."""


def kubectl(*arguments: str, stdin: str | None = None, timeout_s: float = 120) -> str:
    """Standard output of `kubectl ARGUMENTS`.

    Raises:
        KubectlError: with what kubectl wrote on standard error.
    """
    return _output("kubectl", *arguments, stdin=stdin, timeout_s=timeout_s)


def helm(*arguments: str, timeout_s: float = 300) -> str:
    """Run a program as `kubectl` does. The binary in KUBEBUILDER_ASSETS goes before the one on PATH."""
    beside = Path(os.environ.get("KUBEBUILDER_ASSETS", ""), "helm")
    return _output(str(beside) if beside.is_file() else shutil.which("helm") or "helm", *arguments, timeout_s=timeout_s)


def _output(program: str, *arguments: str, stdin: str | None = None, timeout_s: float) -> str:
    shown = " ".join((Path(program).name, *arguments))
    try:
        done = subprocess.run([program, *arguments], input=stdin, capture_output=True, text=True, check=False, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        raise KubectlError(f"{shown}: no answer within {timeout_s:.0f} s") from None
    if done.returncode:
        raise KubectlError(f"{shown}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def apply(*objects: Object, namespace: str) -> None:
    """Apply a manifest as a user's `kubectl apply` does."""
    kubectl(
        "apply", "--namespace", namespace, "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
    )


def existing(kind: str, name: str, namespace: str) -> Object:
    """The object.

    Raises:
        KubectlError: also if there is none.
    """
    return json.loads(kubectl("get", kind, name, "--namespace", namespace, "-o", "json"))


def get(kind: str, name: str, namespace: str) -> Object | None:
    """The object, or None if there is none."""
    try:
        return existing(kind, name, namespace)
    except KubectlError as error:
        if "NotFound" in str(error):
            return None
        raise


def items(kind: str, namespace: str, selector: str = "", *, fields: str = "") -> list[Object]:
    """The objects of a kind.

    Args:
        selector: of labels.
        fields: selector of fields.
    """
    arguments = [*(["--selector", selector] if selector else []), *(["--field-selector", fields] if fields else [])]
    return json.loads(kubectl("get", kind, "--namespace", namespace, *arguments, "-o", "json"))["items"]


def pods(name: str, namespace: str) -> list[Object]:
    """Serving pods of a SereDeployment that are not on their way out, by name."""
    selector = f"app.kubernetes.io/instance={name},app.kubernetes.io/component=engine"
    found = [pod for pod in items("pods", namespace, selector) if "deletionTimestamp" not in pod["metadata"]]
    return sorted(found, key=lambda pod: str(pod["metadata"]["name"]))


def identity(pod: Object) -> tuple[str, int]:
    """(uid, restart count) of a pod: neither may change while its policy changes."""
    restarts = sum(status["restartCount"] for status in pod["status"].get("containerStatuses", []))
    return pod["metadata"]["uid"], restarts


def condition(sere: Object | None, kind: str) -> Object:
    """A condition of a resource, {} if it is not there or was judged on an older generation."""
    for found in ((sere or {}).get("status") or {}).get("conditions", []):
        if found["type"] == kind and found.get("observedGeneration") == (sere or {})["metadata"]["generation"]:
            return dict(found)
    return {}


def wait_for(what: str, ask: Callable[[], Any], timeout_s: float, every_s: float = 0.5) -> Any:
    """Call `ask` until it returns something true, and return that.

    Raises:
        TimeoutError: nothing true came in time; the message ends with the last failed assertion, which is also its cause.
    """
    until, last = time.monotonic() + timeout_s, None
    while True:
        try:
            if answer := ask():
                return answer
        except AssertionError as error:
            last = error
        if time.monotonic() > until:
            raise TimeoutError(f"{what} did not happen within {timeout_s:.0f} s" + (f": {last}" if last else "")) from last
        time.sleep(every_s)


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
    # Without a request the kernel gives a pod 1/500 of another's share: an engine beside anything busy would never start.
    resources = spec.get("resources") or {"requests": {"cpu": "500m", "memory": "1Gi"}}
    return {**spec, "engine": engine, "resources": resources}


def make_namespace(name: str) -> None:
    """Create a namespace that admits only pods of the restricted Pod Security profile."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}, namespace="default")


def install_chart(namespace: str, *values: str) -> None:
    """`helm install sere` for small clusters: one replica.

    Args:
        values: further `--set` values.
    """
    # Two engines starting on two cores can starve the operator for longer than a Lease of 15 s.
    settings = ["replicas=1", "leaderElection.leaseSeconds=30", *values]
    helm("install", "sere", str(CHART), "--namespace", namespace, *(word for one in settings for word in ("--set", one)))


def get_json(url: str) -> Object:
    """The decoded JSON that a pod answers to `GET url`.

    Raises:
        KubectlError: an answer that is none, with its status and first words.
    """
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        raise KubectlError(f"GET {url}: {error.code} {error.read(300).decode(errors='replace')}") from error
