"""A similarity file in ConfigMap-sized shards: whole again, or refused with the shard that is wrong."""

from __future__ import annotations

import base64
from collections.abc import Callable

import kubernetes_validate
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sere_ext.errors import SimilarityError
from sere_ext.shards import SHARD_BYTES, config_maps, join, split

CONTENT = bytes(range(256)) * 20  # 5,120 bytes: six shards of at most 1,500


@given(st.binary(min_size=1, max_size=5000), st.integers(600, 4000))
def test_split_and_joined_again(content: bytes, limit: int) -> None:
    shards = split(content, limit)
    assert max(map(len, shards)) <= limit
    assert join(shards) == content


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (lambda s: [], "no shards were given"),
        (lambda s: s[:-1], "shard 6 of 6 is missing"),
        (lambda s: [*s[:2], *s[3:]], "shard 3 of 6 is missing"),
        (lambda s: [s[1], s[0], *s[2:]], "shard 2 of 6 stands at place 1; give them in order"),
        (lambda s: [*s[:2], s[1], *s[2:]], "shard 2 of 6 was given 2 times"),
        (lambda s: [s[0], s[1][:-1], *s[2:]], "shard 2 of 6 is damaged"),
        (lambda s: [s[0], s[1][:-1] + bytes([s[1][-1] ^ 1]), *s[2:]], "shard 2 of 6 is damaged"),
        (lambda s: [s[0], b"", *s[2:]], "at place 2 is no shard"),
        (lambda s: [s[0], s[1][:40], *s[2:]], "at place 2 is no shard"),
        (lambda s: [s[0], s[1].replace(b'"index"', b'"inbex"'), *s[2:]], "at place 2 has a damaged header"),
        (lambda s: [*s[:5], split(CONTENT[::-1], 1500)[5]], "at place 6 is of another file"),
        (lambda s: [s[0], *split(CONTENT, 3000)[1:]], "at place 2 is of another file"),
        (lambda s: [x.replace(b'"index": 1', b'"index": 9') for x in s], "shard 1 of 6 is missing"),
    ],
)
def test_what_is_wrong_is_named(wrong: Callable[[list[bytes]], list[bytes]], says: str) -> None:
    shards = split(CONTENT, 1500)
    assert len(shards) == 6
    with pytest.raises(SimilarityError, match=says):
        join(wrong(shards))


def test_every_torn_end_is_refused() -> None:
    (shard,) = split(CONTENT[:100])
    for length in range(len(shard)):
        with pytest.raises(SimilarityError):
            join([shard[:length]])


@pytest.mark.parametrize(("content", "limit"), [(b"", 5000), (b"x", 100)])
def test_what_cannot_be_split_is_refused(content: bytes, limit: int) -> None:
    with pytest.raises(SimilarityError, match="cannot be split"):
        split(content, limit)


def test_config_maps_fit_and_sort_in_order() -> None:
    content = bytes(1_900_000)  # DeepSeek-V3's packed file
    bodies = config_maps(content, "v3-similarity")
    assert [body["metadata"]["name"] for body in bodies] == ["v3-similarity-1", "v3-similarity-2", "v3-similarity-3"]
    mounted: dict[str, bytes] = {}
    for body in bodies:
        kubernetes_validate.validate(body, "1.34", strict=True)
        ((key, encoded),) = body["binaryData"].items()
        mounted[key] = base64.b64decode(encoded)
        assert len(mounted[key]) <= SHARD_BYTES
    assert join([mounted[key] for key in sorted(mounted)]) == content
