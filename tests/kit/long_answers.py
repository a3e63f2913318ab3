"""Clients whose answers take about a minute, each from a named pod, so that a test can replace the pod meanwhile."""

from __future__ import annotations

import http.client
import json
import threading
import time
from urllib.parse import urlsplit

TIMEOUT_S = 400.0
SAMPLE_TOKENS = 300


class LongAnswer:
    """One completion of exactly `tokens` tokens from one engine, asked for when this is made, in a thread of its own.

    Args:
        url: of the engine, without a path of its own.
        streamed: take the tokens as they come, else the whole answer at its end.
    """

    def __init__(self, url: str, model: str, tokens: int, *, streamed: bool):
        self.url, self.tokens, self._model, self._streamed = url, tokens, model, streamed
        self.began = time.monotonic()
        self.ended: float | None = None  # monotonic seconds
        self.problem: str | None = None  # why it is no whole answer
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def seconds(self) -> float:
        """From the request to the last token; NaN before."""
        return self.ended - self.began if self.ended is not None else float("nan")

    def wait(self) -> LongAnswer:
        """Return once the answer is there or has failed."""
        self._thread.join(TIMEOUT_S + 5)
        return self

    def _run(self) -> None:
        try:
            got, reason = self._ask()
            if (got, reason) != (self.tokens, "length"):
                self.problem = f"{got} of {self.tokens} tokens, finished by {reason}"
        except Exception as error:
            self.problem = repr(error)
        self.ended = time.monotonic()

    def _ask(self) -> tuple[int, str | None]:
        """(tokens that came, why the engine stopped)."""
        body = {"model": self._model, "prompt": "1+1=", "max_tokens": self.tokens, "ignore_eos": True, "temperature": 0}
        if self._streamed:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        where = urlsplit(self.url)
        connection = http.client.HTTPConnection(where.netloc, timeout=TIMEOUT_S)
        try:
            connection.request("POST", f"{where.path}/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 200:
                raise RuntimeError(f"{answer.status} {answer.read()[:200]!r}")
            if not self._streamed:
                whole = json.loads(answer.read())
                return whole["usage"]["completion_tokens"], whole["choices"][0]["finish_reason"]
            tokens, reason = 0, None
            for line in answer:
                text = line.decode().removeprefix("data: ").strip()
                if not text or text == "[DONE]":
                    continue
                part = json.loads(text)
                reason = next((choice["finish_reason"] for choice in part.get("choices", ()) if choice["finish_reason"]), reason)
                tokens = (part.get("usage") or {}).get("completion_tokens", tokens)
            return tokens, reason
        finally:
            connection.close()


def tokens_in(seconds: float, urls: list[str], model: str) -> int:
    """How many tokens each of two requests to each engine gets in that time, by short ones that all run at once.

    The further an answer, the slower its tokens come: that of ten thousand of the small model takes twice as long.
    """
    for _ in range(2):  # the first answers of an engine take longer
        samples = [LongAnswer(url, model, SAMPLE_TOKENS, streamed=streamed) for url in urls for streamed in (True, False)]
        for sample in samples:
            assert sample.wait().problem is None, sample.problem
    return int(SAMPLE_TOKENS * seconds / max(sample.seconds for sample in samples))
