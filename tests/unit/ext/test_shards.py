"""A similarity file in ConfigMap-sized shards: whole again, or refused with the shard that is wrong."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import kubernetes_validate
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sere_ext.contract.config_maps import config_maps, encoded, places, uri
from sere_ext.contract.errors import SimilarityError
from sere_ext.contract.shards import SHARD_BYTES, join, split
from sere_ext.contract.similarity import read_meta
from sere_ext.contract.volume import MAX_FILE_BYTES, POLICY_SHARDS, piece_name, pieces

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
    bodies = config_maps(encoded(content), "v3-similarity")
    assert uri(bodies) == "configmap://v3-similarity-1/shard-001-of-003"
    assert [body["metadata"]["name"] for body in bodies] == ["v3-similarity-1", "v3-similarity-2", "v3-similarity-3"]
    mounted: dict[str, bytes] = {}
    named = places("v3-similarity-1", "shard-001-of-003")
    assert named == [(body["metadata"]["name"], next(iter(body["binaryData"]))) for body in bodies]
    for body in bodies:
        kubernetes_validate.validate(body, "1.34", strict=True)
        ((key, text),) = body["binaryData"].items()
        mounted[key] = base64.b64decode(text)
        assert len(mounted[key]) <= SHARD_BYTES
    assert join([mounted[key] for key in sorted(mounted)]) == content


def test_what_can_be_given_to_pods_fits_into_the_places_there_are() -> None:
    assert len(split(bytes(MAX_FILE_BYTES))) == POLICY_SHARDS
    assert len(split(bytes(MAX_FILE_BYTES + 1))) == POLICY_SHARDS + 1


def test_a_file_in_shards_is_referred_to_by_its_first() -> None:
    assert places("qwen3", "similarity.safetensors") is None, "a whole file"
    for name, key, says in (
        ("v3-2", "shard-002-of-003", "v3-2 key shard-002-of-003 is not the first"),
        ("v3", "shard-001-of-003", "is not the first"),
        ("v3-1", "shard-001-of-017", "at most 16"),
    ):
        with pytest.raises(SimilarityError, match=says):
            places(name, key)


def test_the_pieces_in_a_folder_are_told_from_everything_else() -> None:
    names = [piece_name("a.safetensors", index, 3) for index in (3, 1, 2)]
    assert pieces([*names, "stable", "b.safetensors.001-of-001"], "a.safetensors") == (sorted(names), 3)
    assert pieces(names[1:], "a.safetensors") == (sorted(names[1:]), 3)
    assert pieces(names, "b.safetensors") == ([], 0)
    other = piece_name("a.safetensors", 1, 1)
    assert pieces([*names[1:], other], "a.safetensors") == ([other], 1), "of two ways to split it, the one that is there whole"


def test_a_shard_in_a_files_place_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "shard-001-of-006").write_bytes(split(CONTENT, 1500)[0])
    with pytest.raises(SimilarityError, match="is one shard of a similarity file; put it together with `sere similarity join`"):
        read_meta(tmp_path / "shard-001-of-006")
