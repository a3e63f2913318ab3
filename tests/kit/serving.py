"""A real `sere serve` in processes of its own and clients that load it; for engine tests and the soak of switches."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 540.0  # a slow start is no failure: beside other engines on two cores a start takes over 300 s


@dataclass(frozen=True)
class Server:
    """A server that answers; `log` holds what its processes print."""

    url: str
    pid: int
    log: Path

    def resident_mib(self) -> dict[str, float]:
        """Resident memory of each of its processes by `<pid> <name>`, in MiB."""
        parents, found = {}, {}
        for status in Path("/proc").glob("[0-9]*/status"):
            try:
                fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
            except OSError:
                continue  # the process has ended meanwhile
            pid = int(status.parent.name)
            parents[pid] = int(fields["PPid"])
            found[pid] = (fields["Name"].strip(), int(fields.get("VmRSS", "0 kB").split()[0]) / 1024)

        def ours(pid: int) -> bool:
            while pid in parents and pid != self.pid:
                pid = parents[pid]
            return pid == self.pid

        return {f"{pid} {name}": round(mib, 1) for pid, (name, mib) in sorted(found.items()) if mib and ours(pid)}


@contextmanager
def serving(model: Path, log: Path, *arguments: str, **environ: str) -> Iterator[Server]:
    """`sere serve` on a free port of the loopback, ended afterwards with all its children.

    Raises:
        RuntimeError: it ended or was not up in time; with the end of its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "sere_ext.cli.main", "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "16", "--dtype", "float32", *arguments]
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, **environ}, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2).read()
                break
            except (OSError, urllib.error.URLError):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the server did not start:\n{log.read_text()[-4000:]}") from None
                time.sleep(0.5)
        yield Server(url, process.pid, log)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def complete(url: str, model: Path, prompt: str, tokens: int = 16) -> str:
    body = {"model": str(model), "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        decoded = json.load(answer)
    if decoded["usage"]["completion_tokens"] != tokens:  # not the text's length: special tokens leave no text
        raise ValueError(f"{decoded['usage']['completion_tokens']} of {tokens} tokens")
    text: str = decoded["choices"][0]["text"]
    return text


class Load:
    """Clients that ask without pause; every answer is counted and every failure kept."""

    def __init__(self, url: str, model: Path, clients: int = 6) -> None:
        self.done = 0
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(url, model, n)) for n in range(clients)]

    def _run(self, url: str, model: Path, number: int) -> None:
        turn = 0
        while not self._stop.is_set():
            turn += 1
            try:
                complete(url, model, f"client {number} turn {turn}:")
                self.done += 1
            except Exception as error:
                self.failures.append(repr(error))

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def metrics_of(url: str) -> dict[str, float]:
    """`sere_` samples of /metrics by name and labels."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if line.startswith("sere_")}
