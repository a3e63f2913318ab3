"""A similarity file in shards that fit into ConfigMaps, and back again. Pure.

A ConfigMap holds at most 1 MiB. Each shard says which file it belongs to, which piece of how many it is, and the digest of
its bytes: one line of JSON after a magic word, then the bytes. So a shard that is missing, misplaced, torn or of another
file is named before anything is written. Names of shards: `config_maps.py` in a cluster, `volume.py` in a policy volume.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, ValidationError

from sere_ext.contract.errors import SimilarityError
from sere_ext.contract.record import Record, content_digest

SHARD_BYTES = 900 * 1024  # a shard with its header; leaves room for a ConfigMap's other fields
SHARD_MAGIC = b"sere-similarity-shard 1\n"
HEADER_BYTES = 512  # room for the magic word and the header


class ShardHeader(Record):
    """The first line of a shard, which says what file and which piece of it the shard is."""

    file_digest: str  # sha256 of the whole file
    index: Annotated[int, Field(ge=1)]  # from 1
    count: Annotated[int, Field(ge=1)]
    digest: str  # sha256 of this shard's bytes


def split(content: bytes, limit_bytes: int = SHARD_BYTES) -> list[bytes]:
    """Shards of about equal size, none longer than `limit_bytes`.

    Raises:
        SimilarityError: nothing to split, or a limit that leaves no room beside the header.
    """
    room = limit_bytes - HEADER_BYTES
    if room < 1 or not content:
        raise SimilarityError(f"{len(content)} bytes cannot be split into shards of {limit_bytes}; give at least 1 KiB each")
    count = -(-len(content) // room)
    size = -(-len(content) // count)
    whole = content_digest(content)
    shards = []
    for index in range(count):
        piece = content[index * size : (index + 1) * size]
        header = ShardHeader(file_digest=whole, index=index + 1, count=count, digest=content_digest(piece))
        shards.append(SHARD_MAGIC + json.dumps(header.to_json_dict()).encode() + b"\n" + piece)
    return shards


def join(shards: Sequence[bytes]) -> bytes:
    """Put shards together to the file that `split` was given.

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
    if content_digest(content) != first.file_digest:
        raise SimilarityError(f"the shards do not make the file {first.file_digest}; split it again")
    return content


def _parse(place: int, shard: bytes) -> tuple[ShardHeader, bytes]:
    line, newline, piece = shard.removeprefix(SHARD_MAGIC).partition(b"\n")
    if not shard.startswith(SHARD_MAGIC) or not newline:
        raise SimilarityError(f"what was given at place {place} is no shard of a similarity file, or its beginning is cut off")
    try:
        header = ShardHeader.model_validate_json(line)
    except ValidationError as error:
        raise SimilarityError(f"the shard at place {place} has a damaged header; copy it again") from error
    if content_digest(piece) != header.digest:
        raise SimilarityError(f"shard {header.index} of {header.count} is damaged: its content does not match its digest")
    return header, piece
