"""The operator as its users run it: a process of its own, which tests may kill at any moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class OperatorProcess:
    """One operator process. Its log goes to a file; `log` reads it."""

    def __init__(self, kubeconfig: str, log: Path, **environment: str) -> None:
        self.path = log
        self._environment = {
            **os.environ,
            "KUBECONFIG": kubeconfig,
            "PYTHONPATH": ":".join(str(ROOT / part) for part in ("sere_ext", "autotune", "operator")),
            "POD_NAMESPACE": "default",
            "SERE_HEALTH_HOST": "127.0.0.1",
            "SERE_HEALTH_PORT": "0",
            "SERE_LEASE_S": "6",
            **environment,
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> OperatorProcess:
        with self.path.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "sere_operator.runtime.main"], env=self._environment, stderr=log, stdout=log
            )
        return self

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """As the kernel does when memory runs out: no chance to tidy up."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def stop(self) -> int:
        """As a kubelet does: SIGTERM, then the exit status."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(timeout=20)

    def log(self) -> str:
        return self.path.read_text()


def eventually(check: Any, timeout_s: float = 30.0, what: str = "") -> Any:
    """The first true value that `check` returns; AssertionErrors and lookups that fail count as not yet."""
    until, last = time.monotonic() + timeout_s, None
    while time.monotonic() < until:
        try:
            last = check()
            if last:
                return last
        except (AssertionError, KeyError, IndexError, StopIteration) as error:
            last = error
        time.sleep(0.1)
    raise AssertionError(f"not within {timeout_s} s: {what or check}: last {last!r}")
