"""One HTTP request to an engine pod. Pods belong to users, so neither their pace nor the size of their answers is trusted."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any

import httpx2

from sere_ext.contract.errors import NoAnswerError

MIB = 1024 * 1024


@dataclass(frozen=True)
class Answer:
    """A whole answer, with whatever HTTP status the pod gave it."""

    status: int
    body: bytes

    def json(self) -> Any:
        """The decoded body.

        Raises:
            NoAnswerError: it is no JSON, or nested too deeply to be decoded.
        """
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise NoAnswerError("the answer is no JSON") from error


def new_client(connections: int | None = None) -> httpx2.AsyncClient:
    """A client for pods: no proxy of the environment, and no waiting for a free connection while other pods hang."""
    limits = httpx2.Limits(max_connections=connections, max_keepalive_connections=connections or 50, keepalive_expiry=30)
    return httpx2.AsyncClient(timeout=None, limits=limits, trust_env=False, headers={"Accept-Encoding": "identity"})


async def fetch(
    client: httpx2.AsyncClient, method: str, url: str, *, deadline_s: float, limit_bytes: int = MIB, body: Any = None,
    headers: dict[str, str] | None = None,
) -> Answer:  # fmt: skip
    """The answer of one request, whole.

    Args:
        deadline_s: from the first byte sent to the last byte received; a pod that drips its answer gains no time by it.
        limit_bytes: of the answer's body; no more than one block beyond it is ever held in memory.

    Raises:
        NoAnswerError: no connection, too late, too large, or compressed although that was not asked for.
    """
    try:
        async with asyncio.timeout(deadline_s), client.stream(method, url, json=body, headers=headers) as answer:
            if answer.headers.get("content-encoding", "identity") != "identity":
                raise NoAnswerError("the answer is compressed, which was not asked for")
            parts, size = [], 0
            async for part in answer.aiter_raw():
                size += len(part)
                if size > limit_bytes:
                    raise NoAnswerError(f"the answer is larger than {limit_bytes:,} bytes")
                parts.append(part)
            return Answer(answer.status_code, b"".join(parts))
    except TimeoutError as error:
        raise NoAnswerError(f"no whole answer within {deadline_s:g} s") from error
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError) as error:
        raise NoAnswerError(str(error) or type(error).__name__) from error
