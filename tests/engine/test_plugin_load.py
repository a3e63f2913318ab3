"""What loading the plug-in costs a process of vLLM, and what it must bear there."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
from sere_ext.engine import plugin
plugin.register()
assert "llvmlite" not in sys.modules, "49 MB in every process of vLLM"
from vllm.triton_utils import dispatcher
import llvmlite.binding  # as n-gram drafts do
dispatcher.register_kernels({})  # as the CPU platform does when an engine starts: it looks through every loaded module
"""


def test_llvmlite_is_not_loaded_by_the_plug_in_and_may_be_loaded_when_an_engine_starts() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
