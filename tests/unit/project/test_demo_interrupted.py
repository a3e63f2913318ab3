"""Ctrl-C while the demo runs a command ends every process that the command started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from demo.processes import living
from tests.kit import ROOT

PROGRAM = """
import signal, sys
from demo import __main__ as demo, processes

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what is in its background with Ctrl-C ignored
processes.TERMINATE_S = processes.OTHERS_S = 0.3
demo.run("sh", "-c", sys.argv[1], patience_s=0.3)
"""
READY = "echo $$ > ready.part; mv ready.part ready"


@pytest.mark.parametrize(
    "command",
    [
        f"trap '' INT; sleep 120 & {READY}; sleep 121",
        f"(trap '' INT; exec sleep 120) & trap 'exit 1' INT; {READY}; wait",
        f"trap '' INT TERM; sleep 120 & {READY}; sleep 121",
    ],
    ids=["it ignores Ctrl-C", "it ends and its child ignores Ctrl-C", "it ignores a plain kill too"],
)
def test_ctrl_c_leaves_no_process_of_the_command(tmp_path: Path, command: str) -> None:
    # The command finds its own folder by name: `run` starts it in that of the repository.
    arguments, group = [sys.executable, "-c", PROGRAM, f"cd {tmp_path}; {command}"], 0
    with (tmp_path / "said").open("w") as said:
        program = subprocess.Popen(arguments, cwd=ROOT, stderr=said)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "ready").exists():
            assert program.poll() is None and time.monotonic() < deadline, "the command did not start"
            time.sleep(0.02)
        group = int((tmp_path / "ready").read_text())
        assert len(living(group)) >= 2
        program.send_signal(signal.SIGINT)
        assert program.wait(timeout=60) == -signal.SIGINT, "the interruption goes on to the demo's own end"
        assert living(group) == []
    finally:
        program.kill()
        program.wait()
        for left in living(group) if group else ():
            os.kill(left, signal.SIGKILL)
    assert "stopping what was started" in (tmp_path / "said").read_text()
