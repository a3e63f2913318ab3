"""What the watches have shown, so that a reconciliation in which nothing is to be done costs no reads.

A watch may be late, or lose an object that went while it was broken. So nothing is ever written because of what stands here: a
reconciliation that finds something to write reads all of it anew from the API server and decides again. What it reads is
remembered here as well, which corrects whatever a watch has lost.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sere_operator.kube import KINDS, Object
from sere_operator.runtime.client import Client

Place = tuple[str, str, str]  # kind, namespace, name


class Cache:
    """Objects by kind, namespace and name, as they were last shown. Objects are never changed in place."""

    def __init__(self) -> None:
        self._objects: dict[tuple[str, str], dict[str, Object]] = {}

    def shown(self, kind: str, body: Object, *, gone: bool = False) -> None:
        """A watch, or an answer of the API server, shows an object. An older version than the one known changes nothing."""
        metadata = body["metadata"]
        of_kind = self._objects.setdefault((kind, metadata["namespace"]), {})
        known = of_kind.get(metadata["name"])
        if known is not None and _version(known) > _version(body):
            return
        if gone:
            of_kind.pop(metadata["name"], None)
        else:
            of_kind[metadata["name"]] = {"apiVersion": KINDS[kind].api_version, "kind": kind, **_light(body)}

    def get(self, kind: str, namespace: str, name: str) -> Object | None:
        return self._objects.get((kind, namespace), {}).get(name)

    def list(self, kind: str, namespace: str, selector: str) -> list[Object]:
        wanted = dict(part.split("=", 1) for part in selector.split(",") if part)
        return [
            body
            for _, body in sorted(self._objects.get((kind, namespace), {}).items())
            if wanted.items() <= (body["metadata"].get("labels") or {}).items()
        ]

    def missing(self, kind: str, namespace: str, known: Iterable[Object]) -> None:
        """The API server does not have these objects; those that were shown anew meanwhile are kept."""
        of_kind = self._objects.get((kind, namespace), {})
        for body in known:
            name = body["metadata"]["name"]
            if of_kind.get(name) is body:
                del of_kind[name]


def _light(body: Object) -> Object:
    """A ConfigMap with a similarity artefact's shard is megabytes: what is remembered is that it is there."""
    return {**body, "binaryData": None} if body.get("binaryData") else body


def _version(body: Object) -> int:
    text = str(body["metadata"].get("resourceVersion") or "0")
    return int(text) if text.isdigit() else 0


class FreshReads:
    """Reads of the API server, whose answers the cache remembers."""

    def __init__(self, client: Client, cache: Cache) -> None:
        self._client, self._cache = client, cache

    async def get(self, kind: str, namespace: str, name: str) -> Object | None:
        known = self._cache.get(kind, namespace, name)
        body = await self._client.get(kind, namespace, name)
        if body is not None:
            self._cache.shown(kind, body)
        elif known is not None:
            self._cache.missing(kind, namespace, [known])
        return body

    async def list(self, kind: str, namespace: str, selector: str = "", fields: str = "") -> list[Object]:
        if fields:  # of Events, which nobody remembers
            return await self._client.list(kind, namespace, selector, fields)
        known = self._cache.list(kind, namespace, selector)
        found = await self._client.list(kind, namespace, selector)
        for body in found:
            self._cache.shown(kind, body)
        names = {body["metadata"]["name"] for body in found}
        self._cache.missing(kind, namespace, [body for body in known if body["metadata"]["name"] not in names])
        return found


class RememberedReads:
    """Reads of the cache. Only what it does not hold in full is asked of the API server: artefacts and Events."""

    def __init__(self, client: Client, cache: Cache) -> None:
        self._client, self._cache = client, cache

    async def get(self, kind: str, namespace: str, name: str) -> Object | None:
        known = self._cache.get(kind, namespace, name)
        return await self._client.get(kind, namespace, name) if known is not None and _is_light(known) else known

    async def list(self, kind: str, namespace: str, selector: str = "", fields: str = "") -> list[Object]:
        known = [] if fields else self._cache.list(kind, namespace, selector)
        if fields or any(map(_is_light, known)):
            return await self._client.list(kind, namespace, selector, fields)
        return known


def _is_light(body: Any) -> bool:
    return "binaryData" in body and body["binaryData"] is None
