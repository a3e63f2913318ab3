"""Entry point `vllm.general_plugins`: loads in every vLLM process, any number of times, and changes nothing by itself.

It teaches vLLM's worker base class to look for our settings when a worker starts. Only if there are some is the model's
routing wrapped (`worker.py`, `seam.py`). Without settings a worker is stock vLLM.
"""

from __future__ import annotations

from typing import Any

from sere_ext.engine import worker


def register() -> None:
    """Called by vLLM in every process before workers exist."""
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
