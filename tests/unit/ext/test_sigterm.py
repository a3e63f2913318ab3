"""`sere serve` told to end while it starts, as the first process of a container, which ignores signals without a handler."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

CAUGHT = 1 << (signal.SIGTERM - 1)


def catches_sigterm(process: int) -> bool:
    """Whether the process has a handler for SIGTERM."""
    (line,) = [line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("SigCgt")]
    return bool(int(line.split()[1], 16) & CAUGHT)


def test_a_server_that_is_still_being_imported_ends_at_once() -> None:
    serve = f"exec {sys.executable} -m sere_ext.cli.serve serve nowhere --port 0"
    command = ["sh", "-c", f"trap '' TERM; {serve}"]  # ignored, as the kernel does for a container's first process
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 60
        while not catches_sigterm(process.pid):
            assert time.monotonic() < until, "no handler for SIGTERM"
            time.sleep(0.02)
        process.terminate()
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
