"""One loop per resource: observe, decide, write, and again when it is woken or when its plan asks for it.

Level-based: a wake-up carries no content. Whatever was missed is found by the next reconciliation, so events may be lost, doubled
or late without harm. A resource is never worked on twice at a time.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import structlog

from sere_ext.contract.errors import ApiError, NotLeadingError

log = structlog.get_logger(__name__)

Key = tuple[str, str, str]  # kind, namespace, name
Work = Callable[[Key, "Place"], Awaitable[float | None]]  # seconds until the next time, None: gone, forget it

MAX_BACKOFF_S = 60.0


@dataclass
class _Entry:
    queued: bool = False
    running: bool = False
    dirty: bool = False
    failures: int = 0
    timer: asyncio.TimerHandle | None = None
    due: float = 0.0


class Place:
    """One of the places for work that goes on at the same time, held by one piece of work."""

    def __init__(self, places: asyncio.Semaphore) -> None:
        self._places = places
        self._held = True
        self._waiting = 0

    @asynccontextmanager
    async def aside(self) -> AsyncIterator[None]:
        """Give the place to others while this work only waits. May be entered several times at once."""
        self._waiting += 1
        if self._held:
            self._held = False
            self._places.release()
        try:
            yield
        finally:
            self._waiting -= 1
            if self._waiting == 0 and not self._held:
                self._held = True
                await self._places.acquire()


@dataclass
class Reconciler:
    """Wakes are merged per key; at most `workers` keys are worked on at a time, not counting those that wait aside."""

    work: Work
    workers: int = 8
    entries: dict[Key, _Entry] = field(default_factory=dict)
    last_success: float = 0.0  # monotonic seconds
    reconciled: int = 0
    failed: int = 0

    def __post_init__(self) -> None:
        self._queue: asyncio.Queue[Key] = asyncio.Queue()
        self._places = asyncio.Semaphore(self.workers)

    def wake(self, key: Key) -> None:
        """Look at this resource soon. Call from the event loop's thread."""
        entry = self.entries.setdefault(key, _Entry())
        if entry.timer is not None:
            entry.timer.cancel()
            entry.timer = None
        if entry.running:
            entry.dirty = True
        elif not entry.queued:
            entry.queued = True
            self._queue.put_nowait(key)

    def wake_in(self, key: Key, delay_s: float) -> None:
        entry = self.entries.setdefault(key, _Entry())
        loop = asyncio.get_running_loop()
        due = loop.time() + delay_s
        if entry.queued or entry.running or (entry.timer is not None and entry.due <= due):
            return
        if entry.timer is not None:
            entry.timer.cancel()
        entry.due = due
        entry.timer = loop.call_later(delay_s, self.wake, key)

    async def run(self) -> None:
        """Work for ever; ends by cancellation, or by NotLeadingError from a write."""
        async with asyncio.TaskGroup() as group:
            while True:
                key = await self._queue.get()
                await self._places.acquire()
                entry = self.entries[key]
                entry.queued, entry.running, entry.dirty = False, True, False
                group.create_task(self._one(key, entry))

    async def _one(self, key: Key, entry: _Entry) -> None:
        delay = await self._once(key, entry)
        self._places.release()
        entry.running = False
        if entry.dirty:
            self.wake(key)
        elif delay is None:
            self.entries.pop(key, None)
        else:
            self.wake_in(key, delay)

    async def _once(self, key: Key, entry: _Entry) -> float | None:
        try:
            delay = await self.work(key, Place(self._places))
        except NotLeadingError:
            raise
        except Exception as error:  # one resource's trouble must not stop the others
            entry.failures += 1
            self.failed += 1
            backoff = min(MAX_BACKOFF_S, 0.5 * 2 ** min(entry.failures, 8)) * random.uniform(0.8, 1.2)
            known = isinstance(error, ApiError)
            if known and error.status == 409:  # type: ignore[attr-defined]
                backoff = 0.2  # somebody wrote in between; observe again
            log.warning(
                "reconcile", kind=key[0], namespace=key[1], name=key[2], error=str(error) or repr(error), exc_info=not known
            )
            return backoff
        entry.failures = 0
        self.reconciled += 1
        self.last_success = time.monotonic()
        return delay
