"""The ConfigMaps that carry a similarity file through a cluster, and how resources refer to them. Pure.

The ConfigMaps of a file are `NAME-1`, `NAME-2`, ..., each with one shard (`shards.py`) under one key. Whoever refers to the file
names the first: `configmap://NAME-1/shard-001-of-003`.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from typing import Any

from sere_ext.contract.errors import SimilarityError
from sere_ext.contract.names import SIMILARITY_LABEL
from sere_ext.contract.shards import SHARD_BYTES, split
from sere_ext.contract.volume import POLICY_SHARDS

_KEY = re.compile(r"shard-(\d{3})-of-(\d{3})")


def encoded(content: bytes, limit_bytes: int = SHARD_BYTES) -> tuple[str, ...]:
    """The shards in base64, as ConfigMaps hold binary data."""
    return tuple(base64.b64encode(shard).decode() for shard in split(content, limit_bytes))


def config_maps(shards: Sequence[str], name: str) -> list[dict[str, Any]]:
    """ConfigMap manifests `NAME-1`, `NAME-2`, ..., one for each shard (`encoded`); their keys sort in order in one folder.

    Apply them server-side: client-side apply copies the object into an annotation, which holds at most 256 KiB.
    """
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": config_map_name(name, index), "labels": {SIMILARITY_LABEL: name}},
            "binaryData": {_key(index, len(shards)): shard},
        }
        for index, shard in enumerate(shards, 1)
    ]


def config_map_name(name: str, index: int) -> str:
    """The name of the ConfigMap that holds the shard with this index, from 1."""
    return f"{name}-{index}"


def uri(config_maps: Sequence[dict[str, Any]]) -> str:
    """How resources refer to a file in these ConfigMaps: by its first shard."""
    (key,) = config_maps[0]["binaryData"]
    return f"configmap://{config_maps[0]['metadata']['name']}/{key}"


def places(name: str, key: str) -> list[tuple[str, str]] | None:
    """The ConfigMap and key of every shard in order, given those of the first; None where the key is not that of a shard.

    Raises:
        SimilarityError: the shard is not the first one, or the file has more shards than pods can be given.
    """
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    index, count, stem = int(match[1]), int(match[2]), name.removesuffix("-1")
    if index != 1 or stem == name:
        raise SimilarityError(f"ConfigMap {name} key {key} is not the first shard of a file; name NAME-1 and its key")
    if count > POLICY_SHARDS:
        raise SimilarityError(f"a file of {count} shards; split it into at most {POLICY_SHARDS}, which pods have places for")
    return [(config_map_name(stem, i), _key(i, count)) for i in range(1, count + 1)]


def _key(index: int, count: int) -> str:
    return f"shard-{index:03d}-of-{count:03d}"
