"""Writing a file so that a reader, or a process that is killed meanwhile, sees the old file or the new one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def write_whole(path: str | Path, content: bytes | str | Callable[[Path], object]) -> None:
    """Write a draft beside the file and rename it. A draft that a kill left behind is written over by the next one.

    Args:
        content: what to write (text as UTF-8), or a function that writes it to the path that it is given.

    Raises:
        OSError: the folder or the disk does not take it.
    """
    path = Path(path)
    draft = draft_of(path)
    if isinstance(content, str):
        draft.write_text(content, encoding="utf-8")
    elif isinstance(content, bytes):
        draft.write_bytes(content)
    else:
        content(draft)
    draft.replace(path)


def draft_of(path: Path) -> Path:
    """Where the next content of a file is written first."""
    return path.with_name(f".{path.name}.part")
