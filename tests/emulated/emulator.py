"""Compiles reroute_cuda.cu as C++ against `cuda_runtime.h` and `runtime.cpp` beside this file, so that it runs without a GPU.

This executes the source of the CUDA kernel, with its barriers, warp operations and atomics, on one processor. It says nothing
about a GPU's speed, its memory model or its compiler.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Iterable
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from pathlib import Path

from sere_ext.routing import kernel
from sere_ext.routing.build import SOURCES
from sere_ext.routing.state import LayerState
from tests.kit.reroute_contract import Tensors, kernel_call

HERE = Path(__file__).parent
SOURCE = (SOURCES / "reroute_cuda.cu").read_text()
BARRIER = "__syncthreads();"
COMMON = ("g++", "-std=c++17", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-Wno-unknown-pragmas")


def build(folder: Path, name: str, *, races: bool, source: str = SOURCE) -> Emulated:
    """Compile a version of the source.

    Args:
        folder: where files are made.
        name: of the library; one process may load several.
        races: check for data races and count chains of loads; slower.
        source: text of the .cu file.
    """
    work = folder / name
    work.mkdir()
    code = work / "device.cpp"
    code.write_text(re.sub(r"__shared__\s+(\w+)\s+(\w+)\s*;", r"\1& \2 = emulated::shared<\1>();", source))
    include = ("-I", str(HERE), "-I", str(SOURCES))
    check = ("-DRACES",) if races else ()
    device = (
        "-O1",
        "-D__CUDACC__",
        "-D__CUDA_ARCH__=900",
        "-include",
        "cuda_runtime.h",
        *(("-fsanitize=thread",) if races else ()),
    )
    library = work / "kernel.so"
    for arguments in (
        (*device, "-c", str(code), "-o", str(work / "device.o")),
        ("-O2", *check, "-c", str(HERE / "runtime.cpp"), "-o", str(work / "runtime.o")),
    ):
        subprocess.run([*COMMON, *include, *arguments], check=True)
    subprocess.run(["g++", "-shared", str(work / "device.o"), str(work / "runtime.o"), "-o", str(library)], check=True)
    return Emulated(library)


def without_barrier(number: int) -> str:
    """The source with one of its barriers taken out."""
    parts = SOURCE.split(BARRIER)
    return BARRIER.join([*parts[:number], parts[number] + parts[number + 1], *parts[number + 2 :]])


class Emulated:
    """A compiled version of the kernel, called as the real one is."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.sere_reroute_cuda.argtypes = [POINTER(kernel.Layer), POINTER(kernel.Call), c_void_p]
        self._library.sere_cuda_error.argtypes = [c_int]
        self._library.sere_cuda_error.restype = c_char_p
        self._library.emulated_seed.argtypes = [c_uint]
        self._library.emulated_watch.argtypes = [c_void_p, c_size_t]
        self._launches = 0

    def launch(self, layer: LayerState, tensors: Tensors) -> None:
        """One call; threads run in an order of its own.

        Raises:
            RuntimeError: what the emulator found.
        """
        self._launches += 1
        self._library.emulated_seed(self._launches)
        if code := self._library.sere_reroute_cuda(byref(layer.struct), byref(kernel_call(tensors)), None):
            raise RuntimeError(self._library.sere_cuda_error(code).decode())

    def chain(self, layer: LayerState, tensors: Tensors) -> int:
        """Run a call and return its longest chain of dependent loads from global memory."""
        arrays = (layer.table, layer.neighbours, layer.limits, layer.real)
        self._watch([(array.ctypes.data, array.nbytes) for array in arrays])
        self._watch((tensor.data_ptr(), tensor.nbytes) for tensor in tensors.values())
        self.launch(layer, tensors)
        self._library.emulated_watch(None, 0)
        return int(self._library.emulated_chain())

    def _watch(self, ranges: Iterable[tuple[int, int]]) -> None:
        for address, size in ranges:
            self._library.emulated_watch(address, size)
