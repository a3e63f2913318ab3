"""The tuner's hold on its engine: every data-parallel engine is switched, read back and counted, not the first alone."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sere_autotune.trial import logs, warm
from sere_autotune.trial.host import EngineHost, small_cache
from sere_autotune.trial.load import EngineGoneError, Load, Request
from sere_autotune.trial.warm import WarmEngine
from sere_ext.contract.errors import BudgetExhaustedError, EngineCrashError, PolicyError
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


@pytest.mark.parametrize(
    ("environ", "given_bytes", "space"),
    [
        ({}, None, "1"),
        ({"VLLM_CPU_KVCACHE_SPACE": "4"}, None, "4"),
        ({}, 1 << 23, None),  # of extraArgs, which the variable would overrule in vLLM
    ],
)
def test_a_size_of_the_kv_cache_that_the_user_named_is_the_one_that_holds(
    environ: dict[str, str], given_bytes: int | None, space: str | None
) -> None:
    small_cache(environ, argparse.Namespace(kv_cache_memory_bytes=given_bytes))
    assert environ.get("VLLM_CPU_KVCACHE_SPACE") == space


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


async def test_the_requests_that_run_at_once_are_those_of_all_engines() -> None:
    host = hosted(Engines())
    host.engine.vllm_config = SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_seqs=32), parallel_config=SimpleNamespace(data_parallel_size=2)
    )
    assert await host.most_requests() == 64


async def test_steps_under_exact_routing_are_counted_by_their_size() -> None:
    """Two steps of 20 tokens and a prefill, on every rank of two engines: the median step has 20, whatever the concurrency."""
    engine = Engines()
    host = hosted(engine)
    await host.apply("{}")
    assert host.digest == "exact"

    async def send(_: Request) -> AsyncIterator[tuple[str, int]]:
        for state in ranks_of(engine):
            for row, tokens in ((4, 20), (4, 20), (8, 400)):  # 16 to 31 tokens, and 256 to 511
                state.layers[0].counters[row, kernel.CALLS] += 1
                state.layers[0].counters[row, kernel.TOKENS] += tokens
        yield "x", 1

    host.send = send  # type: ignore[method-assign]
    report = await host.block([Request("a", 1)], Load(concurrency=1), [], None, None)
    assert (report.step_tokens, report.covered) == (20, 1.0)
    await host.apply(TEXT)
    assert (await host.block([Request("a", 1)], Load(concurrency=1), [], None, None)).step_tokens is None


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


async def test_an_engine_that_dies_under_load_ends_its_block_at_once_and_is_a_crash() -> None:
    host = hosted(Engines())

    async def send(_: Request) -> AsyncIterator[tuple[str, int]]:
        raise EngineGoneError("EngineCore encountered an issue")
        yield "", 0

    host.send = send  # type: ignore[method-assign]
    with pytest.raises(EngineCrashError, match="died under load: EngineCore encountered an issue"):
        await host.block([Request("a", 1)] * 40, Load(concurrency=16), [], None, None)


LOG = """\
(EngineCore pid=7) INFO 11-28 loading weights
(EngineCore pid=7) ERROR 11-28 [core.py:9] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-28 [core.py:9] safetensors._safetensors_rust.SafetensorError: Error while deserializing header: too large
Traceback (most recent call last):
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""


def test_the_root_line_of_a_log_is_the_error_from_which_the_others_follow() -> None:
    found = logs.root_cause(LOG)
    assert found == "safetensors._safetensors_rust.SafetensorError: Error while deserializing header: too large"
    assert logs.root_cause("INFO nothing\nRuntimeError: Engine core initialization failed.") is None


def test_what_the_engines_processes_print_goes_to_its_log(tmp_path: Path) -> None:
    path = tmp_path / "out" / "engine.log"
    program = (
        f"import subprocess; from sere_autotune.trial import logs; assert logs.redirect({str(path)!r}); print('mine', flush=True); "
        "subprocess.run(['sh', '-c', 'echo ValueError: the child >&2'])"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert done.stdout == done.stderr == ""
    assert logs.root_cause(logs.tail(str(path))) == "ValueError: the child"


class Ray:
    """As much of Ray as waiting takes: a call that never ends, and an actor that can be killed."""

    exceptions = SimpleNamespace(
        **{name: type(name, (Exception,), {}) for name in ("GetTimeoutError", "RayTaskError", "RayError")}
    )

    def __init__(self) -> None:
        self.waited: list[float] = []
        self.killed = 0

    def get(self, reference: object, timeout: float) -> None:
        self.waited.append(timeout)
        raise self.exceptions.GetTimeoutError

    def kill(self, actor: object) -> None:
        self.killed += 1


def hanging(left_s: float) -> tuple[WarmEngine, Ray]:
    ray = Ray()
    remote = SimpleNamespace(remote=lambda *_: object())
    actor = SimpleNamespace(block=remote, stop=remote, apply=remote)
    engine = WarmEngine(None, None, actor=actor, _ray=ray)  # type: ignore[arg-type]
    engine.limit(lambda: left_s)
    return engine, ray


def test_a_hung_engine_is_given_up_after_a_few_times_its_blocks_length_not_after_the_budget() -> None:
    engine, ray = hanging(left_s=4 * 3600.0)
    with pytest.raises(EngineCrashError, match="hung while running a block"):
        engine.block([], Load(concurrency=1), deadline_s=4 * 3600.0, expected_s=30.0)
    assert ray.waited[0] == warm.PATIENCE * 30.0 + warm.PATIENCE_MORE_S
    assert (ray.killed, engine.actor) == (1, None)


def test_no_call_outlives_the_budget() -> None:
    engine, ray = hanging(left_s=7.0)
    with pytest.raises(BudgetExhaustedError, match="the budget ran out while the engine was running a block"):
        engine.block([], Load(concurrency=1), deadline_s=7.0, expected_s=300.0)
    assert ray.waited[0] == 7.0 + warm.GRACE_S
    assert ray.killed == 1


def test_a_long_temporary_folder_is_replaced_for_rays_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp")
    assert warm._short_folder() is None
    monkeypatch.setenv("TMPDIR", "/tmp/" + "long" * 15)
    short = warm._short_folder()
    assert short is not None and len(short) < 30


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (
            lambda state: setattr(state, "error", "Bypassed: all MoE layers routed some steps by themselves"),
            "in every step: Bypassed",
        ),
        (lambda state: state.apply(Policy(), None, None), f"runs policy exact, and {POLICY.digest} was set"),
    ],
    ids=["steps without it", "another policy"],
)
async def test_a_block_in_which_the_policy_was_not_in_force_is_no_evidence(fault: Any, words: str) -> None:
    """Its answers would be those of exact routing, and certify a policy that nobody asked."""
    engine = Engines()
    host = hosted(engine)
    await host.apply(TEXT)

    async def send(_: Request) -> AsyncIterator[tuple[str, int]]:
        for state in ranks_of(engine):
            fault(state)
        yield "x", 1

    host.send = send  # type: ignore[method-assign]
    with pytest.raises(EngineCrashError, match=words):
        await host.block([Request("a", 1)], Load(concurrency=1), [], None, None)
