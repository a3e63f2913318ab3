"""The HTTP forms of live control, against a FastAPI app with an engine of two ranks that can misbehave."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sere_ext.control import LiveControl, SereControl
from sere_ext.errors import SereError
from sere_ext.policy import Policy
from sere_ext.state import LayerState, WorkerState
from sere_ext.worker import SereWorker

POLICY = {"buckets": [{"minTokens": 8, "maxTokens": 64, "kind": "topk", "S": 2}]}
TOKEN = {"Authorization": "Bearer secret"}


class Engine:
    """Two ranks with the real worker state behind `collective_rpc`."""

    def __init__(self) -> None:
        def layer() -> LayerState:
            return LayerState(number=0, experts=4, top_k=2, renormalise=True, scoring=0)

        key = {"modelName": "m", "configDigest": "c", "engineVersion": "0.32.0", "pluginVersion": "0.1.0", "device": "cpu"}
        self.workers = [SimpleNamespace(rank=rank, sere=WorkerState([layer()], key)) for rank in (0, 1)]
        for worker in self.workers:
            worker.sere.apply(Policy(), 0, None)
        self.calls: list[str] = []

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        self.calls.append(method)
        return [getattr(SereWorker, method)(worker, *args) for worker in self.workers]

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        self.calls.append(f"pause {mode} {clear_cache}")

    async def resume_generation(self) -> None:
        self.calls.append("resume")


def served(engine: Any, token: str | None = "secret", source: Any = "static") -> TestClient:
    app = FastAPI()
    SereControl().attach_router(app)
    app.state.sere = LiveControl(engine, token, source)
    return TestClient(app)


def test_get_reads_every_rank_back() -> None:
    state = served(Engine()).get("/sere").json()
    assert state["ready"] is True
    assert (state["source"], state["policyDigest"], state["generation"], state["error"]) == ("static", "exact", 0, None)
    assert state["model"] == {"numExperts": 4, "topK": 2, "moeLayers": [0]}
    assert [rank["rank"] for rank in state["ranks"]] == [0, 1]


def test_put_switches_all_ranks_and_answers_with_the_state() -> None:
    client = served(Engine())
    state = client.put("/sere/policy", json={"policy": POLICY}, headers=TOKEN).json()
    assert state["policyDigest"] == Policy.parse(POLICY).digest
    assert (state["source"], state["generation"]) == ("http", 1)
    assert {rank["generation"] for rank in state["ranks"]} == {1}
    assert client.get("/sere").json()["policy"] == Policy.parse(POLICY).to_json_dict()


def test_a_clean_switch_drains_and_drops_the_prefix_cache_and_always_resumes() -> None:
    engine = Engine()
    client = served(engine)
    client.put("/sere/policy", json={"policy": POLICY, "clean": True}, headers=TOKEN)
    assert engine.calls == ["pause wait True", "sere_try_apply", "resume"]
    engine.calls.clear()
    assert client.put("/sere/policy", json={"policy": POLICY, "generation": 0, "clean": True}, headers=TOKEN).status_code == 409
    assert engine.calls[-1] == "resume"


@pytest.mark.parametrize(
    ("token", "source", "headers", "body", "status", "says"),
    [
        ("secret", "static", {}, {"policy": POLICY}, 401, "Authorization: Bearer"),
        ("secret", "static", {"Authorization": "Bearer wrong"}, {"policy": POLICY}, 401, "Authorization: Bearer"),
        (None, "static", TOKEN, {"policy": POLICY}, 403, "SERE_CONTROL_TOKEN"),
        ("secret", "file", TOKEN, {"policy": POLICY}, 409, "SERE_POLICY_DIR"),
        ("secret", "static", TOKEN, {"policy": POLICY, "generation": -1}, 409, "stale"),
        ("secret", "static", TOKEN, {}, 422, '{"policy"'),
        ("secret", "static", TOKEN, {"policy": 3}, 422, "should be an object"),
        ("secret", "static", TOKEN, {"policy": POLICY, "polcy": 1}, 422, "polcy: unknown field"),
        ("secret", "static", TOKEN, {"policy": {"buckets": [{"minTokens": 1, "kind": "sere", "S": 1, "rho": 7}]}}, 422, "(got 7)"),
        ("secret", "static", TOKEN, {"policy": {"buckets": [{"minTokens": 1, "kind": "topk", "S": 3}]}}, 422, "top-k of 2"),
        (
            "secret", "static", TOKEN,
            {"policy": {"buckets": [{"minTokens": 1, "maxTokens": 32, "kind": "exact"}, {"minTokens": 16, "kind": "exact"}]}},
            422, "buckets overlap at 16-32 tokens; make the second start at 33",
        ),
        ("secret", "static", TOKEN, {"policy": {"buckets": [{"minTokens": 1, "kind": "sere", "S": 1}]}}, 422, "sere calibrate"),
        ("secret", "static", TOKEN, {"policy": POLICY, "similarity": "/nowhere"}, 422, "no similarity file at /nowhere"),
    ],
)  # fmt: skip
def test_refusals_name_the_way_out_and_change_nothing(
    token: str | None, source: str, headers: dict[str, str], body: dict[str, Any], status: int, says: str
) -> None:
    engine = Engine()
    if "similarity" in body:  # the file is looked for before the model is asked about
        engine.workers = [SimpleNamespace(rank=0, sere=engine.workers[0].sere, vllm_config=None)]
    client = served(engine, token, source)
    answer = client.put("/sere/policy", json=body, headers=headers)
    assert answer.status_code == status, answer.text
    assert says in answer.json()["error"]["message"]
    assert all(worker.sere.policy.digest == "exact" for worker in engine.workers)
    assert all(worker.sere.generation == 0 for worker in engine.workers)


def test_a_rank_that_refuses_alone_sends_all_ranks_back_to_exact() -> None:
    engine = Engine()
    engine.workers[1].sere.layers[0].top_k = 1
    answer = served(engine).put("/sere/policy", json={"policy": POLICY}, headers=TOKEN)
    assert answer.status_code == 409
    assert "1 of 2 ranks refused" in answer.json()["error"]["message"]
    assert [worker.sere.policy.digest for worker in engine.workers] == ["exact", "exact"]


def test_ranks_that_disagree_are_not_ready() -> None:
    engine = Engine()
    engine.workers[1].sere.apply(Policy.parse(POLICY), None, None)
    state = served(engine).get("/sere").json()
    assert state["ready"] is False
    assert "disagree" in state["error"]


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        ("'CPUWorker' object has no attribute 'sere_state'", "VLLM_PLUGINS"),
        ("Worker failed with error 'this engine was started without sere; start it with x', please check", "start it with x"),
    ],
)
def test_an_engine_without_the_plugin_is_503(failure: str, says: str) -> None:
    class Stock:
        async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
            raise SereError(failure)

    answer = served(Stock()).get("/sere")
    assert answer.status_code == 503
    assert says in answer.json()["error"]["message"]


def test_generations_are_ordered_and_repeatable() -> None:
    client = served(Engine())
    body = {"policy": POLICY, "generation": 5}
    assert client.put("/sere/policy", json=body, headers=TOKEN).json()["generation"] == 5
    assert client.put("/sere/policy", json=body, headers=TOKEN).status_code == 200, "the same change again is no conflict"
    other = {"policy": {"buckets": []}, "generation": 5}
    assert client.put("/sere/policy", json=other, headers=TOKEN).status_code == 409
    assert client.put("/sere/policy", json={"policy": {"buckets": []}}, headers=TOKEN).json()["generation"] == 6


def test_a_policy_that_the_engine_starts_with_is_generation_0_and_no_switch() -> None:
    layer = LayerState(number=0, experts=4, top_k=2, renormalise=True, scoring=0)
    state = WorkerState([layer], {})
    state.apply(Policy.parse(POLICY), 0, None)
    assert (state.generation, state.switches, layer.bucket(8), layer.bucket(7)) == (0, 0, 0, 16)
    state.apply(Policy(), None, None)
    assert (state.generation, state.switches) == (1, 1)


def test_a_change_that_would_reach_one_of_two_engines_is_refused() -> None:
    engine = Engine()
    client = served(engine)
    client.app.state.sere.engines = 2  # type: ignore[attr-defined]
    answer = client.put("/sere/policy", json={"policy": POLICY}, headers=TOKEN)
    assert answer.status_code == 503
    assert "2 data-parallel engines" in answer.json()["error"]["message"]
    assert engine.calls == []
