"""The body of `GET /sere` as other parts read it."""

from __future__ import annotations

import pytest

from sere_ext.contract.errors import UnsupportedError
from sere_ext.contract.state import EngineState
from tests.kit.states import engine_state

KEY = {"modelName": "m", "configDigest": "c", "engineVersion": "0.32.0", "pluginVersion": "0.1.0", "device": "cpu"}


def test_an_engine_of_a_newer_release_can_be_read() -> None:
    said = engine_state("exact", KEY).to_json_dict()
    newer = {**said, "later": 1, "key": {**said["key"], "later": 1}, "model": {**said["model"], "later": 1}}
    newer["ranks"] = [{**rank, "later": 1} for rank in said["ranks"]]
    assert EngineState.parse(newer) == EngineState.parse(said)


def test_a_body_that_is_no_state_is_told_by_its_fields() -> None:
    with pytest.raises(UnsupportedError, match=r"cannot be read: .*ready"):
        EngineState.parse(b"{}")


def test_ranks_that_differ_serve_no_policy() -> None:
    assert engine_state("exact", KEY).serves == "exact"
    assert engine_state("exact", KEY, ranks=("exact", "sere-1")).serves is None
    assert engine_state("exact", KEY, ready=False).serves is None
