"""`three_launch.cu` as Python sees it: built by nvcc with the flags of the shipped kernel, called by ctypes."""

from __future__ import annotations

import ctypes
import subprocess
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

from sere_ext.routing import build

SOURCE = Path(__file__).with_name("three_launch.cu")


def compiled(folder: Path) -> Path:
    """The library, built into a folder.

    Raises:
        UnsupportedError: no nvcc.
        subprocess.CalledProcessError: it failed; `stderr` says why.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "three_launch.so"
    subprocess.run([*build._compiler("cuda"), "-o", str(target), str(SOURCE)], capture_output=True, text=True, check=True)
    return target


def load(path: Path) -> Any:
    """The library with its signatures."""
    found = ctypes.CDLL(str(path))
    found.three_launch.argtypes = [
        c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int, c_int, c_int, c_float, c_void_p,
    ]  # fmt: skip
    found.empty_launch.argtypes = [c_void_p]
    found.graph_nodes.argtypes = [c_void_p]
    found.graph_nodes.restype = c_int64
    return found
