"""Asking engine pods themselves, over HTTP: what they apply, a real token, their histograms, golden prompts.

Nothing that a pod answers raises here: what cannot be used is no answer.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from sere_ext.contract.errors import NoAnswerError, UnsupportedError
from sere_ext.contract.profile import GoldenPrompt
from sere_ext.contract.state import EngineState
from sere_operator.plan.histogram import from_bounds
from sere_operator.plan.snapshot import GoldenResult, PodMetrics
from sere_operator.runtime.answers import Answers, Aside
from sere_operator.runtime.fetch import MIB, Answer, fetch, new_client
from sere_operator.runtime.golden import ask_all, request_of, text_of

PROOF_TTL_S = 600.0  # a token proves a pod for so long; while it holds nothing is sent
LATE_S = 60.0  # that a proof stands in for the newer one that a busy engine has not given yet
STATE_GRACE_S = 2.0
TOKEN_GRACE_S = 10.0  # of a busy engine; were it not waited for, a pod would count as not ready between two policies
METRICS_LIMIT = 8 * MIB  # bytes; vLLM's own page has a few hundred KiB
METRICS_LINES = 20_000  # of ours in it; a few thousand with every bucket of several policies
MAX_COUNT = 2.0**53  # requests, or seconds: beyond it a number of the page is no count
ERROR_LENGTH = 1000  # characters kept of a pod's own error
_HISTOGRAMS = ("sere_tpot_seconds", "sere_ttft_seconds")


@dataclass
class Prober:
    """Keeps what was proven per container, so that a settled pod is asked `GET /sere` and nothing else.

    Every question returns soon, with the last answer or None where the pod is slower than STATE_GRACE_S or TOKEN_GRACE_S. It
    goes on, and `wake` is called when its answer has come. `aside` is entered while a pod is waited for.
    """

    state_timeout_s: float = 10.0  # every rank is asked, between two steps of a busy engine
    token_timeout_s: float = 60.0
    answers: Answers = field(default_factory=Answers)
    wake: Callable[[], None] = lambda: None
    aside: Aside = nullcontext
    api_key: str | None = None
    _proofs: dict[tuple[str, ...], tuple[str, float]] = field(default_factory=dict)
    _clients: list[httpx2.AsyncClient] = field(default_factory=list)
    _statuses: dict[str, int] = field(default_factory=dict)  # base -> HTTP status of the last completion
    _asked: set[str] = field(default_factory=set)  # bases, of this resource

    def for_resource(self, wake: Callable[[], None], aside: Aside, api_key: str | None = None) -> Prober:
        """This prober, with everything that it keeps, for one resource.

        Args:
            api_key: that its engines ask for.
        """
        return replace(self, wake=wake, aside=aside, api_key=api_key, _asked=set())

    @property
    def refusals(self) -> list[str]:
        """Why pods of this resource that were asked for a token gave none, where the API key is the reason."""
        why = "its key is another than that of" if self.api_key else "it asks for an API key; name its Secret in"
        return [
            f"{base} answers a request for a token with HTTP {status}: {why} spec.engine.apiKeySecret"
            for base, status in sorted(self._statuses.items())
            if base in self._asked and status in (401, 403)
        ]

    def client(self) -> httpx2.AsyncClient:
        if not self._clients:
            self._clients.append(new_client())
        return self._clients[0]

    async def close(self) -> None:
        await self.answers.close()
        for client in self._clients:
            await client.aclose()

    def forget(self) -> None:
        """Drop proofs that have run out and answers of pods that may be long gone; called now and then by the resync."""
        now = time.monotonic()
        for key in [key for key, proof in self._proofs.items() if now - proof[1] >= PROOF_TTL_S + LATE_S]:
            del self._proofs[key]
        self.answers.forget()
        self._statuses.clear()

    # ---- questions, each of which returns soon ----

    async def state(self, base: str) -> EngineState | None:
        """Decoded `GET /sere`, None if there is no answer of that form."""
        return await self._ask(("state", base), lambda: self._state(self.client(), base))

    async def proven(self, base: str, model: str, container: tuple[str, ...], digest: str | None) -> str | None:
        """The digest under which this container gave a real token; asks for one if `digest` is not proven yet."""
        known = self._proof(container)
        if digest is None or known == digest:
            return known

        self._asked.add(base)

        async def prove() -> str | None:
            if not await self._token(self.client(), base, model):
                return None
            self._proofs[container] = (digest, time.monotonic())
            return digest

        return await self._ask(
            ("token", base, model, *container, digest, self.api_key or ""), prove, TOKEN_GRACE_S
        ) or self._proof(container, LATE_S)

    async def through_service(self, base: str, model: str, key: tuple[str, ...]) -> str | None:
        """Policy digest of the pod that a token came from through the Service: both asked on one connection."""
        known = self._proof(key)
        if known is not None:
            return known

        async def prove() -> str | None:
            async with new_client(connections=1) as one:
                if not await self._token(one, base, model):
                    return None
                state = await self._state(one, base)
            if state is None:
                return None
            self._proofs[key] = (state.policy_digest, time.monotonic())
            return state.policy_digest

        return await self._ask(("service", base, model, *key, self.api_key or ""), prove, TOKEN_GRACE_S) or self._proof(
            key, LATE_S
        )

    async def metrics(self, base: str, limits: set[str]) -> PodMetrics | None:
        """The plug-in's latency histograms with the bounds in `limits` (ms), None if they cannot be read."""

        async def read() -> PodMetrics | None:
            url = f"{base}/metrics"
            answer = await fetch(self.client(), "GET", url, deadline_s=self.state_timeout_s, limit_bytes=METRICS_LIMIT)
            text = answer.body.decode(errors="replace")
            return await asyncio.to_thread(parse_metrics, text, limits) if answer.status == 200 else None

        return await self._ask(("metrics", base, *sorted(limits)), read)

    async def golden(
        self, base: str, model: str, prompts: tuple[GoldenPrompt, ...], in_flight: int, pod_uid: str, digest: str
    ) -> GoldenResult | None:
        """The pod's answers to the prompts, judged, with `in_flight` requests beside each other.

        None while they are being answered, and where the pod no longer applied `digest` at their end. Each run's result is
        returned once.
        """

        async def run() -> GoldenResult | None:
            answers = await ask_all(lambda prompt: self._answered(base, model, prompt), prompts, in_flight)
            state = await self._state(self.client(), base)
            return GoldenResult(pod_uid, digest, answers) if state is not None and state.policy_digest == digest else None

        return await self._ask(("golden", base, model, pod_uid, digest), run, 0.0, stand_in=False)

    async def _ask(
        self, question: tuple[str, ...], call: Callable[[], Awaitable[Any]], grace_s: float = STATE_GRACE_S, stand_in: bool = True
    ) -> Any:
        async def quiet() -> Any:
            try:
                return await call()
            except NoAnswerError:
                return None

        return await self.answers.ask(question, quiet, self.wake, grace_s=grace_s, stand_in=stand_in, aside=self.aside)

    def _proof(self, key: tuple[str, ...], late_s: float = 0.0) -> str | None:
        """What was proven, None where that is more than `late_s` beyond its time."""
        known = self._proofs.get(key)
        return known[0] if known is not None and time.monotonic() - known[1] < PROOF_TTL_S + late_s else None

    # ---- requests, each of which may take as long as its deadline ----

    async def _state(self, client: httpx2.AsyncClient, base: str) -> EngineState | None:
        answer = await fetch(client, "GET", f"{base}/sere", deadline_s=self.state_timeout_s)
        return checked_state(answer.body) if answer.status == 200 else None

    async def _completion(
        self, client: httpx2.AsyncClient, base: str, body: dict[str, Any], path: str = "/v1/completions"
    ) -> Answer:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        url = f"{base}{path}"
        answer = await fetch(client, "POST", url, deadline_s=self.token_timeout_s, body=body, headers=headers)
        self._statuses[base] = answer.status
        return answer

    async def _token(self, client: httpx2.AsyncClient, base: str, model: str) -> bool:
        body = {"model": model, "prompt": "1", "max_tokens": 1, "temperature": 0}
        answer = await self._completion(client, base, body)
        if answer.status != 200:
            return False
        try:
            return bool(answer.json()["usage"]["completion_tokens"] >= 1)
        except (LookupError, TypeError):
            return False

    async def _answered(self, base: str, model: str, prompt: GoldenPrompt) -> str | None:
        """The answer to one golden prompt, None where there was none."""
        path, body = request_of(model, prompt)
        try:
            answer = await self._completion(self.client(), base, body, path)
            return text_of(answer.json()) if answer.status == 200 else None
        except (NoAnswerError, LookupError, TypeError):
            return None


def checked_state(body: bytes) -> EngineState | None:
    """The body of `GET /sere`, None where it is not of that form; an error longer than ERROR_LENGTH is cut."""
    try:
        state = EngineState.parse(body)
    except UnsupportedError:
        return None
    return state.model_copy(update={"error": state.error[:ERROR_LENGTH]}) if state.error else state


def parse_metrics(text: str, limits: set[str]) -> PodMetrics | None:
    """Prometheus text to histograms; a bound that is in `limits` becomes `over[<ms>]`, the number of requests above it.

    None where the page holds what no histogram can hold: NaN, infinite or negative numbers, counts beyond 2^53, garbage.
    """
    # The whole page is large (vLLM's own metrics); only our lines are parsed.
    lines = [line for line in text.splitlines() if line.removeprefix("# TYPE ").startswith(_HISTOGRAMS)]
    if len(lines) > METRICS_LINES:
        return None
    found: dict[str, dict[tuple[str, str], dict[str, Any]]] = {name: {} for name in _HISTOGRAMS}
    try:
        for family in text_string_to_metric_families("\n".join(lines) + "\n"):
            for sample in family.samples if family.name in found else ():
                key = (sample.labels.get("policy", ""), sample.labels.get("bucket", ""))
                entry = found[family.name].setdefault(key, {"sum": 0.0, "le": {}})
                if not 0 <= sample.value <= MAX_COUNT:  # NaN is not either
                    return None
                if sample.name.endswith("_sum"):
                    entry["sum"] += sample.value
                elif sample.name.endswith("_bucket"):
                    bound = float(sample.labels["le"])
                    if math.isnan(bound) or bound < 0:
                        return None
                    entry["le"][bound] = entry["le"].get(bound, 0.0) + sample.value
        return PodMetrics(
            *({key: from_bounds(one["le"], one["sum"], limits) for key, one in found[name].items()} for name in _HISTOGRAMS)
        )
    except (ValueError, LookupError, ArithmeticError, TypeError, AttributeError):
        return None
