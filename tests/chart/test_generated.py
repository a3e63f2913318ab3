"""What is derived is up to date: the chart's CRDs and manifests/base; and the overlays build."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.kit import ROOT

Kustomize = Callable[[Path], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "helm" / "generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_chart_has_every_crd_word_for_word(generate: ModuleType) -> None:
    copies = generate.crd_copies()
    assert len(copies) == 3
    assert {path: path.read_text() for path in copies} == copies, "run `make crds`"
    assert set((ROOT / "helm/sere-operator/files/crds").iterdir()) == set(copies)


def test_chart_has_every_dashboard_word_for_word(generate: ModuleType) -> None:
    copies = generate.dashboard_copies()
    assert [path.name for path in copies] == ["sere.json"]
    assert {path: path.read_text() for path in copies} == copies, "run `make crds`"


def test_the_readme_tells_of_every_value(generate: ModuleType) -> None:
    assert generate.README.read_text() == generate.readme(), "run `make crds`"
    copies = generate.values_copy()
    assert {path: path.read_text() for path in copies} == copies, "run `make crds`"
    told = {path for path, _, what in generate.documented_values() if what}
    values = yaml.safe_load((ROOT / "helm/sere-operator/values.yaml").read_text())

    def leaves(node: Any, path: str) -> Iterator[str]:
        if isinstance(node, dict) and node and path not in told:
            for key, value in node.items():
                yield from leaves(value, f"{path}.{key}".lstrip("."))
        else:
            yield path

    assert not [path for path in leaves(values, "") if path not in told]


def test_base_is_what_the_chart_renders(generate: ModuleType, helm: object) -> None:
    assert generate.BASE.read_text() == generate.base_manifest(), "run `make crds`"


@pytest.mark.parametrize("folder", ["base", "overlays/development", "overlays/production"])
def test_kustomize_builds_valid_objects(kustomize: Kustomize, folder: str) -> None:
    objects = kustomize(ROOT / "manifests" / folder)
    kinds = [one["kind"] for one in objects]
    assert kinds.count("CustomResourceDefinition") == 3
    assert kinds.count("Deployment") == 1
    for one in objects:
        kubernetes_validate.validate(one, "1.34", strict=True)


def test_overlays_change_what_they_say(kustomize: Kustomize) -> None:
    def deployment(folder: str) -> dict[str, Any]:
        (found,) = [one for one in kustomize(ROOT / "manifests" / folder) if one["kind"] == "Deployment"]
        return found["spec"]

    development, production = deployment("overlays/development"), deployment("overlays/production")
    assert development["replicas"] == 1
    assert development["template"]["spec"]["containers"][0]["image"] == "sere-operator:dev"
    assert production["replicas"] == 2
    assert production["template"]["spec"]["priorityClassName"] == "system-cluster-critical"
    assert production["template"]["spec"]["affinity"]["podAntiAffinity"]
