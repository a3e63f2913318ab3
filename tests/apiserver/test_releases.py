"""Helm on a real API server: a second release beside the first, CRDs that were kept, and who owns them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit import ROOT

from .conftest import Kubectl

CHART = ROOT / "helm" / "sere-operator"


@pytest.fixture
def releases(kubeconfig: str, namespace: str) -> Iterator[list[str]]:
    """Names of what was installed, to be taken away afterwards."""
    names: list[str] = []
    yield names
    for name in names:
        helm(kubeconfig, "uninstall", name, "-n", namespace)


def helm(kubeconfig: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    binary = Path(os.environ.get("KUBEBUILDER_ASSETS", ""), "helm")
    command = [str(binary) if binary.is_file() else "helm", "--kubeconfig", kubeconfig, *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)


def test_releases_share_the_crds_and_one_takes_them_over(
    kubeconfig: str, namespace: str, kubectl: Kubectl, releases: list[str]
) -> None:
    def install(verb: str, name: str, *more: str) -> str:
        done = helm(kubeconfig, verb, name, str(CHART), "-n", namespace, "--set", f"watchNamespaces={{{namespace}}}", *more)
        assert done.returncode == 0, done.stderr
        releases[:] = [*{*releases, name}]
        return done.stdout

    def owner() -> str | None:
        crd = json.loads(kubectl("get", "crd", "seredeployments.serving.sere.dev", "-o", "json").stdout)
        name = (crd["metadata"].get("annotations") or {}).get("meta.helm.sh/release-name")
        return str(name) if name else None

    told = install("install", "a")  # over CRDs that somebody applied by hand
    assert owner() is None and "of nobody's release, and are left as they are" in told
    install("upgrade", "a", "--set", "crds.takeOver=true", "--take-ownership", "--force-conflicts")
    assert owner() == "a"
    told = install("install", "b")
    assert owner() == "a" and f"of release a in namespace {namespace}, and are left as they are" in told
    helm(kubeconfig, "uninstall", "a", "-n", namespace)
    assert owner() == "a", "kept, with every model that is served"
    install("install", "a")  # as the README says it
    helm(kubeconfig, "uninstall", "a", "-n", namespace)
    install("upgrade", "b", "--reuse-values", "--set", "crds.takeOver=true", "--take-ownership")
    assert owner() == "b"
