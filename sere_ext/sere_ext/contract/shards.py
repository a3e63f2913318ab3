"""A similarity file in pieces that fit into ConfigMaps, and back again. Pure, torch-free.

A ConfigMap holds at most 1 MiB. Each shard says which file it belongs to, which piece of how many it is, and the digest of
its bytes: one line of JSON after a magic word, then the bytes. So a shard that is missing, misplaced, torn or of another
file is named before anything is written.

Shards have names in two places. ConfigMaps that carry a file are `NAME-1`, `NAME-2`, ..., each with one key (`config_maps`), and
who refers to the file names the first. In a policy directory they lie as `FILE.001-of-003`, ... (`piece_name`).
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

from pydantic import Field, ValidationError

from sere_ext.contract.errors import SimilarityError
from sere_ext.contract.policy import Record

SHARD_BYTES = 900 * 1024  # with its header; leaves room for a ConfigMap's other fields
POLICY_SHARDS = 16  # places in a pod's policy volume: for two artefacts of up to 8, one in force and one on its way
SHARD_MAGIC = b"sere-similarity-shard 1\n"
_HEADER_BYTES = 512
OPENINGS_NAME = "sere-openings"  # ConfigMap of a namespace: which held-out items tuning runs opened, one key for each model
MAX_FILE_BYTES = POLICY_SHARDS * (SHARD_BYTES - _HEADER_BYTES)  # of an artefact that pods can be given
_KEY = re.compile(r"shard-(\d{3})-of-(\d{3})")


class ShardHeader(Record):
    """What a shard says of itself."""

    file_digest: str  # sha256 of the whole file
    index: Annotated[int, Field(ge=1)]  # from 1
    count: Annotated[int, Field(ge=1)]
    digest: str  # sha256 of this shard's bytes


def split(content: bytes, limit_bytes: int = SHARD_BYTES) -> list[bytes]:
    """Shards of about equal size, none longer than `limit_bytes`.

    Raises:
        SimilarityError: nothing to split, or a limit that leaves no room beside the header.
    """
    room = limit_bytes - _HEADER_BYTES
    if room < 1 or not content:
        raise SimilarityError(f"{len(content)} bytes cannot be split into shards of {limit_bytes}; give at least 1 KiB each")
    count = -(-len(content) // room)
    size = -(-len(content) // count)
    whole = _sha256(content)
    shards = []
    for index in range(count):
        piece = content[index * size : (index + 1) * size]
        header = ShardHeader(file_digest=whole, index=index + 1, count=count, digest=_sha256(piece))
        shards.append(SHARD_MAGIC + json.dumps(header.to_json_dict()).encode() + b"\n" + piece)
    return shards


def join(shards: Sequence[bytes]) -> bytes:
    """The file that `split` was given.

    Args:
        shards: all of them, in order.

    Raises:
        SimilarityError: none, one that is missing, repeated, out of order, damaged, or of another file; the message says which.
    """
    if not shards:
        raise SimilarityError("no shards were given; give all of them in order")
    parts = [_parse(place, shard) for place, shard in enumerate(shards, 1)]
    first = parts[0][0]
    for place, (header, _) in enumerate(parts, 1):
        if (header.file_digest, header.count) != (first.file_digest, first.count):
            raise SimilarityError(f"the shard at place {place} is of another file ({header.file_digest}) than the first")
    found = [header.index for header, _ in parts]
    for index in range(1, first.count + 1):
        if index not in found:
            raise SimilarityError(f"shard {index} of {first.count} is missing; give all of them in order")
        if found.count(index) > 1:
            raise SimilarityError(f"shard {index} of {first.count} was given {found.count(index)} times")
    for place, index in enumerate(found, 1):
        if place != index:
            raise SimilarityError(f"shard {index} of {first.count} stands at place {place}; give them in order")
    content = b"".join(piece for _, piece in parts)
    if _sha256(content) != first.file_digest:
        raise SimilarityError(f"the shards do not make the file {first.file_digest}; split it again")
    return content


def encoded(content: bytes, limit_bytes: int = SHARD_BYTES) -> tuple[str, ...]:
    """The shards in base64, as ConfigMaps hold binary data."""
    return tuple(base64.b64encode(shard).decode() for shard in split(content, limit_bytes))


def config_maps(shards: Sequence[str], name: str) -> list[dict[str, Any]]:
    """One ConfigMap manifest per shard (`encoded`), `NAME-1`, `NAME-2`, ...; keys sort in order when projected into one folder.

    Apply them server-side: client-side apply copies the object into an annotation, which holds at most 256 KiB.
    """
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": config_map_name(name, index), "labels": {"serving.sere.dev/similarity": name}},
            "binaryData": {f"shard-{index:03d}-of-{len(shards):03d}": shard},
        }
        for index, shard in enumerate(shards, 1)
    ]


def config_map_name(name: str, index: int) -> str:
    """Of the shard with this index, from 1."""
    return f"{name}-{index}"


def uri(config_maps: Sequence[dict[str, Any]]) -> str:
    """How resources refer to a file in these ConfigMaps: by its first shard."""
    (key,) = config_maps[0]["binaryData"]
    return f"configmap://{config_maps[0]['metadata']['name']}/{key}"


def places(name: str, key: str) -> list[tuple[str, str]] | None:
    """ConfigMap and key of every shard in order, given those of the first; None: the key is not one of a shard.

    Raises:
        SimilarityError: it is not the first one, or there are more than pods can be given.
    """
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    index, count, stem = int(match[1]), int(match[2]), name.removesuffix("-1")
    if index != 1 or stem == name:
        raise SimilarityError(f"ConfigMap {name} key {key} is not the first shard of a file; name NAME-1 and its key")
    if count > POLICY_SHARDS:
        raise SimilarityError(f"a file of {count} shards; split it into at most {POLICY_SHARDS}, which pods have places for")
    return [(config_map_name(stem, i), f"shard-{i:03d}-of-{count:03d}") for i in range(1, count + 1)]


def piece_name(file: str, index: int, count: int) -> str:
    """Of a shard of `file` in a policy directory; they sort in order."""
    return f"{file}.{index:03d}-of-{count:03d}"


def pieces(names: Iterable[str], file: str) -> tuple[list[str], int]:
    """Which shards of `file` are among `names`, in order, and how many it has (0: none is there).

    Where it lies there split in two ways, the one of which less is missing.
    """
    pattern = re.compile(re.escape(file) + r"\.(\d{3})-of-(\d{3})")
    found: dict[int, list[str]] = {}
    for name in sorted(names):
        if match := pattern.fullmatch(name):
            found.setdefault(int(match[2]), []).append(name)
    if not found:
        return [], 0
    count = min(found, key=lambda count: count - len(found[count]))
    return found[count], count


def _parse(place: int, shard: bytes) -> tuple[ShardHeader, bytes]:
    line, newline, piece = shard.removeprefix(SHARD_MAGIC).partition(b"\n")
    if not shard.startswith(SHARD_MAGIC) or not newline:
        raise SimilarityError(f"what was given at place {place} is no shard of a similarity file, or its beginning is cut off")
    try:
        header = ShardHeader.model_validate_json(line)
    except ValidationError as error:
        raise SimilarityError(f"the shard at place {place} has a damaged header; copy it again") from error
    if _sha256(piece) != header.digest:
        raise SimilarityError(f"shard {header.index} of {header.count} is damaged: its content does not match its digest")
    return header, piece


def _sha256(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()
