"""Finds the re-routing kernels' libraries, or builds them: `csrc/` by g++ for the CPU, by nvcc for CUDA.

    python -m sere_ext.routing.build [cpu] [cuda] [--out DIR]

builds ahead of time (default: cpu, into the package), so that no serving process needs a compiler; images and `make setup`
do so. Elsewhere the first engine start builds into $SERE_BUILD_DIR, or else into the user's cache. A library's name holds a
digest of its sources and flags: one of other sources is never loaded. The compiler is no part of it, since a host that has
only the library could not know it; the interface is C, so any will do.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from sere_ext.contract.errors import UnsupportedError

SOURCES = Path(__file__).parent / "csrc"
PACKAGED = Path(__file__).parents[1] / "built"  # what was built ahead
KINDS = ("cpu", "cuda")

# Portable within an architecture: a library travels with an image. No contraction: sums round as the reference's do.
CPU_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fno-exceptions", "-fno-rtti", "-ffp-contract=off",
             "-static-libgcc", "-Wl,--as-needed")  # fmt: skip
CUDA_FLAGS = ("-O3", "-std=c++17", "-shared", "-Xcompiler=-fPIC", "-fmad=false", "-cudart=static")
CUDA_DEFAULT = "/usr/local/cuda"
CUDA_ARCHITECTURES = (80, 90, 100)  # and the first one's PTX, for what is newer


def library(kind: str) -> Path:
    """The library for `cpu` or `cuda`: built ahead, built before, or built now.

    Raises:
        UnsupportedError: it is not there and cannot be built; says what to install.
    """
    folders = (*_own_folder(), PACKAGED, _cache())
    for folder in folders:
        if (found := folder / _name(kind)).is_file():
            return found
    return build(kind, (*_own_folder(), _cache())[0])


def build(kind: str, folder: Path) -> Path:
    """Compile one library into a folder, atomically: processes that start together may all do it.

    Raises:
        UnsupportedError: no compiler, or it failed.
    """
    command = _compiler(kind)
    target = folder / _name(kind)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as draft:
            made = Path(draft, target.name)
            done = subprocess.run([*command, "-o", str(made), str(_source(kind))], capture_output=True, text=True, check=False)
            if done.returncode:
                raise UnsupportedError(
                    f"{command[0]} could not build the {kind} kernel: {(done.stderr or done.stdout).strip()[-2000:]}"
                )
            made.chmod(0o755)
            made.replace(target)
    except OSError as error:
        raise UnsupportedError(
            f"the {kind} kernel cannot be built in {folder} ({error.strerror}); name a writable folder in SERE_BUILD_DIR, "
            "or build it ahead with `python -m sere_ext.routing.build`"
        ) from error
    return target


def _source(kind: str) -> Path:
    return SOURCES / ("reroute_cuda.cu" if kind == "cuda" else "reroute_cpu.cpp")


def _name(kind: str) -> str:
    digest = hashlib.sha256(" ".join(CUDA_FLAGS if kind == "cuda" else CPU_FLAGS).encode())
    for source in (SOURCES / "reroute_core.h", _source(kind)):
        digest.update(source.read_bytes())
    return f"reroute_{kind}-{platform.machine()}-{digest.hexdigest()[:12]}.so"


def _own_folder() -> tuple[Path, ...]:
    return (Path(os.environ["SERE_BUILD_DIR"]),) if os.environ.get("SERE_BUILD_DIR") else ()


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "sere")


def _compiler(kind: str) -> list[str]:
    """The command line but for output and source."""
    if kind == "cpu":
        found = _first(os.environ.get("CXX"), "g++", "c++", "clang++")
        if found is None:
            raise UnsupportedError(
                "the CPU kernel is not built and there is no C++ compiler; install one (Debian: apt-get install g++), or build it "
                "ahead with `python -m sere_ext.routing.build` where there is one"
            )
        return [found, *CPU_FLAGS]
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), CUDA_DEFAULT)
    found = _first(*(f"{home}/bin/nvcc" for home in homes if home), "nvcc")
    if found is None:
        raise UnsupportedError(
            "the CUDA kernel is not built and there is no nvcc; install the CUDA toolkit (or name it in CUDA_HOME), or build it "
            "ahead with `python -m sere_ext.routing.build cuda` where there is one"
        )
    return [found, *CUDA_FLAGS, *_architectures(found)]


def _architectures(nvcc: str) -> list[str]:
    """Code for the GPUs that this nvcc knows among ours; an older one leaves the newest to the PTX."""
    listing = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=False).stdout.split()
    known = [n for n in CUDA_ARCHITECTURES if f"sm_{n}" in listing]
    first = CUDA_ARCHITECTURES[0]
    return [*(f"-gencode=arch=compute_{n},code=sm_{n}" for n in known), f"-gencode=arch=compute_{first},code=compute_{first}"]


def _first(*programs: str | None) -> str | None:
    return next((found for name in programs if name and (found := shutil.which(name))), None)


def main(arguments: Sequence[str] | None = None, say: Callable[[str], None] = print) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m sere_ext.routing.build", description="Build the re-routing kernels ahead of time."
    )
    parser.add_argument("kinds", nargs="*", metavar="cpu|cuda", help="what to build; default: cpu")
    parser.add_argument("--out", type=Path, default=PACKAGED, help="folder; default: inside the package")
    options = parser.parse_args(arguments)
    if unknown := [kind for kind in options.kinds if kind not in KINDS]:
        parser.error(f"no kernel is called {unknown[0]}; there are cpu and cuda")
    for kind in options.kinds or ["cpu"]:
        target = options.out / _name(kind)
        try:
            say(str(target if target.is_file() else build(kind, options.out)))
        except UnsupportedError as error:
            print(f"sere: {error}", file=sys.stderr)
            return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
