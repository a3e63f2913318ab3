"""The real helm renders the chart; where it is missing the rung says so."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.kit import ROOT

CHART = ROOT / "helm" / "sere-operator"

Render = Callable[..., list[dict[str, Any]]]


def tool(name: str) -> str:
    beside = Path(os.environ.get("KUBEBUILDER_ASSETS", ""), name)
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        why = f"no {name} on PATH or in KUBEBUILDER_ASSETS; tests/kit/assets prints where it can be found"
        if os.environ.get("SERE_REQUIRE_RUNGS") == "1":
            pytest.fail(why)
        pytest.skip(why)
    return found


@pytest.fixture(scope="session")
def helm() -> Callable[..., subprocess.CompletedProcess[str]]:
    binary = tool("helm")

    def call(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([binary, *map(str, arguments)], capture_output=True, text=True, check=False)

    return call


@pytest.fixture(scope="session")
def render(helm: Callable[..., subprocess.CompletedProcess[str]]) -> Render:
    """A function of `--set` values that returns the objects of `helm template sere` with them."""

    def call(*values: str, namespace: str = "sere-system") -> list[dict[str, Any]]:
        sets = [word for value in values for word in ("--set", value)]
        done = helm("template", "sere", CHART, "--namespace", namespace, *sets)
        assert done.returncode == 0, done.stderr
        return [document for document in yaml.safe_load_all(done.stdout) if document]

    return call


@pytest.fixture(scope="session")
def kustomize() -> Callable[[Path], list[dict[str, Any]]]:
    binary = tool("kubectl")

    def call(folder: Path) -> list[dict[str, Any]]:
        done = subprocess.run([binary, "kustomize", str(folder)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return [document for document in yaml.safe_load_all(done.stdout) if document]

    return call
