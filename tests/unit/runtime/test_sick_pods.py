"""Pods that hang, drip, flood or answer nonsense, on real sockets: they get one deadline, a size limit, and nobody's turn."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from sere_ext.contract.errors import NoAnswerError
from sere_ext.contract.profile import GoldenPrompt
from sere_operator.runtime.answers import Answers
from sere_operator.runtime.fetch import MIB, fetch, new_client
from sere_operator.runtime.probe import Prober, parse_metrics
from sere_operator.runtime.reconciler import Key, Place, Reconciler
from tests.kit.states import engine_state

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def pod(serve: Serve) -> AsyncIterator[str]:
    """A pod on loopback that answers by `serve`; its base URL."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await serve(reader, writer)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def request(reader: asyncio.StreamReader) -> str:
    """The path that was asked for. Reads the body as well."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    lengths = [line.split(":")[1] for line in head.splitlines() if line.lower().startswith("content-length")]
    if lengths:
        await reader.readexactly(int(lengths[0]))
    return head.split()[1]


async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await request(reader)
    await asyncio.sleep(60)


async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A byte every 20 ms: no read of it ever times out."""
    await request(reader)
    for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 10000\r\n\r\n" + b" " * 10_000:
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(0.02)


def says(*answers: Any, after_s: float = 0.0, head: str = "") -> Serve:
    """Answers with these bodies (objects as JSON) in turn, the last one for ever."""
    left = list(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            await request(reader)
            await asyncio.sleep(after_s)
            answer = left.pop(0) if len(left) > 1 else left[0]
            body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n{head}\r\n".encode() + body)
            await writer.drain()

    return serve


async def test_an_answer_has_one_deadline_however_it_is_drawn_out() -> None:
    for serve in (hang, drip):
        async with pod(serve) as base, new_client() as client:
            began = time.monotonic()
            with pytest.raises(NoAnswerError, match=r"no whole answer within 0\.3 s"):
                await fetch(client, "GET", f"{base}/sere", deadline_s=0.3)
            assert time.monotonic() - began < 5


async def test_an_answer_of_400_mb_is_not_read() -> None:
    sent = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 400000000\r\n\r\n")
        for _ in range(400):
            writer.write(b" " * 1_000_000)
            await writer.drain()
            sent += 1_000_000

    async with pod(flood) as base, new_client() as client:
        with pytest.raises(NoAnswerError, match="larger than 1,048,576 bytes"):
            await fetch(client, "GET", f"{base}/sere", deadline_s=30)
        await asyncio.sleep(0.1)
    assert sent < 64 * MIB, "only what sockets hold"


async def test_what_swells_when_unpacked_is_refused() -> None:
    async with pod(says(b"x", head="Content-Encoding: gzip\r\n")) as base, new_client() as client:
        with pytest.raises(NoAnswerError, match="compressed"):
            await fetch(client, "GET", f"{base}/sere", deadline_s=5)


KEY = {"modelName": "m", "configDigest": "c", "engineVersion": "0.32.0", "pluginVersion": "0.1.0", "device": "cpu"}
GOOD = engine_state("exact", KEY).to_json_dict()


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"\xff\xfe", b"[" * 100_000, b"[]", b"NaN", {"ready": True}, {**GOOD, "policyDigest": ["x"]},
        {**GOOD, "ranks": "x"}, {**GOOD, "ranks": [{"policyDigest": {}}]}, {**GOOD, "ranks": [1]}, {**GOOD, "key": "k"},
    ],
)  # fmt: skip
async def test_a_state_of_another_form_is_no_answer(answer: Any) -> None:
    prober = Prober()
    async with pod(says(answer)) as base:
        assert await prober.state(base) is None
        assert await prober.proven(base, "m", ("uid",), "exact") is None
    await prober.close()


async def test_a_good_state_is_kept_with_its_error_cut_to_what_a_status_can_hold() -> None:
    prober = Prober()
    async with pod(says({**GOOD, "error": "e" * 100_000})) as base:
        state = await prober.state(base)
    await prober.close()
    assert state is not None and state.to_json_dict() == {**GOOD, "error": "e" * 1000}


LINE = 'sere_tpot_seconds_{}{{policy="exact",bucket="8-64"{}}} {}\n'


def page(count: str = "4", total: str = "0.5", bound: str = "0.02") -> str:
    bounds = "".join(LINE.format("bucket", f',le="{le}"', count) for le in (bound, "+Inf"))
    return "# TYPE sere_tpot_seconds histogram\n" + bounds + LINE.format("count", "", count) + LINE.format("sum", "", total)


def test_numbers_that_no_histogram_can_hold_are_no_metrics() -> None:
    good = parse_metrics(page(), {"20"})
    assert good is not None and good.tpot["exact", "8-64"].count == 4
    for sick in (
        page(count="+Inf"), page(count="NaN"), page(count="1e300"), page(count="-1"), page(total="NaN"), page(total="+Inf"),
        page(total="-1"), page(bound="NaN"), page(bound="-1"), page(bound="x"), page(count="many"), page()[:-30], page() + "sere_tpot_seconds{\n",
        page() * 5000,
    ):  # fmt: skip
        assert parse_metrics(sick, {"20"}) is None, sick[:300]


async def test_a_slow_answer_is_waited_for_once_then_stood_in_for_and_wakes_when_it_has_come() -> None:
    answers, woken, may_answer, asked = Answers(), asyncio.Event(), asyncio.Event(), 0

    async def slow() -> int:
        nonlocal asked
        asked += 1
        mine = asked
        await may_answer.wait()
        return mine

    async def ask() -> Any:
        return await answers.ask("q", slow, woken.set, grace_s=0.05)

    assert await ask() is None, "not yet"
    assert await ask() is None and asked == 1, "one question at a time"
    may_answer.set()
    await asyncio.wait_for(woken.wait(), 10)
    may_answer.clear()
    assert await ask() == 1 and asked == 1, "what was woken for is there, without another question"
    assert await asyncio.wait_for(ask(), 10) == 1, "the last answer stands in, and that of a slow pod is not waited for again"
    await answers.close()


async def test_what_raises_is_no_answer() -> None:
    async def broken() -> None:
        raise ZeroDivisionError

    assert await Answers().ask("q", broken, lambda: None, grace_s=1) is None


async def test_golden_prompts_run_aside_and_count_only_while_the_policy_is_in_force() -> None:
    right = {"choices": [{"text": "A"}]}
    for after, expected in ((GOOD, (True,)), ({**GOOD, "policyDigest": "sere-1"}, None)):
        woken = asyncio.Event()
        prober = Prober().for_resource(woken.set, contextlib.nullcontext)
        async with pod(says(right, after)) as base:

            async def golden(prober: Prober = prober, base: str = base) -> Any:
                return await prober.golden(base, "m", (GoldenPrompt(prompt="a", answer="A", max_tokens=4),), 1, "uid", "exact")

            assert await golden() is None, "never waited for"
            await asyncio.wait_for(woken.wait(), 10)
            result = await golden()
            assert (result.right if result else None) == expected
            assert await golden() is None, "each run counts once"
        await prober.close()


async def test_work_that_waits_aside_gives_its_place_to_others() -> None:
    done, both, all_done = [], asyncio.Event(), asyncio.Event()

    async def work(key: Key, place: Place) -> float | None:
        if key[2].startswith("sick"):

            async def wait() -> None:
                async with place.aside():
                    await both.wait()

            await asyncio.gather(wait(), wait(), wait())
        done.append(key[2])
        if {"healthy-1", "healthy-2"} <= set(done):
            both.set()
        if len(done) == 4:
            all_done.set()
        return None

    reconciler = Reconciler(work, workers=1)
    for name in ("sick-1", "sick-2", "healthy-1", "healthy-2"):
        reconciler.wake(("SereDeployment", "ns", name))
    running = asyncio.create_task(reconciler.run())
    async with asyncio.timeout(20):
        await both.wait()
        await all_done.wait()
    running.cancel()
    assert done[:2] == ["healthy-1", "healthy-2"]


async def locked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """An engine that asks for the key `open`, as vLLM does: 401 on /v1 without it."""
    while True:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        lengths = [int(line.split(":")[1]) for line in head.splitlines() if line.lower().startswith("content-length")]
        if lengths:
            await reader.readexactly(lengths[0])
        allowed = "/v1" not in head.split()[1] or "authorization: bearer open\r\n" in head.lower()
        answer = {**GOOD, "usage": {"completion_tokens": 1}, "choices": [{"text": "A"}]}
        body = json.dumps(answer).encode() if allowed else b"{}"
        status = "200 OK" if allowed else "401 Unauthorized"
        writer.write(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()


async def test_an_engine_with_an_api_key_is_asked_with_it_and_without_says_why_it_gives_no_token() -> None:
    shared = Prober()
    async with pod(locked) as base:
        without = shared.for_resource(lambda: None, contextlib.nullcontext)
        assert await without.proven(base, "m", ("uid",), "exact") is None
        assert without.refusals == [
            f"{base} answers a request for a token with HTTP 401: it asks for an API key; name its Secret in spec.engine.apiKeySecret"
        ]
        wrong = shared.for_resource(lambda: None, contextlib.nullcontext, "shut")
        assert await wrong.proven(base, "m", ("uid",), "exact") is None
        assert "its key is another than that of spec.engine.apiKeySecret" in wrong.refusals[0]
        woken = asyncio.Event()
        right = shared.for_resource(woken.set, contextlib.nullcontext, "open")
        assert await right.proven(base, "m", ("uid",), "exact") == "exact"
        assert await right.through_service(base, "m", ("svc",)) == "exact"
        prompts = (GoldenPrompt(prompt="a", answer="A", max_tokens=4),)
        assert await right.golden(base, "m", prompts, 8, "uid", "exact") is None
        await asyncio.wait_for(woken.wait(), 10)
        result = await right.golden(base, "m", prompts, 8, "uid", "exact")
        assert result is not None and result.right == (True,)
        assert right.refusals == []
    await shared.close()
