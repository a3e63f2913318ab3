"""What `make demo ARGS="--kubeconfig FILE ..."` asks of a cluster before it makes anything, answered by a real API server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from demo import preflight

from .conftest import Kubectl

IMAGES = "registry.example/team"


def test_an_installed_operator_is_not_overwritten(kubeconfig: str, crds: list[str]) -> None:
    with pytest.raises(preflight.RefusedError, match=f"is not overwritten.*kubectl delete crd {' '.join(crds)}$"):
        preflight.check(kubeconfig, IMAGES)


@pytest.fixture
def onlooker(kubeconfig: str, kubectl: Kubectl, namespace: str, tmp_path: Path) -> Iterator[str]:
    """A kubeconfig of the namespace's own service account, which may look at namespaces and nothing else."""
    kubectl("create", "clusterrole", "onlooker", "--verb=get", "--resource=namespaces")
    kubectl("create", "clusterrolebinding", "onlooker", "--clusterrole=onlooker", f"--serviceaccount={namespace}:default")
    config = yaml.safe_load(Path(kubeconfig).read_text())
    config["users"][0]["user"] = {"token": kubectl("create", "token", "default").stdout.strip()}
    mine = tmp_path / "config"
    mine.write_text(yaml.safe_dump(config))
    yield str(mine)
    kubectl("delete", "clusterrolebinding,clusterrole", "onlooker")


def test_a_user_with_few_rights_is_told_which_are_missing(onlooker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as scope:
        scope.setenv("KUBECONFIG", "")  # the check sets it; what was there comes back
        with pytest.raises(preflight.RefusedError, match=r"may not: create namespaces, .*create pods/exec") as caught:
            preflight.check(onlooker, IMAGES)
    assert "get namespaces" not in str(caught.value)
