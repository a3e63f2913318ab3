"""The engine's log: where its processes print to, and the line in it that names why the engine did not start or died."""

from __future__ import annotations

import os
import re
from pathlib import Path

TAIL_BYTES = 256 * 1024
# An exception's type and text at the end of a line, whatever prefix a logger has put before it.
_EXCEPTION = re.compile(r"(?<![\w.])((?:\w+\.)*\w*(?:Error|Exception))(: .+)$")
# What vLLM's other processes raise when the one that matters has ended.
_FOLLOWS = ("Engine core initialization failed", "EngineCore encountered an issue", "EngineDeadError", "cancelled")


def redirect(path: str) -> str | None:
    """Send this process's standard output and error, and its children's, to a new file. None where it cannot be made."""
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    except OSError:
        return None
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)
    return path


def tail(path: str) -> str:
    """The end of a log, "" where it cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def root_cause(text: str) -> str | None:
    """The last exception that a log names and that does not merely follow from another process's end; None if there is none."""
    found = [match for line in text.splitlines() if (match := _EXCEPTION.search(line.rstrip()))]
    causes = [match[1] + match[2] for match in found if not any(word in match[0] for word in _FOLLOWS)]
    return causes[-1] if causes else None
