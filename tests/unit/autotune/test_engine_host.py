"""The tuner's hold on its engine: every data-parallel engine is switched, read back and counted, not the first alone."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sere_autotune.trial.engine import EngineHost
from sere_autotune.trial.load import Load, Request
from sere_ext.contract.errors import EngineCrashError, PolicyError
from sere_ext.contract.policy import Policy
from sere_ext.routing import kernel

from tests.kit.ranks import Engine, Engines

POLICY = Policy.parse({"buckets": [{"minTokens": 8, "maxTokens": 64, "kind": "topk", "S": 1}]})
TEXT = json.dumps(POLICY.to_json_dict())


def hosted(engine: Any) -> EngineHost:
    host = EngineHost()
    host.engine = engine
    return host


def ranks_of(engine: Engines) -> list[Any]:
    return [worker.sere for group in engine.groups for worker in group]


@pytest.mark.parametrize("chosen", ["1", None])
def test_the_engine_has_the_threads_that_the_user_chose_not_those_that_ray_sets(
    chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As its pods are served with: a tuned engine with two threads says little of a served one with one."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # Ray's
    EngineHost(chosen)
    assert os.environ.get("OMP_NUM_THREADS") == chosen


async def test_a_policy_is_in_force_on_every_rank_of_every_engine_after_a_clean_switch() -> None:
    engine = Engines()
    host = hosted(engine)
    await host.apply(TEXT)
    assert {state.policy for state in ranks_of(engine)} == {POLICY}
    assert host.digest == POLICY.digest
    assert engine.calls == ["sere_check", "pause wait True", "sere_apply", "resume", "reset"]


async def test_what_the_routers_count_is_summed_over_engines() -> None:
    engine = Engines()
    host = hosted(engine)
    await host.apply(TEXT)

    async def send(_: Request) -> AsyncIterator[tuple[str, int]]:
        for group, (before, after) in zip(engine.groups, ((4, 2), (3, 1)), strict=True):
            for worker in group:  # the ranks of an engine see the same tokens
                row = worker.sere.layers[0].counters[0]
                row[kernel.CALLS] += 1
                row[kernel.COUNTERS.index("activeBefore")] += before
                row[kernel.COUNTERS.index("activeAfter")] += after
        yield "x", 1

    host.send = send  # type: ignore[method-assign]
    report = await host.block([Request("a", 1), Request("b", 1)], Load(concurrency=1), [], None, None)
    assert (report.active_before, report.active_after, report.covered) == (3.5, 1.5, 1.0)


async def test_engines_that_differ_are_an_error_and_no_figure() -> None:
    engine = Engines()
    host = hosted(engine)
    await host.apply(TEXT)
    ranks_of(engine)[2].apply(Policy(), None, None)
    with pytest.raises(EngineCrashError, match=rf"ranks differ .* 0/0: {POLICY.digest}, .* 1/0: exact"):
        await host.block([Request("a", 1)], Load(concurrency=1), [], None, None)


async def test_a_refused_policy_is_no_crash_and_a_dead_engine_is_one() -> None:
    engine = Engine()
    host = hosted(engine)
    too_many = Policy.parse({"buckets": [{"minTokens": 8, "kind": "topk", "S": 3}]})
    with pytest.raises(PolicyError, match="above the model's top-k of 2"):
        await host.apply(json.dumps(too_many.to_json_dict()))
    assert host.digest == "exact"

    async def dead(method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        raise RuntimeError("EngineCore encountered an issue")

    engine.collective_rpc, engine.errored = dead, True  # type: ignore[method-assign]
    with pytest.raises(EngineCrashError, match="EngineCore encountered an issue"):
        await host.apply(TEXT)
    with pytest.raises(EngineCrashError, match="EngineCore encountered an issue"):
        await host.states()


async def test_a_prefix_cache_that_stays_is_an_error() -> None:
    class Stuck(Engine):
        async def reset_prefix_cache(self) -> bool:
            return False

    with pytest.raises(EngineCrashError, match="prefix cache could not be dropped"):
        await hosted(Stuck()).apply(TEXT)
