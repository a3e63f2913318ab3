"""The study's file: a journal of whole lines, also after a power loss and on a full disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from optuna.storages.journal import JournalFileBackend

from sere_ext.contract.errors import DiskFullError

# What a write says where the place is full: the disk, the user's quota, or the largest file that is allowed.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Journal(JournalFileBackend):
    """Optuna's journal file with one writer, who holds the folder's lock.

    A line that was written in part (power loss, kill, full disk) is cut off, so that nothing is ever appended to it.
    """

    def __init__(self, path: Path) -> None:
        cut_torn_line(path)
        super().__init__(str(path))
        self._path = path

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Append whole lines or nothing. Raises DiskFullError."""
        try:
            super().append_logs(logs)
        except OSError as error:
            cut_torn_line(self._path)
            if error.errno not in FULL:
                raise
            raise DiskFullError(self._path.parent, error) from error


def cut_torn_line(path: Path) -> None:
    """Cut a file after its last newline. Does nothing where there is no file."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        kept = end
        while kept:
            start = max(0, kept - 65536)
            file.seek(start)
            newline = file.read(kept - start).rfind(b"\n")
            if newline >= 0:
                kept = start + newline + 1
                break
            kept = start
        if kept < end:
            file.truncate(kept)
