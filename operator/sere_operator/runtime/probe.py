"""Asking engine pods themselves, over HTTP: what they apply, a real token, their histograms, golden prompts."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass, field
from typing import Any

import httpx2
from prometheus_client.parser import text_string_to_metric_families
from sere_ext.contract.profile import GoldenPrompt

from sere_operator.plan.histogram import from_bounds
from sere_operator.plan.snapshot import GoldenResult, PodMetrics

PROOF_TTL_S = 600.0  # a token proves a pod for so long; while it holds nothing is sent
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_HISTOGRAMS = ("sere_tpot_seconds", "sere_ttft_seconds")


@dataclass
class Prober:
    """Keeps what was proven per container, so that a settled pod is asked `GET /sere` and nothing else."""

    state_timeout_s: float = 10.0  # every rank is asked, between two steps of a busy engine
    token_timeout_s: float = 60.0
    _proofs: dict[tuple[str, ...], tuple[str, float]] = field(default_factory=dict)
    _client: httpx2.AsyncClient | None = None

    def client(self) -> httpx2.AsyncClient:
        if self._client is None:
            limits = httpx2.Limits(max_connections=200, max_keepalive_connections=50, keepalive_expiry=30)
            self._client = httpx2.AsyncClient(timeout=self.state_timeout_s, limits=limits, trust_env=False)
        return self._client

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def state(self, base: str) -> dict[str, Any] | None:
        """Decoded `GET /sere`, None if there is no answer of that form."""
        try:
            answer = await self.client().get(f"{base}/sere")
            decoded = answer.json() if answer.status_code == 200 else None
        except (httpx2.HTTPError, ValueError):
            return None
        return decoded if isinstance(decoded, dict) and "policyDigest" in decoded else None

    async def proven(self, base: str, model: str, container: tuple[str, ...], digest: str | None) -> str | None:
        """The digest under which this container gave a real token; asks for one if `digest` is not proven yet."""
        known = self._proofs.get(container)
        fresh = known is not None and time.monotonic() - known[1] < PROOF_TTL_S
        if digest is None or (fresh and known is not None and known[0] == digest):
            return known[0] if fresh and known else None
        if await self._token(self.client(), base, model):
            self._proofs[container] = (digest, time.monotonic())
            return digest
        return None

    async def through_service(self, base: str, model: str, key: tuple[str, ...]) -> str | None:
        """Policy digest of the pod that a token came from through the Service: both asked on one connection."""
        known = self._proofs.get(key)
        if known is not None and time.monotonic() - known[1] < PROOF_TTL_S:
            return known[0]
        limits = httpx2.Limits(max_connections=1, max_keepalive_connections=1)
        try:
            async with httpx2.AsyncClient(timeout=self.state_timeout_s, limits=limits, trust_env=False) as one:
                if not await self._token(one, base, model):
                    return None
                state = (await one.get(f"{base}/sere")).json()
        except (httpx2.HTTPError, ValueError):
            return None
        digest = state.get("policyDigest") if isinstance(state, dict) else None
        if digest is not None:
            self._proofs[key] = (digest, time.monotonic())
        return digest

    def forget(self) -> None:
        """Drop proofs that have run out, of pods that may be long gone; called now and then by the resync."""
        now = time.monotonic()
        self._proofs = {key: proof for key, proof in self._proofs.items() if now - proof[1] < PROOF_TTL_S}

    async def _token(self, client: httpx2.AsyncClient, base: str, model: str) -> bool:
        body = {"model": model, "prompt": "1", "max_tokens": 1, "temperature": 0}
        try:
            answer = await client.post(f"{base}/v1/completions", json=body, timeout=self.token_timeout_s)
            return answer.status_code == 200 and int(answer.json()["usage"]["completion_tokens"]) >= 1
        except (httpx2.HTTPError, ValueError, KeyError, TypeError):
            return False

    async def metrics(self, base: str, limits: set[str]) -> PodMetrics | None:
        """The plug-in's latency histograms with the bounds in `limits` (ms), None if they cannot be read."""
        try:
            answer = await self.client().get(f"{base}/metrics")
            return parse_metrics(answer.text, limits) if answer.status_code == 200 else None
        except (httpx2.HTTPError, ValueError):
            return None

    async def golden(
        self, base: str, model: str, prompts: tuple[GoldenPrompt, ...], concurrency: int, pod_uid: str, digest: str
    ) -> GoldenResult:
        """Answer the prompts `concurrency` at a time, so that they run inside the policy's batch sizes."""
        gate = asyncio.Semaphore(max(1, concurrency))

        async def one(prompt: GoldenPrompt) -> bool | None:
            path, body = golden_request(model, prompt)
            async with gate:
                try:
                    answer = await self.client().post(f"{base}{path}", json=body, timeout=self.token_timeout_s)
                    if answer.status_code != 200:
                        return None
                    return right(golden_answer(answer.json()), prompt.answer)
                except (httpx2.HTTPError, ValueError, KeyError, IndexError):
                    return None

        answers = await asyncio.gather(*(one(prompt) for prompt in prompts))
        return GoldenResult(pod_uid, digest, tuple(answers))


def golden_request(model: str, prompt: GoldenPrompt) -> tuple[str, dict[str, Any]]:
    """(path, body) that asks a golden prompt as the tuner asked it: a conversation by the chat template, else plain text."""
    shared = {"model": model, "max_tokens": prompt.max_tokens, "temperature": 0}
    if prompt.messages:
        return "/v1/chat/completions", {**shared, "messages": [message.to_json_dict() for message in prompt.messages]}
    return "/v1/completions", {**shared, "prompt": prompt.prompt}


def golden_answer(body: dict[str, Any]) -> str:
    """The text of a completion or of a chat completion. Raises KeyError or IndexError where it is neither."""
    choice = body["choices"][0]
    return str(choice["message"]["content"] or "") if "message" in choice else str(choice["text"])


def right(text: str, answer: str) -> bool:
    """Whether a golden prompt was answered right: the answer alone, on the first line, or as the last number."""
    given, wanted = text.strip(), answer.strip()
    if given == wanted or given.split("\n", 1)[0].strip() == wanted:
        return True
    numbers = _NUMBER.findall(given)
    return bool(_NUMBER.fullmatch(wanted) and numbers and _number(numbers[-1]) == _number(wanted))


def _number(text: str) -> float:
    return float(text.replace(",", ""))


def parse_metrics(text: str, limits: set[str]) -> PodMetrics:
    """Prometheus text to histograms; a bound that is in `limits` becomes `over[<ms>]`, the number of requests above it."""
    found: dict[str, dict[tuple[str, str], dict[str, Any]]] = {name: {} for name in _HISTOGRAMS}
    # The whole page is large (vLLM's own metrics); only our lines are parsed.
    lines = [line for line in text.splitlines() if line.removeprefix("# TYPE ").startswith(_HISTOGRAMS)]
    for family in text_string_to_metric_families("\n".join(lines) + "\n"):
        if family.name not in found:
            continue
        for sample in family.samples:
            key = (sample.labels.get("policy", ""), sample.labels.get("bucket", ""))
            entry = found[family.name].setdefault(key, {"sum": 0.0, "le": {}})
            if sample.name.endswith("_sum"):
                entry["sum"] += sample.value
            elif sample.name.endswith("_bucket"):
                bound = float(sample.labels["le"])
                entry["le"][bound] = entry["le"].get(bound, 0.0) + sample.value
    return PodMetrics(
        *({key: from_bounds(one["le"], one["sum"], limits) for key, one in found[name].items()} for name in _HISTOGRAMS)
    )
