"""A client that sends completions through a Service without a pause and counts what fails."""

from __future__ import annotations

import http.client
import itertools
import json
import threading
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

TIMEOUT_S = 60.0


class Traffic:
    """Keeps `concurrency` requests in flight until the end of a `with` block.

    Each request has a connection of its own, so that kube-proxy spreads them over the pods (behind the API server's proxy
    it is the API server that does). A failed request is counted and its first causes kept; none is tried again, which
    would hide it.

    Args:
        url: the Service, without a path of the engine's own.
    """

    def __init__(self, url: str, model: str, prompts: Sequence[str], concurrency: int = 4, tokens: int = 8):
        self._url, self._model, self._tokens = urlsplit(url), model, tokens
        self._prompts = itertools.cycle(prompts)
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(concurrency)]
        self.requests = 0
        self.errors = 0
        self.causes: list[str] = []
        self.slowest_s = 0.0

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(TIMEOUT_S + 5)

    def _run(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                prompt = next(self._prompts)
            began = time.monotonic()
            try:
                self._ask(prompt)
                cause = None
            except Exception as error:
                cause = repr(error)
            with self._lock:
                self.requests += 1
                self.slowest_s = max(self.slowest_s, time.monotonic() - began)
                if cause is not None:
                    self.errors += 1
                    self.causes = [*self.causes, cause][:5]

    def _ask(self, prompt: str) -> None:
        body = {"model": self._model, "prompt": prompt, "max_tokens": self._tokens, "temperature": 0}
        connection = http.client.HTTPConnection(self._url.netloc, timeout=TIMEOUT_S)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", f"{self._url.path}/v1/completions", json.dumps(body), headers)
            answer = connection.getresponse()
            text = answer.read()
            if answer.status != 200:
                raise RuntimeError(f"{answer.status} {text[:200]!r}")
            if json.loads(text)["usage"]["completion_tokens"] < 1:
                raise RuntimeError("an answer without a token")
        finally:
            connection.close()
