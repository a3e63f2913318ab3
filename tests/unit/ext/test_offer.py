"""A change that brings a similarity file: workers get its bytes, and sort them while the engine goes on stepping."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sere_ext.contract.errors import SimilarityError
from sere_ext.contract.model_config import model_config_digest
from sere_ext.contract.policy import Policy
from sere_ext.contract.similarity import SimilarityMeta
from sere_ext.control.switch import switch, switch_llm
from sere_ext.routing import state as states
from sere_ext.similarity.file import sorted_neighbours, write_similarity
from tests.kit.matrices import symmetric
from tests.kit.ranks import Engine, Engines

CONFIG: dict[str, object] = {"model_type": "qwen3_moe", "num_experts": 4}
SERE = Policy.parse({"buckets": [{"minTokens": 8, "kind": "sere", "S": 1}]})


class Sorts:
    """`sorted_neighbours`, which waits until it may, and notes which RPC was running in its thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.may, self.while_running = engine, threading.Event(), set[str]()

    def __call__(self, matrix: Any) -> Any:
        inside = threading.current_thread() is threading.main_thread()
        self.while_running.add(self.engine.calls[-1] if inside else "a thread")
        assert self.may.wait(20)
        return sorted_neighbours(matrix)


def engine_of(folder: Path, engine: Engine, **described: Any) -> Path:
    """Give the workers a model in this folder; returns a similarity file for it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    model = SimpleNamespace(model=str(folder), revision=None)
    for group in getattr(engine, "groups", [engine.workers]):
        for worker in group:
            worker.vllm_config = SimpleNamespace(model_config=model)
    meta = SimilarityMeta(
        model_type="qwen3_moe", model_name="tiny", config_digest=model_config_digest(CONFIG), data_digest="sha256:0", tokens=1,
        layers=(0,), num_experts=4,
    ).model_copy(update=described)  # fmt: skip
    path = folder / "similarity.safetensors"
    write_similarity(path, meta, {0: symmetric(np.random.default_rng(0).random((4, 4)))})
    return path


def test_matrices_are_sorted_while_the_engine_steps_and_not_while_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine()
    path = engine_of(tmp_path / "model", engine)
    monkeypatch.setattr(states, "sorted_neighbours", sorts := Sorts(engine))
    monkeypatch.setattr("sere_ext.control.switch.POLL_SECONDS", 0.005)

    async def change() -> list[str]:
        task = asyncio.create_task(switch(engine, SERE, similarity=str(path), clean=True))
        for _ in range(5000):
            if engine.calls.count("sere_check") >= 3:  # each an RPC that was answered although nothing is sorted yet
                break
            await asyncio.sleep(0.001)
        before = list(engine.calls)
        sorts.may.set()
        await task
        return before

    waited = asyncio.run(change())
    assert waited.count("sere_check") >= 3
    assert waited[:2] == ["sere_check", "sere_offer"]
    assert set(waited[2:]) == {"sere_check"}, "traffic goes on until every rank has sorted"
    assert engine.calls[-3:] == ["pause wait True", "sere_apply", "resume"]
    assert engine.calls.count("sere_offer") == 1
    assert sorts.while_running == {"a thread"}
    for worker in engine.workers:
        assert worker.sere.policy == SERE
        assert worker.sere.offer is None, "the file is not kept twice"


def test_workers_that_cannot_read_the_path_get_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two data-parallel engines, the file gone as soon as the API server has read it."""
    engine = Engines()
    path = engine_of(tmp_path / "model", engine)
    read = Path.read_bytes

    def read_once(self: Path) -> bytes:
        content = read(self)
        if self == path:
            self.unlink()
        return content

    monkeypatch.setattr(Path, "read_bytes", read_once)
    found = asyncio.run(switch(engine, SERE, similarity=str(path)))
    assert len({state.similarity_digest for state in found}) == 1
    assert all(worker.sere.policy == SERE for group in engine.groups for worker in group)
    assert not path.exists()


def test_a_files_bytes_pass_through_the_messages_between_vllms_processes() -> None:
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    content = bytes(range(256)) * 20_000
    message = 0, 7, "collective_rpc", ("sere_offer", None, ("sha256:0", content, "similarity.safetensors"), None)
    _, _, _, (_, _, args, _) = MsgpackDecoder().decode(MsgpackEncoder().encode(message))
    assert tuple(args) == ("sha256:0", content, "similarity.safetensors")


def test_a_file_in_force_is_not_handed_over_again(tmp_path: Path) -> None:
    engine = Engine()
    path = engine_of(tmp_path / "model", engine)
    asyncio.run(switch(engine, SERE, similarity=str(path)))
    engine.calls.clear()
    other = Policy.parse({"buckets": [{"minTokens": 1, "kind": "sere", "S": 2}]})
    asyncio.run(switch(engine, other, similarity=str(path)))
    assert engine.calls == ["sere_check", "sere_apply"]


def test_a_file_of_another_model_is_refused_before_anything_changes(tmp_path: Path) -> None:
    engine = Engine()
    path = engine_of(tmp_path / "model", engine, config_digest="sha256:other")
    with pytest.raises(SimilarityError, match=f"{path} was made for another model"):
        asyncio.run(switch(engine, SERE, similarity=str(path)))
    assert "sere_apply" not in engine.calls
    with pytest.raises(SimilarityError, match="was not handed to this worker"):
        asyncio.run(apply_unasked(engine))


async def apply_unasked(engine: Engine) -> None:
    from sere_ext.contract.state import Refusal

    for answer in await engine.collective_rpc("sere_apply", (SERE.to_json(), None, "sha256:unknown")):
        refusal = Refusal.read(answer)
        assert refusal is not None
        raise refusal.error


def test_an_llm_between_two_calls_is_switched_in_the_same_way(tmp_path: Path) -> None:
    engine = Engine()
    path = engine_of(tmp_path / "model", engine)

    class Llm:
        def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
            return asyncio.run(engine.collective_rpc(method, args))

        def reset_prefix_cache(self) -> None:
            engine.calls.append("reset")

    switch_llm(Llm(), SERE, similarity=str(path))
    assert engine.calls[:2] == ["sere_check", "sere_offer"]
    assert engine.calls[-2:] == ["reset", "sere_apply"]
