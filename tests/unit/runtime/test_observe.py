"""Reading what lies in ConfigMaps: a similarity artefact, whole or in shards, checked."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from sere_ext.contract.config_maps import config_maps, encoded, uri
from sere_ext.contract.similarity import SimilarityMeta
from sere_ext.similarity.file import write_similarity
from sere_operator.runtime.client import Client
from sere_operator.runtime.observe import read_similarity
from tests.kit.matrices import symmetric

EXPERTS = 32


class Cluster:
    """ConfigMaps by name."""

    def __init__(self, *bodies: dict[str, Any]) -> None:
        self.bodies = {body["metadata"]["name"]: body for body in bodies}

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        assert (kind, namespace) == ("ConfigMap", "ns")
        return self.bodies.get(name)


@pytest.fixture
def artefact(tmp_path: Path) -> tuple[bytes, str]:
    """Content and digest."""
    meta = SimilarityMeta(
        model_type="m", model_name="tiny", config_digest="sha256:0", data_digest="sha256:1", tokens=7, layers=(),
        num_experts=EXPERTS,
    )  # fmt: skip
    matrix = symmetric(np.random.default_rng(0).random((EXPERTS, EXPERTS)))
    digest = write_similarity(tmp_path / "s.safetensors", meta, {4: matrix}).digest
    return (tmp_path / "s.safetensors").read_bytes(), digest


async def test_an_artefact_is_read_whole_or_in_shards(artefact: tuple[bytes, str]) -> None:
    content, digest = artefact
    sharded = config_maps(encoded(content, 2000), "s")
    assert len(sharded) > 2
    whole = {"metadata": {"name": "w"}, "binaryData": {"similarity.safetensors": base64.b64encode(content).decode()}}
    client = cast("Client", Cluster(whole, *sharded))
    for where in (uri(sharded), "configmap://w/similarity.safetensors"):
        found = await read_similarity(client, "ns", where)
        assert (found.digest, found.problem) == (digest, None)
        assert found.shards == encoded(content), "as pods are given it, however it was cut before"


async def test_what_is_not_there_whole_is_a_problem_and_never_an_artefact(artefact: tuple[bytes, str]) -> None:
    content, _ = artefact
    sharded = config_maps(encoded(content, 2000), "s")
    swapped = [{**sharded[0], "binaryData": {"shard-001-of-004": "AAAA"}}, *sharded[1:]]
    for bodies, where, words in (
        (sharded[:-1], uri(sharded), "ConfigMap s-4 has no binary key shard-004-of-004"),
        (sharded, "configmap://s-2/shard-002-of-004", "is not the first shard"),
        (swapped, uri(sharded), "at place 1 is no shard"),
        (sharded, "configmap://nowhere/x", "ConfigMap nowhere has no binary key x"),
        (sharded, "pvc://data/s.safetensors", "put the artefact into a ConfigMap"),
    ):
        found = await read_similarity(cast("Client", Cluster(*bodies)), "ns", where)
        assert (found.digest, found.shards) == (None, ())
        assert words in str(found.problem)
