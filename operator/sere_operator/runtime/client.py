"""The operator's face of `kube.Api`: the same calls as coroutines, each in a small pool of threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from sere_operator.kube import Api, Object

T = TypeVar("T")


class Client:
    """Reads and writes as dicts; arguments, answers and errors are those of `kube.Api`.

    Args:
        threads: requests in flight at most.
    """

    def __init__(self, api: Api, threads: int = 16) -> None:
        self._api = api
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="kube")
        self.reads = 0  # requests since the start that only read
        self.writes = 0  # writes since the start that the API server took, for the operator's own metrics

    async def _run(self, call: Callable[..., T], *arguments: Any, **named: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, partial(call, *arguments, **named))

    async def _write(self, call: Callable[..., T], *arguments: Any, **named: Any) -> T:
        answer = await self._run(call, *arguments, **named)
        self.writes += 1
        return answer

    async def get(self, kind: str, namespace: str, name: str) -> Object | None:
        self.reads += 1
        return await self._run(self._api.get, kind, namespace, name)

    async def list(self, kind: str, namespace: str | None, selector: str = "", fields: str = "") -> list[Object]:
        self.reads += 1
        return await self._run(self._api.list, kind, namespace, selector, fields)

    async def apply(self, body: Object, *, subresource: str | None = None, manager: str | None = None) -> Object:
        return await self._write(self._api.apply, body, subresource=subresource, manager=manager)

    async def patch(self, kind: str, namespace: str, name: str, body: Object, *, subresource: str | None = None) -> Object:
        return await self._write(self._api.patch, kind, namespace, name, body, subresource=subresource)

    async def replace(self, body: Object) -> Object:
        return await self._write(self._api.replace, body)

    async def create(self, body: Object) -> Object:
        return await self._write(self._api.create, body)

    async def delete(self, kind: str, namespace: str, name: str, uid: str | None = None) -> None:
        await self._write(self._api.delete, kind, namespace, name, uid)
