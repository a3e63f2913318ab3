"""Kernels are found where they were built ahead, built where they were not, and refused in a sentence where neither can be."""

from __future__ import annotations

import ctypes
import re
import shutil
from pathlib import Path

import pytest

from sere_ext.contract.errors import UnsupportedError
from sere_ext.routing import build
from tests.kit import ROOT


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing was built yet; returns the user's cache."""
    monkeypatch.setattr(build, "PACKAGED", tmp_path / "package")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SERE_BUILD_DIR", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "cache" / "sere"


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(build, "CUDA_DEFAULT", "/nowhere")


def test_it_is_built_once_into_the_cache_and_found_again(nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = build.library("cpu")
    assert made.parent == nowhere
    assert ctypes.CDLL(str(made)).sere_columns_in_use
    assert sorted(nowhere.iterdir()) == [made], "drafts are left behind"
    monkeypatch.setenv("PATH", "/nowhere")
    assert build.library("cpu") == made, "found without a compiler"


def test_what_was_built_ahead_is_found_without_a_compiler(nowhere: Path, no_compiler: None) -> None:
    build.PACKAGED.mkdir()
    ahead = build.PACKAGED / build._name("cpu")
    ahead.touch()
    assert build.library("cpu") == ahead


def test_other_sources_are_never_served_by_an_old_library(nowhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = build._name("cpu")
    changed = tmp_path / "csrc"
    shutil.copytree(build.SOURCES, changed)
    (changed / "reroute_core.h").open("a").write("// changed\n")
    monkeypatch.setattr(build, "SOURCES", changed)
    assert build._name("cpu") != before


@pytest.mark.parametrize(
    ("kind", "says"),
    [("cpu", "no C[+][+] compiler; install one .Debian: apt-get install g"), ("cuda", "no nvcc; install the CUDA")],
)
def test_no_compiler_is_an_error_that_says_what_to_install(nowhere: Path, no_compiler: None, kind: str, says: str) -> None:
    with pytest.raises(UnsupportedError, match=says):
        build.library(kind)


def test_a_folder_that_cannot_be_written_is_named(nowhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SERE_BUILD_DIR", str(tmp_path / "file"))
    with pytest.raises(UnsupportedError, match=r"cannot be built in .*/file .*SERE_BUILD_DIR"):
        build.library("cpu")


def test_a_failed_compilation_shows_what_the_compiler_said(
    nowhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "csrc"
    broken.mkdir()
    (broken / "reroute_core.h").touch()
    (broken / "reroute_cpu.cpp").write_text("int f() { return missing; }\n")
    monkeypatch.setattr(build, "SOURCES", broken)
    with pytest.raises(UnsupportedError, match=r"(?s)could not build the cpu kernel.*missing"):
        build.library("cpu")
    assert not list(nowhere.glob("*.so"))


def test_ahead_of_time_from_the_command_line(nowhere: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main(["cpu", "--out", str(tmp_path / "out")]) == 0
    made = Path(capsys.readouterr().out.strip())
    assert made.parent == tmp_path / "out"
    assert made.stat().st_mode & 0o555 == 0o555, "other users, like a pod's, read it"
    with pytest.raises(SystemExit, match="2"):
        build.main(["gpu"])


def test_the_wheel_carries_the_sources_and_no_library() -> None:
    from hatchling.builders.wheel import WheelBuilder

    files = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    assert {f"sere_ext/routing/csrc/{path.name}" for path in build.SOURCES.iterdir()} <= files
    assert not [name for name in files if name.endswith(".so")]


@pytest.mark.skipif(build._first("/usr/local/cuda/bin/nvcc", "nvcc") is None, reason="no nvcc; install the CUDA toolkit")
def test_the_cuda_kernel_compiles_for_every_architecture(tmp_path: Path) -> None:
    """Compiled, not run: that needs a GPU (tests/gpu)."""
    made = build.build("cuda", tmp_path)
    assert ctypes.CDLL(str(made)).sere_reroute_cuda
    assert {int(n) for n in re.findall(rb"sm_(\d+)", made.read_bytes())} == set(build.CUDA_ARCHITECTURES)
