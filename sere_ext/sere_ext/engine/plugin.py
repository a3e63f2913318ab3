"""Entry point `vllm.general_plugins`: loads in every vLLM process, any number of times, and changes nothing by itself.

It teaches vLLM's worker base class to look for our settings when a worker starts. Only if there are some is the model's
routing wrapped (`worker.py`, `seam.py`). Without settings a worker is stock vLLM.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

from sere_ext.engine import worker


def register() -> None:
    """Called by vLLM in every process before workers exist."""
    _shield_before_the_scan()
    worker.patch_worker_base()


def _shield_before_the_scan() -> None:
    """Have llvmlite shielded before vLLM's CPU platform looks through all attributes of all loaded modules at engine start.

    That scan fails on llvmlite's library object (seen with vLLM 0.32, llvmlite 0.47). vLLM's n-gram drafts load it, so a second
    engine could not start in a process that had one with them. A process that never loads it is spared its 49 MB.
    """
    try:
        from vllm.triton_utils import dispatcher
    except ImportError:  # a vLLM without the scan
        return
    scan = dispatcher.register_kernels
    if getattr(scan, "_sere_patched", False):
        return

    @functools.wraps(scan)
    def shielded(*args: Any, **kwargs: Any) -> Any:
        _shield_llvmlite()
        return scan(*args, **kwargs)

    shielded._sere_patched = True  # type: ignore[attr-defined]
    dispatcher.register_kernels = shielded


def _shield_llvmlite() -> None:
    """Make llvmlite's library object, where it is loaded, answer "no such attribute" when asked for `__dict__`: it answers any
    name with a function."""
    ffi: Any = sys.modules.get("llvmlite.binding.ffi")
    library: Any = type(ffi.lib) if ffi else None
    if library is None or library.__name__ == "_Shielded":
        return

    class _Shielded(library):
        __slots__ = ()

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return super().__getattr__(name)

    ffi.lib.__class__ = _Shielded
