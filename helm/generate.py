#!/usr/bin/env python3
"""Brings what is derived up to date: the chart's CRDs and dashboard from manifests, its README and
defaults from values.yaml, and manifests/base from the chart.

    python helm/generate.py            needs `helm` on PATH or in KUBEBUILDER_ASSETS

Run it after `python -m sere_operator.api.crdgen` and after every change of the chart (`make crds` does both).
tests/chart asserts that nothing is stale.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
CHART = ROOT / "helm" / "sere-operator"
CRDS = ROOT / "manifests" / "crd"
DASHBOARDS = ROOT / "manifests" / "dashboards"
BASE = ROOT / "manifests" / "base" / "operator.yaml"
README = CHART / "README.md"
HEADER = "# Generated from the chart by `python helm/generate.py`. Edit that, not this.\n"


def helm() -> str:
    """The helm binary: beside the Kubernetes binaries where those are named, else on PATH."""
    beside = Path(os.environ.get("KUBEBUILDER_ASSETS", ""), "helm")
    return str(beside) if beside.is_file() else "helm"


def crd_copies() -> dict[Path, str]:
    """The chart's files, by path: a CRD each, word for word."""
    return {CHART / "files" / "crds" / path.name: path.read_text() for path in sorted(CRDS.glob("sere*.yaml"))}


def dashboard_copies() -> dict[Path, str]:
    """The chart's Grafana dashboards, by path, word for word."""
    return {CHART / "files" / "dashboards" / path.name: path.read_text() for path in sorted(DASHBOARDS.glob("*.json"))}


def values_copy() -> dict[Path, str]:
    """The chart's values where its templates can read them, word for word."""
    return {CHART / "files" / "values.yaml": (CHART / "values.yaml").read_text()}


def documented_values() -> list[tuple[str, str, str]]:
    """(path, default as JSON, description) of every value: the comment that begins with `# --` above its key.

    A comment above a section describes the section whole; then its keys have none of their own.
    """
    text = (CHART / "values.yaml").read_text()
    found, path, comment = [], [], None  # type: ignore[var-annotated]
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("# --"):
            comment = stripped.removeprefix("# --").strip()
        elif stripped.startswith("#") and comment is not None:
            comment += " " + stripped.removeprefix("#").strip()
        elif match := re.match(r"( *)([A-Za-z]+):", line):
            path = [*path[: len(match[1]) // 2], match[2]]
            if comment is not None:
                value = yaml.safe_load(text)
                for key in path:
                    value = value[key]
                found.append((".".join(path), json.dumps(value), comment))
            comment = None
    return found


def readme() -> str:
    """The chart's README: its head, which is kept in files of the chart, and a table of every value."""
    rows = [f"| `{path}` | `{default}` | {what} |" for path, default, what in documented_values()]
    return "\n".join(
        [(CHART / "files" / "README.head.md").read_text(), "| Value | Default | Meaning |", "| --- | --- | --- |", *rows, ""]
    )


def base_manifest() -> str:
    """The chart with its default values, without CRDs (kustomize takes those from manifests/crd) and without Helm's labels."""
    command = [helm(), "template", "sere", str(CHART), "--namespace", "sere-system", "--set", "crds.enabled=false"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = [
        line
        for line in text.splitlines()
        if not line.strip().startswith(("app.kubernetes.io/managed-by: Helm", "helm.sh/chart:"))
    ]
    return HEADER + "\n".join(lines) + "\n"


def main() -> None:
    for path, text in (crd_copies() | dashboard_copies() | values_copy() | {README: readme()}).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    BASE.parent.mkdir(parents=True, exist_ok=True)
    BASE.write_text(base_manifest())


if __name__ == "__main__":
    main()
