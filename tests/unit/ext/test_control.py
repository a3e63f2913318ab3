"""The HTTP forms of live control, against a FastAPI app with an engine of two ranks that can misbehave."""

from __future__ import annotations

import asyncio
import json
import logging
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from sere_ext.contract.errors import SereError, UnsupportedError
from sere_ext.contract.policy import MAX_BUCKETS, Policy
from sere_ext.control.live import LiveControl
from sere_ext.control.routes import SereControl
from sere_ext.control.switch import switch
from sere_ext.routing import kernel
from sere_ext.routing.state import LayerState, WorkerState
from tests.kit.ranks import Engine, Engines

POLICY = {"buckets": [{"minTokens": 8, "maxTokens": 64, "kind": "topk", "S": 2}]}
TOKEN = {"Authorization": "Bearer secret"}


def served(engine: Any, token: str | None = "secret", directory: str | None = None) -> TestClient:
    app = FastAPI()
    SereControl().attach_router(app)
    app.state.sere = LiveControl(engine, token, directory)
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
    assert engine.calls == ["sere_check", "pause wait True", "sere_apply", "resume"]
    engine.calls.clear()
    assert client.put("/sere/policy", json={"policy": POLICY, "generation": 0, "clean": True}, headers=TOKEN).status_code == 409
    assert engine.calls == ["sere_check"], "what will be refused holds no traffic"


def test_traffic_goes_on_whatever_becomes_of_a_clean_switch() -> None:
    class Stuck(Engine):
        async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
            await super().pause_generation(mode=mode, clear_cache=clear_cache)
            await asyncio.sleep(60)

    async def given_up(engine: Engine) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(switch(engine, Policy.parse(POLICY), clean=True), 0.01)

    engine = Stuck()
    asyncio.run(given_up(engine))
    assert engine.calls[-1] == "resume"
    assert engine.workers[0].sere.policy.digest == "exact"


@pytest.mark.parametrize(
    ("token", "directory", "headers", "body", "status", "says"),
    [
        ("secret", None, {}, {"policy": POLICY}, 401, "no token was sent; add the header `Authorization: Bearer"),
        ("secret", None, {"Authorization": "secret"}, {"policy": POLICY}, 401, "no token was sent"),
        ("secret", None, {"Authorization": "Bearer wrong"}, {"policy": POLICY}, 401, "that is not the token"),
        (None, None, TOKEN, {"policy": POLICY}, 403, "start the engine with SERE_CONTROL_TOKEN="),
        ("secret", "/etc/sere", TOKEN, {"policy": POLICY}, 409, "comes from the directory /etc/sere (SERE_POLICY_DIR)"),
        ("secret", None, TOKEN, {"policy": POLICY, "generation": 1 << 70}, 422, "generation: "),
        ("secret", None, TOKEN, {"policy": POLICY, "similarity": ""}, 422, "similarity: "),
        ("secret", None, TOKEN, POLICY, 422, "is a bare policy; wrap it"),
        ("secret", None, TOKEN, {"policy": POLICY, "generation": -1}, 409, "stale: 0 is in force with policy exact; read GET /sere"),
        ("secret", None, TOKEN, {}, 422, '{"policy"'),
        ("secret", None, TOKEN, {"policy": {"buckets": {}}}, 422, "buckets: Input should be a list"),
        (
            "secret", None, TOKEN, {"policy": {"buckets": [{"minTokens": n, "kind": "exact"} for n in range(1, 18)]}},
            422, "buckets: the list should have at most 16 items, not 17",
        ),
        ("secret", None, TOKEN, {"policy": 3}, 422, "should be an object"),
        ("secret", None, TOKEN, {"policy": POLICY, "polcy": 1}, 422, "polcy: unknown field"),
        ("secret", None, TOKEN, {"policy": {"buckets": [{"minTokens": 1, "kind": "sere", "S": 1, "rho": 7}]}}, 422, "(got 7)"),
        ("secret", None, TOKEN, {"policy": {"buckets": [{"minTokens": 1, "kind": "topk", "S": 3}]}}, 422, "top-k of 2"),
        (
            "secret", None, TOKEN,
            {"policy": {"buckets": [{"minTokens": 1, "maxTokens": 32, "kind": "exact"}, {"minTokens": 16, "kind": "exact"}]}},
            422, "buckets overlap at 16-32 tokens; make the second start at 33",
        ),
        ("secret", None, TOKEN, {"policy": {"buckets": [{"minTokens": 1, "kind": "sere", "S": 1}]}}, 422, "sere calibrate"),
        ("secret", None, TOKEN, {"policy": POLICY, "similarity": "/nowhere"}, 422, "no similarity file at /nowhere"),
    ],
)  # fmt: skip
def test_refusals_name_the_way_out_and_change_nothing(
    token: str | None, directory: str | None, headers: dict[str, str], body: dict[str, Any], status: int, says: str
) -> None:
    engine = Engine()
    if "similarity" in body:  # the file is looked for before the model is asked about
        engine.workers = [SimpleNamespace(rank=0, sere=engine.workers[0].sere, vllm_config=None)]
    client = served(engine, token, directory)
    answer = client.put("/sere/policy", json=body, headers=headers)
    assert answer.status_code == status, answer.text
    assert says in answer.json()["error"]["message"]
    assert all(worker.sere.policy.digest == "exact" for worker in engine.workers)
    assert all(worker.sere.generation == 0 for worker in engine.workers)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"policy": {}, "x": "' + b"y" * (1 << 20) + b'"}'])
def test_a_body_that_means_nothing_is_422(body: bytes) -> None:
    answer = served(Engine()).put("/sere/policy", content=body, headers=TOKEN)
    assert answer.status_code == 422
    assert answer.json()["error"]["type"] == "PolicyError"


def test_401_says_which_scheme() -> None:
    answer = served(Engine()).put("/sere/policy", json={"policy": POLICY})
    assert (answer.headers["www-authenticate"], answer.json()["error"]["type"]) == ("Bearer", "UnauthorizedError")


def audited(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    lines = [record.getMessage() for record in caplog.records]
    return [json.loads(line.removeprefix("sere audit: ")) for line in lines if line.startswith("sere audit: ")]


def test_every_change_made_or_refused_is_audited_without_the_token(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "vllm.sere")
    client = served(Engine())
    client.put("/sere/policy", json={"policy": POLICY}, headers=TOKEN)
    client.put("/sere/policy", json={"policy": {}, "generation": 0}, headers=TOKEN)
    client.put("/sere/policy", json={"policy": {}})
    made, stale, stranger = audited(caplog)
    digest = Policy.parse(POLICY).digest
    who = "token 2bb80d53 from testclient:50000"
    assert made == {
        "outcome": "applied", "source": "http", "who": who, "from": "exact", "to": digest, "generation": 1, "clean": False,
        "policy": "topk 2 for 8-64 tokens, exact elsewhere",
    }  # fmt: skip
    assert (stale["outcome"], stale["who"], stale["to"]) == ("refused", who, "exact")
    assert stale["error"].startswith("ConflictError: generation 0 is stale")
    assert (stranger["who"], stranger["error"][:17]) == ("testclient:50000", "UnauthorizedError")
    assert "secret" not in caplog.text
    assert client.app.state.sere.refusals == {("http", "ConflictError"): 1, ("http", "UnauthorizedError"): 1}  # type: ignore[attr-defined]


def test_a_rank_that_refuses_alone_changes_no_rank() -> None:
    engine = Engine()
    client = served(engine)
    client.put("/sere/policy", json={"policy": {"buckets": [{"minTokens": 8, "kind": "topk", "S": 1}]}}, headers=TOKEN)
    engine.workers[1].sere.layers[0].top_k = 1
    answer = client.put("/sere/policy", json={"policy": POLICY}, headers=TOKEN)
    assert answer.status_code == 422
    assert "top-k of 1" in answer.json()["error"]["message"]
    assert [worker.sere.generation for worker in engine.workers] == [1, 1]


def test_a_rank_that_changes_its_mind_sends_all_ranks_to_exact() -> None:
    class Fickle(Engine):
        async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
            self.workers[1].sere.layers[0].top_k = 1 if method == "sere_apply" else 2
            return await super().collective_rpc(method, args)

    engine = Fickle()
    answer = served(engine).put("/sere/policy", json={"policy": POLICY}, headers=TOKEN)
    assert answer.status_code == 409
    assert "1 of 2 ranks refused" in answer.json()["error"]["message"]
    assert [worker.sere.policy.digest for worker in engine.workers] == ["exact", "exact"]
    assert [worker.sere.generation for worker in engine.workers] == [2, 2]


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
    assert (state.generation, state.switches) == (0, 0)
    assert layer.table[:, kernel.MIN_TOKENS].tolist() == [POLICY["buckets"][0]["minTokens"]] + [0] * (MAX_BUCKETS - 1)
    state.apply(Policy(), None, None)
    assert (state.generation, state.switches) == (1, 1)
    assert not layer.table.any()


def test_data_parallel_engines_are_held_until_all_have_read_the_policy_back() -> None:
    engine = Engines()
    client = served(engine)
    state = client.put("/sere/policy", json={"policy": POLICY}, headers=TOKEN).json()
    assert engine.calls == ["sere_check", "pause keep False", "sere_apply", "resume"]
    digest = Policy.parse(POLICY).digest
    assert [(rank["engine"], rank["rank"], rank["policyDigest"]) for rank in state["ranks"]] == [
        (0, 0, digest),
        (0, 1, digest),
        (1, 0, digest),
        (1, 1, digest),
    ]
    engine.groups[1][0].sere.apply(Policy(), None, None)
    state = client.get("/sere").json()
    assert (state["ready"], state["error"]) == (False, "ranks disagree about the policy; set it again")


def test_an_engine_that_refuses_is_asked_before_any_is_held_or_changed() -> None:
    engine = Engines()
    engine.groups[1][1].sere.layers[0].top_k = 1
    answer = served(engine).put("/sere/policy", json={"policy": POLICY}, headers=TOKEN)
    assert answer.status_code == 422
    assert engine.calls == ["sere_check"]


def test_counters_are_summed_over_engines_and_not_over_their_ranks() -> None:
    engine = Engines()
    for group, calls in zip(engine.groups, (3, 4), strict=True):
        for worker in group:
            worker.sere.layers[0].counters[16, 0] = calls
    assert served(engine).get("/sere").json()["counters"] == [
        {"digest": "exact", "bucket": "other", "calls": 7, "tokens": 0, "activeBefore": 0, "activeAfter": 0,
         "slots": 0, "rerouted": 0, "merged": 0},
    ]  # fmt: skip


def test_an_error_of_any_rank_is_the_engines() -> None:
    engine = Engines()
    engine.groups[1][1].sere.error = "Bypassed: layers [0]"
    assert served(engine).get("/sere").json()["error"] == "Bypassed: layers [0]"


@pytest.mark.parametrize(
    ("parallel", "says"),
    [
        ({"data_parallel_external_lb": True}, "external mode"),
        ({"data_parallel_hybrid_lb": True}, "hybrid mode"),
        (None, "answers for the first of 2 data-parallel engines only"),
    ],
)
def test_a_change_that_would_not_reach_all_engines_is_refused(parallel: dict[str, Any] | None, says: str) -> None:
    engine = Engines(**parallel or {})
    if parallel is None:
        engine.engine_core = SimpleNamespace()
    answer = served(engine).put("/sere/policy", json={"policy": POLICY}, headers=TOKEN)
    assert answer.status_code == 503
    assert says in answer.json()["error"]["message"]
    assert "--additional-config" in answer.json()["error"]["message"]
    assert engine.calls == []


def test_a_layer_group_without_a_layer_is_refused_and_nothing_changes() -> None:
    engine = Engine()
    group = {"firstLayer": 4, "lastLayer": 7, "buckets": []}
    answer = served(engine).put("/sere/policy", json={"policy": POLICY | {"layerGroups": [group]}}, headers=TOKEN)
    assert answer.status_code == 422
    assert "layers 4-7, but this model has MoE layers 0;" in answer.json()["error"]["message"]
    assert [worker.sere.policy.digest for worker in engine.workers] == ["exact", "exact"]


def test_layer_groups_are_counted_apart() -> None:
    layers = [LayerState(number=n, experts=4, top_k=2, renormalise=True, scoring=0) for n in range(3)]
    state = WorkerState(layers, {})
    group = {"firstLayer": 1, "lastLayer": 1, "buckets": [{"minTokens": 8, "maxTokens": 64, "kind": "topk", "S": 1}]}
    policy = Policy.parse(POLICY | {"layerGroups": [group]})
    state.apply(policy, 0, None)
    for layer in layers:
        layer.counters[0, 0] = 5
    assert {row.key: row.calls for row in state.counters()} == {
        (policy.digest, "rest", "8-64"): 10,
        (policy.digest, "1-1", "8-64"): 5,
    }


async def test_a_state_asked_for_amid_a_change_waits_for_its_end() -> None:
    engine = Engines()
    control = LiveControl(engine, None)
    engine.groups[0][0].sere.apply(Policy.parse(POLICY), None, None)  # the other ranks have not switched yet
    async with control._changing:
        asked = asyncio.create_task(control.state())
        await asyncio.sleep(0.01)
        assert not asked.done()
        for worker in (engine.groups[0][1], *engine.groups[1]):
            worker.sere.apply(Policy.parse(POLICY), None, None)
    assert (await asked).ready is True


def test_a_token_may_have_any_characters() -> None:
    headers = {"Authorization": "Bearer gehëim".encode()}
    assert served(Engine(), token="gehëim").put("/sere/policy", json={"policy": POLICY}, headers=headers).status_code == 200


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What `init_state` starts beside the routes, by class."""
    started: list[str] = []
    for name in ("Metrics", "Watcher"):

        async def run(self: Any, name: str = name) -> None:
            started.append(name)

        monkeypatch.setattr(f"sere_ext.control.routes.{name}", type(name, (), {"__init__": lambda self, *_: None, "run": run}))
    return started


@pytest.mark.parametrize(("volume", "runs"), [("", ["Metrics"]), ("/policy", ["Metrics", "Watcher"])])
async def test_one_api_server_polls_and_watches(
    volume: str, runs: list[str], beside: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERE_POLICY_DIR", volume)
    state = SimpleNamespace()
    await SereControl().init_state(Engines(), state, None)
    await asyncio.gather(*state.sere_tasks)
    assert beside == runs


async def test_several_api_servers_are_refused_and_none_of_them_polls_or_watches(beside: list[str]) -> None:
    state = SimpleNamespace()
    with pytest.raises(UnsupportedError, match=r"there are 2: .* start with --api-server-count 1"):
        await SereControl().init_state(Engines(_api_process_count=2), state, None)
    assert vars(state) == {}
    assert beside == []
