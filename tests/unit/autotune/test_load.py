"""The load client on a server of known speed: definitions of the metrics, order, fillers, open and closed loops."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from sere_autotune.trial.items import Item
from sere_autotune.trial.load import EngineGoneError, Load, Request, run_block
from sere_autotune.tuning.spec import TaskSpec

TASK = TaskSpec(file="f", max_tokens=5)


def requests(count: int) -> list[Request]:
    return [Request.of(Item(f"d{i}", f"p{i}", "aaaaa", TASK)) for i in range(count)]


class Server:
    """First token after 20 ms, then one each 10 ms."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.now = self.most = 0

    async def send(self, request: Request) -> AsyncIterator[tuple[str, int]]:
        self.seen.append(request.prompt)
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(0.02)
            for _ in range(request.max_tokens):
                yield "a", 1
                await asyncio.sleep(0.01)
        finally:
            self.now -= 1


async def test_closed_loop_holds_its_concurrency_and_keeps_dispatch_order() -> None:
    server = Server()
    block = await run_block(server.send, requests(20), Load(concurrency=4, warmup=3))
    assert server.most == 4
    assert [s.item for s in block.sent] == [f"d{i}" for i in range(20)]
    assert all(s.correct for s in block.sent)
    assert len(server.seen) > 23  # filler kept the load full to the end
    assert 2 < block.batch <= 4.1


async def test_metrics_are_those_of_vllm_bench_serve() -> None:
    block = await run_block(Server().send, requests(4), Load(concurrency=1))
    for s in block.sent:
        assert s.tokens == 5
        assert s.ttft_ms >= 20
        assert s.e2el_ms >= s.ttft_ms + 40, (
            "four tokens more, one each 10 ms at least: the first token's time is not the last one's"
        )
        assert s.tpot_ms == pytest.approx((s.e2el_ms - s.ttft_ms) / 4)


async def test_one_token_has_no_tpot() -> None:
    async def send(request: Request) -> AsyncIterator[tuple[str, int]]:
        yield "a", 1

    block = await run_block(send, requests(2), Load(concurrency=1))
    assert [s.tpot_ms for s in block.sent] == [None, None]


async def test_open_loop_times_from_the_scheduled_arrival() -> None:
    """A server that handles one request at a time for 50 ms, offered 40/s: the queue must show in TTFT."""
    lock = asyncio.Lock()

    async def send(request: Request) -> AsyncIterator[tuple[str, int]]:
        async with lock:
            await asyncio.sleep(0.05)
            yield "aaaaa", 5

    block = await run_block(send, requests(30), Load(rate=40, seed=1, warmup=2), deadline_s=20)
    assert block.sent[-1].ttft_ms > 300


async def test_open_loop_arrivals_are_the_same_for_the_same_seed() -> None:
    async def gaps(seed: int) -> list[float]:
        block = await run_block(Server().send, requests(12), Load(rate=200, seed=seed))
        return [b.start_s - a.start_s for a, b in zip(block.sent, block.sent[1:], strict=False)]

    first, again, other = await gaps(1), await gaps(1), await gaps(2)
    assert first == pytest.approx(again, abs=1e-6)
    assert first != pytest.approx(other, abs=1e-3)


async def test_a_failed_request_has_no_answer_and_no_tpot() -> None:
    async def send(request: Request) -> AsyncIterator[tuple[str, int]]:
        if request.prompt == "p1":
            raise RuntimeError("no")
        yield "aaaaa", 5

    block = await run_block(send, requests(3), Load(concurrency=1))
    assert [s.correct for s in block.sent] == [True, None, True]
    assert block.sent[1].error == "RuntimeError: no"
    assert block.sent[1].tpot_ms is None


async def test_the_watch_sees_dispatch_order_whatever_ends_first() -> None:
    async def send(request: Request) -> AsyncIterator[tuple[str, int]]:
        await asyncio.sleep(0.1 if request.prompt == "p0" else 0.001)
        yield "aaaaa", 5

    order: list[int] = []

    def watch(index: int, sent) -> str | None:
        order.append(index)
        return "enough" if index == 5 else None

    block = await run_block(send, requests(2000), Load(concurrency=4), watch=watch)
    assert order == [0, 1, 2, 3, 4, 5]
    assert block.stopped == "enough"


async def test_nothing_is_dispatched_after_the_deadline() -> None:
    block = await run_block(Server().send, requests(500), Load(concurrency=2), deadline_s=0.3)
    assert block.stopped == "time"
    assert 2 <= len(block.sent) < 30


@pytest.mark.parametrize("load", [Load(concurrency=4), Load(rate=200.0, seed=1)], ids=["closed", "open"])
async def test_a_block_ends_with_its_last_counted_request(load: Load) -> None:
    """What keeps the load full meanwhile is cancelled: waiting for it took a request's time in every block."""
    cancelled = 0

    async def send(request: Request) -> AsyncIterator[tuple[str, int]]:
        nonlocal cancelled
        try:
            await asyncio.sleep(3600 if request.prompt == "filler" else 0.1)
        except asyncio.CancelledError:
            cancelled += 1
            raise
        yield "aaaaa", 5

    slow = [Request("filler", 5)]
    last = [Request.of(Item(f"d{i}", "p", "aaaaa", TASK)) for i in range(7)]
    block = await asyncio.wait_for(run_block(send, last, load, fillers=slow), timeout=10)
    assert [s.correct for s in block.sent] == [True] * 7
    assert cancelled > 0
    assert block.stopped is None


@pytest.mark.parametrize("load", [Load(concurrency=16, warmup=4), Load(rate=500.0, seed=1, warmup=4)], ids=["closed", "open"])
@pytest.mark.parametrize("at", [2, 12])  # in the warm-up, among the counted
async def test_a_dead_engine_ends_the_block_at_once_with_answers_in_flight(load: Load, at: int) -> None:
    """A dead engine raises before anything is awaited, and what was in flight never ends."""
    seen = cancelled = 0

    async def send(request: Request) -> AsyncIterator[tuple[str, int]]:
        nonlocal seen, cancelled
        seen += 1
        if seen > at:
            raise EngineGoneError("gone")
        try:
            yield "a", 1
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled += 1
            raise

    began = time.monotonic()
    with pytest.raises(EngineGoneError, match="gone"):
        await asyncio.wait_for(run_block(send, requests(40), load, deadline_s=3600), timeout=10)
    assert time.monotonic() - began < 5
    assert cancelled == at


@pytest.mark.parametrize("load", [Load(concurrency=16), Load(rate=2000.0, seed=1)], ids=["closed", "open"])
async def test_requests_that_fail_at_once_neither_starve_the_others_nor_the_deadline(load: Load) -> None:
    """As prompts which the engine refuses before anything is awaited, the fillers among them."""
    calls = 0

    async def send(request: Request) -> AsyncIterator[tuple[str, int]]:
        nonlocal calls
        calls += 1
        if request.prompt != "p0":
            raise ValueError("too long")
        await asyncio.sleep(0.5)
        yield "aaaaa", 5

    begun = time.monotonic()
    block = await asyncio.wait_for(run_block(send, requests(8), load, fillers=requests(8)[1:], deadline_s=0.2), timeout=20)
    assert time.monotonic() - begun < 5
    assert [s.error for s in block.sent] == [None] + ["ValueError: too long"] * 7
    assert block.sent[0].correct
    assert calls < 3000
