"""The demo on a cluster that the user names: what is refused, in one line, and what is sent there."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from demo import __main__ as demo
from demo import kube, preflight, site, user_cluster
from demo.kube import KubectlError
from demo.one_node import OneNode
from demo.preflight import RefusedError
from demo.user_cluster import UserCluster

DEFAULT = {"metadata": {"name": "fast", "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}}}


@pytest.mark.parametrize(
    ("given", "engine"),
    [
        ("registry.example/team", "registry.example/team/sere-engine:dev"),
        ("registry.example/team/", "registry.example/team/sere-engine:dev"),
        ("registry.example:5000/team", "registry.example:5000/team/sere-engine:dev"),
        ("localhost:5001", "localhost:5001/sere-engine:dev"),
        ("registry.example:5000/team:v2", "registry.example:5000/team/sere-engine:v2"),
        ("team:v2", "team/sere-engine:v2"),
    ],
)
def test_images_by_what_stands_before_their_names(given: str, engine: str) -> None:
    images = preflight.images(given)
    assert images.engine == engine
    values = dict(value.split("=") for value in images.values())
    assert f"{values['engine.image.repository']}:{values['engine.image.tag']}" == engine
    assert f"{values['image.repository']}:{values['image.tag']}" == engine.replace("sere-engine", "sere-operator")


@pytest.mark.parametrize("given", ["https://registry.example/team", "Registry/Team", "registry.example/a b", "a/b:"])
def test_a_prefix_that_no_image_has_is_refused(given: str) -> None:
    with pytest.raises(RefusedError, match=r"--images takes what stands before /sere-operator:dev"):
        preflight.images(given)


def test_rights_that_are_missing_are_named() -> None:
    rights = [("create", "", "namespaces", ""), ("create", "", "pods/exec", "sere-demo")]
    assert preflight.reviews(rights)["items"][1]["spec"]["resourceAttributes"] == {
        "verb": "create",
        "resource": "pods",
        "subresource": "exec",
        "namespace": "sere-demo",
    }
    assert preflight.denied(rights, ["true", "false"]) == ["create pods/exec"]
    assert preflight.denied(rights, ["true", "true"]) == []
    with pytest.raises(ValueError, match="shorter"):
        preflight.denied(rights, ["true"])


def test_what_is_there_already_is_not_overwritten() -> None:
    ours = "sereprofiles.serving.sere.dev"
    assert preflight.in_the_way(False, ["others.example"], [DEFAULT]) is None
    assert "kubectl delete namespace sere-demo" in str(preflight.in_the_way(True, [ours], [DEFAULT]))
    assert (
        f"not overwritten: take another cluster, or apply manifests/samples to this one yourself; if no operator is left there: kubectl delete crd {ours}"
        in str(preflight.in_the_way(False, ["others.example", ours], [DEFAULT]))
    )
    assert "no default StorageClass" in str(preflight.in_the_way(False, [], [{"metadata": {"name": "slow"}}]))


def fake(folder: Path, name: str, script: str) -> None:
    path = folder / name
    path.write_text(f"#!{sys.executable}\nimport json, sys\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH; a kubeconfig beside it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("KUBECONFIG", "")
    monkeypatch.delenv("KUBEBUILDER_ASSETS", raising=False)
    (tmp_path / "config").write_text("{}")
    return tmp_path


def refusal(folder: Path, images: str = "registry.example/team", name: str = "config") -> str:
    with pytest.raises(RefusedError) as caught:
        preflight.check(str(folder / name), images)
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_every_refusal_is_one_line(programs: Path) -> None:
    assert refusal(programs, name="nowhere") == f"there is no kubeconfig {programs}/nowhere"
    assert "sere-engine:dev" in refusal(programs, images="")
    assert refusal(programs).startswith("kubectl is not on PATH")
    fake(programs, "kubectl", "sys.exit('noise\\nThe connection to the server was refused')")
    assert refusal(programs).startswith("helm is not on PATH")
    fake(programs, "helm", "")
    assert refusal(programs) == f"the cluster of {programs}/config does not answer: The connection to the server was refused"
    fake(
        programs,
        "kubectl",
        "if 'create' in sys.argv: print(*['false', 'false', *['true'] * (len(json.load(sys.stdin)['items']) - 2)])",
    )
    assert refusal(programs) == f"the user of {programs}/config may not: create namespaces, delete namespaces"
    fake(programs, "kubectl", "if 'create' in sys.argv: sys.exit('error: Unauthorized')")
    assert refusal(programs) == f"the cluster of {programs}/config refuses: error: Unauthorized"
    assert os.environ["KUBECONFIG"] == str(programs / "config")


def test_the_command_line_asks_before_stage_1(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "demo", "--kubeconfig", str(tmp_path / "nowhere"), "--images", "registry.example/team"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=kube.ROOT, timeout=60)
    assert done.returncode == 2
    assert done.stderr == f"there is no kubeconfig {tmp_path}/nowhere\n"


def test_images_alone_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("SERE_KUBECONFIG", raising=False)
    with pytest.raises(SystemExit):
        demo.arguments(["--images", "registry.example/team"])
    assert "--images goes with --kubeconfig" in capsys.readouterr().err
    monkeypatch.setenv("SERE_KUBECONFIG", "mine")
    assert demo.arguments(["--images", "registry.example/team"]).kubeconfig == str(Path("mine").absolute())


def test_the_environment_says_which_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SERE_KUBECONFIG", raising=False)
    assert isinstance(site.current.__wrapped__(), OneNode)
    monkeypatch.setenv("SERE_KUBECONFIG", "mine")
    assert isinstance(site.current.__wrapped__(), UserCluster)


def test_what_is_packed_here_lies_whole_in_the_claim(tmp_path: Path, programs: Path) -> None:
    """The pod's side is run as it is, by this interpreter; kubectl is the one part that is left out."""
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "model").mkdir(parents=True)
    target.mkdir()
    (source / "items.jsonl").write_text("{}\n")
    (source / "model" / "weights").write_bytes(bytes(range(256)) * 4096)
    fake(programs, "kubectl", "import os; command = sys.argv[sys.argv.index('--') + 1:]; os.execv(sys.executable, command)")
    user_cluster.send(source, str(target))
    assert (target / "model" / "weights").read_bytes() == (source / "model" / "weights").read_bytes()
    assert (target / "items.jsonl").read_text() == "{}\n"
    with pytest.raises(KubectlError, match="source did not reach the claim"):
        user_cluster.send(source, str(target / "model" / "weights"))


def test_taking_down_goes_on_without_a_release_and_says_what_is_left(
    programs: Path,
) -> None:
    asked = programs / "asked"
    fake(programs, "kubectl", f"open({str(asked)!r}, 'a').write(' '.join(sys.argv[1:]))")
    fake(programs, "helm", "sys.exit('Error: uninstall: Release not loaded: sere: release: not found')")
    cluster = UserCluster("config", "registry.example/team")
    cluster.remove()
    assert not asked.exists(), "nothing was made, so nothing is removed"
    cluster._began = True
    cluster.remove()
    assert asked.read_text().startswith("delete namespace sere-demo")
    fake(programs, "helm", "sys.exit('no route to host')")
    with pytest.raises(
        KubectlError, match=r"no route to host.*helm uninstall sere -n sere-demo; kubectl delete namespace sere-demo"
    ):
        cluster.remove()


def pod(**status: Any) -> dict[str, Any]:
    return {"metadata": {"name": "fill"}, "status": status}


def test_an_image_that_cannot_be_pulled_ends_the_waiting() -> None:
    waiting = {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "x/sere-engine:dev": not found'}
    stuck = pod(containerStatuses=[{"image": "x/sere-engine:dev", "state": {"waiting": waiting}}])
    with pytest.raises(KubectlError, match="image x/sere-engine:dev: Back-off pulling image"):
        user_cluster.all_ready([stuck])
    first_try = pod(containerStatuses=[{"image": "x", "state": {"waiting": {"reason": "ErrImagePull"}}}])
    assert not user_cluster.all_ready([first_try])
    unbound = pod(conditions=[{"type": "PodScheduled", "status": "False", "message": "0/1 nodes are available: unbound claims"}])
    with pytest.raises(TimeoutError, match="did not happen within 0 s: 0/1 nodes are available"):
        kube.wait_for("the pod", lambda: user_cluster.all_ready([unbound]), 0.02, every_s=0.01)
    assert user_cluster.all_ready([pod(conditions=[{"type": "Ready", "status": "True"}])])
    assert not user_cluster.all_ready([]), "no pod yet is not a pod that is ready"


def test_the_filler_is_a_pod_of_the_engines_user(tmp_path: Path) -> None:
    made = user_cluster.filler("x/sere-engine:dev", ["data"])
    assert made["spec"]["securityContext"]["runAsUser"] == 10001
    assert made["spec"]["containers"][0]["securityContext"]["readOnlyRootFilesystem"]
    assert made["spec"]["volumes"] == [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}]


def test_engines_run_where_the_claim_is_mounted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SERE_MOUNT_ENVIRONMENT", raising=False)
    cluster = UserCluster("config", "registry.example/team")
    assert "nodeSelector" not in cluster.spec({})
    cluster._node = "worker-3"
    made = cluster.spec({"model": {"uri": "pvc://data/model"}})
    assert made["nodeSelector"] == {"kubernetes.io/hostname": "worker-3"}
    assert "volumes" not in made, "a user's image has its environment in itself"
