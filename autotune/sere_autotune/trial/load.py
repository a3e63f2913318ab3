"""The load client: sends requests closed or open loop and times each one. Knows no engine, only a `send` function.

Metrics are those of `vllm bench serve` (vllm/benchmarks/serve.py, lib/endpoint_request_func.py): TTFT to the first
streamed chunk, E2EL to the last, TPOT = (E2EL - TTFT) / (output tokens - 1). In the open loop both are timed from
the scheduled arrival, so that a stalled engine cannot hide its queue.

A block is: warm-up requests (not counted), the counted ones, then filler until the last counted one is done, so that
every counted request runs under the full load; what is in flight then is cancelled. Results keep dispatch order.

A request that fails is a result; an engine that is gone (`EngineGoneError` from `send`) ends the block at once.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sere_autotune.trial.items import Item
from sere_ext.contract.records import Message

FAILURE_PAUSE_S = 0.01  # before a client whose request failed at once sends the next, so that it does not spin


class EngineGoneError(Exception):
    """The engine died: no request of the block can be answered any more."""


@dataclass(frozen=True)
class Request:
    """One prompt to send. Without an item it is traffic that is timed but not judged."""

    prompt: str
    max_tokens: int
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    item: Item | None = None
    cut_tokens: int | None = None  # use only this many of the prompt's tokens
    messages: tuple[Message, ...] = field(default=(), hash=False)  # sent by the chat template in place of the prompt
    place: str = ""  # file and line that it comes from, for messages

    @classmethod
    def of(cls, item: Item) -> Request:
        return cls(item.prompt, item.task.max_tokens, item.task.stop, item=item, messages=item.messages, place=item.place)


# Streams (text, tokens) chunks of the answer to a request; the last one ends the iteration. Raises EngineGoneError where
# no request can be answered any more; any other exception is the failure of that one request.
Send = Callable[[Request], AsyncIterator[tuple[str, int]]]


@dataclass(frozen=True)
class Sent:
    """What became of one counted request; times in milliseconds, `start_s` and `end_s` from the block's begin."""

    item: str | None  # digest
    correct: bool | None  # None where there is no item, or no answer since the request failed
    text: str
    tokens: int
    ttft_ms: float
    e2el_ms: float
    start_s: float
    end_s: float
    error: str | None = None

    @property
    def tpot_ms(self) -> float | None:
        """None for answers of one token or less, as `vllm bench serve` leaves them out."""
        return (self.e2el_ms - self.ttft_ms) / (self.tokens - 1) if self.tokens > 1 and self.error is None else None


@dataclass(frozen=True)
class Load:
    """How requests arrive. `concurrency` 0 means open loop at `rate` requests/s."""

    concurrency: int = 0
    rate: float = 0.0
    seed: int = 0
    warmup: int = 0  # requests before the counted ones


@dataclass
class Block:
    """All counted requests of one block in dispatch order, and how long they took."""

    sent: list[Sent] = field(default_factory=list)
    seconds: float = 0.0  # from the first counted dispatch to the last counted answer
    residence_s: float = 0.0  # mean time of a request in the engine
    batch: float = 0.0  # mean requests in flight while counting
    stopped: str | None = None  # why it ended early, else None


Watch = Callable[[int, Sent], str | None]  # (dispatch index, result) in dispatch order -> a reason to stop


class _Runner:
    def __init__(self, send: Send, requests: Sequence[Request], load: Load, fillers: Sequence[Request], watch: Watch | None):
        self.send, self.load, self.watch = send, load, watch
        self.requests = requests
        self.fillers: Iterator[Request] = itertools.cycle(fillers or requests)
        self.results: dict[int, Sent] = {}
        self.judged = 0
        self.dispatched = 0
        self.stopped: str | None = None
        self.begin = time.perf_counter()
        self.tasks: set[asyncio.Task[None]] = set()

    def plan(self) -> Iterator[tuple[int | None, Request]]:
        """Warm-up, counted requests with their index, then filler for as long as a counted request is in flight."""
        for _ in range(self.load.warmup):
            if self.stopped:
                break
            yield None, next(self.fillers)
        for index, request in enumerate(self.requests):
            if self.stopped:
                break
            self.dispatched += 1
            yield index, request
        while not self.done:
            yield None, next(self.fillers)

    @property
    def done(self) -> bool:
        ended = self.stopped is not None or self.dispatched == len(self.requests)
        return ended and len(self.results) == self.dispatched

    async def one(self, index: int | None, request: Request, scheduled: float | None) -> None:
        begin = time.perf_counter() if scheduled is None else scheduled
        first = last = None
        text, tokens, error = "", 0, None
        try:
            async for chunk, count in self.send(request):
                now = time.perf_counter()
                first, last = first or now, now
                text += chunk
                tokens += count
        except EngineGoneError:
            raise
        except Exception as problem:  # a failed request is a result, not the end of the block
            error = f"{type(problem).__name__}: {problem}"
            await asyncio.sleep(FAILURE_PAUSE_S)
        if index is None:
            return
        end = last or time.perf_counter()
        self.results[index] = Sent(
            item=request.item.digest if request.item else None,
            correct=request.item.correct(text) if request.item is not None and error is None else None,
            text=text, tokens=tokens,
            ttft_ms=((first or end) - begin) * 1e3, e2el_ms=(end - begin) * 1e3,
            start_s=begin - self.begin, end_s=end - self.begin, error=error,
        )  # fmt: skip
        while self.watch and self.stopped is None and self.judged in self.results:
            self.stopped = self.watch(self.judged, self.results[self.judged])
            self.judged += 1
        if self.done:  # nothing that is still in flight is counted, and waiting for it would take a request's time
            for task in self.tasks - {asyncio.current_task()}:
                task.cancel()

    def start(self, group: asyncio.TaskGroup, work: Coroutine[Any, Any, None]) -> None:
        """Run a client or a request until the block is done."""
        task = group.create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def closed(self) -> None:
        plan = self.plan()

        async def client() -> None:
            while not self.done:
                step = next(plan, None)
                if step is None:
                    return
                await self.one(*step, scheduled=None)

        async with asyncio.TaskGroup() as clients:
            for _ in range(self.load.concurrency):
                self.start(clients, client())

    async def open(self) -> None:
        gaps = random.Random(self.load.seed)
        due = time.perf_counter()
        async with asyncio.TaskGroup() as arrivals:
            for index, request in self.plan():
                due += gaps.expovariate(self.load.rate)
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                if index is None and self.done:  # meanwhile
                    break
                self.start(arrivals, self.one(index, request, scheduled=due))


async def run_block(
    send: Send,
    requests: Sequence[Request],
    load: Load,
    *,
    fillers: Sequence[Request] = (),
    watch: Watch | None = None,
    deadline_s: float | None = None,
) -> Block:
    """Send `requests` under `load` and return their results in dispatch order.

    Args:
        fillers: what warms up and keeps the load full after the last counted request; else the requests again.
        watch: called in dispatch order; a text it returns ends the block early with that reason.
        deadline_s: no counted request is dispatched later than this after the begin.

    Raises:
        EngineGoneError: the engine died; every request in flight was cancelled.
    """
    runner = _Runner(send, requests, load, fillers, watch)
    timer: asyncio.TimerHandle | None = None
    if deadline_s is not None:

        def late() -> None:
            runner.stopped = runner.stopped or "time"

        timer = asyncio.get_running_loop().call_later(deadline_s, late)
    try:
        await (runner.closed() if load.concurrency else runner.open())
    except ExceptionGroup as group:  # of the clients: the first one ended the block and cancelled the others
        raise group.exceptions[0] from None
    finally:
        if timer:
            timer.cancel()
    sent = [runner.results[index] for index in sorted(runner.results)]
    if not sent:
        return Block(stopped=runner.stopped)
    start, end = min(s.start_s for s in sent), max(s.end_s for s in sent)
    in_engine = sum(s.e2el_ms for s in sent) / 1e3
    complete = len(sent) == len(requests)
    return Block(
        sent=sent,
        seconds=end - start,
        residence_s=in_engine / len(sent),
        batch=in_engine / max(end - start, 1e-9),
        stopped=None if complete else runner.stopped,
    )
