"""Ends what the demo started: a process and all others of its group, on Linux."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

OTHERS_S = 5.0  # that the other processes of a group may take to end once the first one has
TERMINATE_S, KILL_S = 10.0, 5.0  # that a signal may take which nothing waits to clean up after


def living(group: int) -> list[int]:
    """Process ids of a group, without those that have ended and that nobody has asked about yet."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of = stat.read_text().rsplit(")", 1)[1].split()[:3]
        except OSError:  # it ended meanwhile
            continue
        if int(of) == group and state not in "ZX":
            found.append(int(stat.parent.name))
    return found


def end(process: subprocess.Popen[str], patience_s: float) -> None:
    """End a process that leads a group, and its whole group: by SIGINT, then by SIGTERM, then by SIGKILL.

    Args:
        patience_s: seconds for the process to clean up after SIGINT. Ctrl-C meanwhile goes on with the next signal.
    """
    for number, wait_s in ((signal.SIGINT, patience_s), (signal.SIGTERM, TERMINATE_S), (signal.SIGKILL, KILL_S)):
        try:
            os.killpg(process.pid, number)
            process.wait(wait_s)
            until = time.monotonic() + OTHERS_S
            while living(process.pid) and time.monotonic() < until:
                time.sleep(0.05)
            if not living(process.pid):
                return
        except (ProcessLookupError, subprocess.TimeoutExpired, KeyboardInterrupt):
            continue
