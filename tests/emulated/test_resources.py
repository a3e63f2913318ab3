"""What nvcc makes of the CUDA kernel: no spilled register, little stack, code that fits an instruction cache. Needs nvcc, no GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from sere_ext.contract.errors import UnsupportedError
from sere_ext.routing import build

MOST_STACK_BYTES = 64  # what the call of the refill hands over in memory; nothing else may lie there
MOST_CODE_BYTES = 48 << 10  # on the path without the refill, which is a function of its own


@pytest.fixture(scope="module")
def nvcc() -> str:
    try:
        return build._compiler("cuda")[0]
    except UnsupportedError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("architecture", build.CUDA_ARCHITECTURES)
def test_the_kernel_fits(nvcc: str, architecture: int, tmp_path: Path) -> None:
    if f"sm_{architecture}" not in subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout:
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    made = tmp_path / "kernel.cubin"
    flags = [flag for flag in build.CUDA_FLAGS if flag not in ("-shared", "-cudart=static")]
    command = [nvcc, *flags, "-cubin", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-o", str(made), str(build._source("cuda"))]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    kernels = re.findall(
        r"entry function '(\w*run\w*)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
        said,
        re.DOTALL,
    )
    assert len(kernels) == 6, said  # two widths of ids, three of groups of lanes
    for name, stack, stores, loads in kernels:
        assert (int(stores), int(loads)) == (0, 0), name
        assert int(stack) <= MOST_STACK_BYTES, name
    spilled = re.findall(r"([1-9]\d*) bytes spill", said)
    assert not spilled, said
    for name, size in code_sizes(made).items():
        assert size <= MOST_CODE_BYTES, name


def code_sizes(cubin: Path) -> dict[str, int]:
    """Bytes of each kernel's code, its calls of functions in the same section left out."""
    readelf = shutil.which("readelf")
    assert readelf, "readelf comes with the compiler (Debian: binutils)"
    listing = subprocess.run([readelf, "-s", "-W", str(cubin)], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listing.splitlines() if " FUNC " in line]
    section = {row[-1]: row[-2] for row in rows}
    whole = {row[-1]: int(row[2], 0) for row in rows}
    entries = [name for name in whole if name.startswith("_Z")]
    assert len(entries) == 6, listing
    inner = {
        name: sum(whole[other] for other in whole if other not in entries and section[other] == section[name]) for name in entries
    }
    return {name: whole[name] - inner[name] for name in entries}
