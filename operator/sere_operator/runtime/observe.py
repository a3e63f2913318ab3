"""Every read of the operator: carries out what `plan.needs` asks for, until a snapshot is whole. Decides nothing."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from sere_ext.contract.config_maps import encoded, places
from sere_ext.contract.errors import SimilarityError
from sere_ext.contract.shards import join
from sere_ext.contract.similarity import verified_digest
from sere_operator.api import meta
from sere_operator.plan.needs import needs, taken
from sere_operator.plan.objects.children import Defaults
from sere_operator.plan.reads import Artefact, Child, Events, Golden, Listed, Metrics, Read, ServiceToken, State, Token
from sere_operator.plan.snapshot import Object, Similarity, Snapshot, TuningSnapshot
from sere_operator.plan.tuning.needs import needs_tuning, taken_tuning
from sere_operator.runtime.probe import Prober


class Reads(Protocol):
    """Where objects are read: the API server, or what is remembered of it. Errors are those of `kube.Api`."""

    async def get(self, kind: str, namespace: str, name: str) -> Object | None: ...
    async def list(self, kind: str, namespace: str, selector: str = "", fields: str = "") -> list[Object]: ...


Told = dict[Read, Any]


async def observe(reads: Reads, prober: Prober, namespace: str, name: str, defaults: Defaults, told: Told) -> Snapshot | None:
    """Everything about one SereDeployment, None if there is none.

    Args:
        told: what pods answered a moment ago, so that they are not asked again; their answers of now are added.
    """
    reader = Reader(reads, prober, namespace, told)
    found = await reader.read(Child(meta.DEPLOYMENT_KIND, name))
    if found is None:
        return None
    snapshot = Snapshot(now=time.time(), object=found)
    while missing := needs(snapshot, defaults):
        snapshot = taken(snapshot, await reader.all(missing))
    return replace(snapshot, now=time.time())


async def observe_tuning(reads: Reads, prober: Prober, namespace: str, name: str, defaults: Defaults) -> TuningSnapshot | None:
    """Everything about one SereTuningJob, None if there is none."""
    reader = Reader(reads, prober, namespace, {})
    found = await reader.read(Child(meta.TUNING_JOB_KIND, name))
    if found is None:
        return None
    snapshot = TuningSnapshot(now=time.time(), object=found)
    while missing := needs_tuning(snapshot, defaults):
        snapshot = taken_tuning(snapshot, await reader.all(missing))
    return replace(snapshot, now=time.time())


@dataclass(frozen=True)
class Reader:
    """Carries out reads in one namespace."""

    reads: Reads
    prober: Prober
    namespace: str
    told: Told

    async def all(self, reads: Iterable[Read]) -> dict[Read, Any]:
        """The answers of reads that are done at the same time."""
        wanted = list(reads)
        return dict(zip(wanted, await asyncio.gather(*map(self.read, wanted)), strict=True))

    async def read(self, read: Read) -> Any:
        """The answer of one read, of the type that the read's docstring names.

        Raises:
            ApiError: the API server refused a read. What a pod answers never raises.
        """
        match read:
            case State() | Token() | Metrics() | ServiceToken() | Golden():
                if read not in self.told:
                    self.told[read] = await self._ask(read)
                return self.told[read]
            case Child(kind, name):
                return await self._object(kind, name)
            case Listed(kind, selector):
                return await self.reads.list(kind, self.namespace, selector)
            case Events(kind, name, uid):
                fields = f"involvedObject.kind={kind},involvedObject.name={name},involvedObject.uid={uid}"
                return await self.reads.list("Event", self.namespace, fields=fields)
            case Artefact(uri):
                return await read_similarity(self.reads, self.namespace, uri)

    async def _ask(self, read: State | Token | Metrics | ServiceToken | Golden) -> Any:
        match read:
            case State(_, base):
                return await self.prober.state(base)
            case Token(_, base, model, container, digest):
                return await self.prober.proven(base, model, container, digest)
            case Metrics(_, base, limits):
                return await self.prober.metrics(base, set(limits))
            case ServiceToken(base, model, key):
                return await self.prober.through_service(base, model, key)
            case Golden(uid, base, model, digest, in_flight, prompts):
                return await self.prober.golden(base, model, prompts, in_flight, uid, digest)

    async def _object(self, kind: str, name: str) -> Object | None:
        """One object with its kind; of our own kinds a read leaves the type out."""
        body = await self.reads.get(kind, self.namespace, name)
        if body is None:
            return None
        ours = kind in (meta.DEPLOYMENT_KIND, meta.TUNING_JOB_KIND, meta.PROFILE_KIND)
        return {**body, **({"apiVersion": meta.API_VERSION} if ours else {}), "kind": kind}


async def read_similarity(reads: Reads, namespace: str, uri: str) -> Similarity:
    """The artefact behind `configmap://name/key`, checked; the key may be its first shard's. A claim cannot be read from here."""
    if not uri.startswith("configmap://"):
        return Similarity(problem=f"{uri} cannot be read by the operator; put the artefact into a ConfigMap")
    name, _, key = uri.removeprefix("configmap://").partition("/")
    try:
        sharded = places(name, key)
        parts = await asyncio.gather(*(_binary(reads, namespace, *place) for place in sharded or [(name, key)]))
        content = join(parts) if sharded else parts[0]
        return Similarity(encoded(content), verified_digest(content))
    except SimilarityError as error:  # never an ApiError, which is tried again
        return Similarity(problem=f"{uri}: {error}")


async def _binary(reads: Reads, namespace: str, name: str, key: str) -> bytes:
    config_map = await reads.get("ConfigMap", namespace, name)
    text = ((config_map or {}).get("binaryData") or {}).get(key)
    if text is None:
        raise SimilarityError(f"ConfigMap {name} has no binary key {key}")
    return base64.b64decode(text)
