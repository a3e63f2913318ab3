"""What pods answered last. Pods are asked in tasks of their own, so that whoever needs an answer waits for a while only.

A pod may hang, drip its answer byte by byte, or need a minute for a token. None of that may hold up another resource: the
question goes on without the one who asked, and the resource is woken when the answer has come.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Hashable
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import structlog

log = structlog.get_logger(__name__)

KEEP_S = 20.0  # that an answer stands in for a newer one that is on its way
FORGET_S = 120.0  # after which an answer that nobody asked for again is dropped


Aside = Callable[[], AbstractAsyncContextManager[None]]


@dataclass
class _Question:
    """One question and the last answer to it. Times are monotonic seconds."""

    task: asyncio.Task[None] | None = None
    began: float = 0.0
    value: Any = None
    at: float = -FORGET_S
    slow: bool = False  # the last answer took longer than the grace, so the next one is not waited for
    unread: bool = False  # it came when nobody waited any more
    wakes: list[Callable[[], None]] = field(default_factory=list)


@dataclass
class Answers:
    """Each question is under way at most once at a time."""

    clock: Callable[[], float] = time.monotonic
    _questions: dict[Hashable, _Question] = field(default_factory=dict)

    async def ask(
        self, question: Hashable, call: Callable[[], Awaitable[Any]], wake: Callable[[], None], *, grace_s: float,
        stand_in: bool = True, aside: Aside = nullcontext,
    ) -> Any:  # fmt: skip
        """The answer if it comes within the grace, else the last one, else None.

        Args:
            question: what is asked of whom; equal questions share one answer.
            call: asks it. What it raises is logged, and the answer is None.
            grace_s: how long the answer is waited for. It is not, where the last answer took longer.
            wake: called once when an answer comes that this call did not wait for. The next call returns that answer.
            stand_in: whether an answer of up to KEEP_S ago may be returned while a newer one is on its way.
            aside: entered while this call waits, so that the caller's place can go to another.
        """
        known = self._questions.setdefault(question, _Question())
        now = self.clock()
        if known.unread and now - known.at < KEEP_S:
            known.unread = False
            return known.value
        if known.task is None or known.task.done():
            known.began, known.unread, known.wakes = now, False, []
            known.task = asyncio.create_task(self._answer(question, known, call, grace_s))
        grace = 0.0 if known.slow else grace_s - (now - known.began)
        if grace > 0:
            async with aside():
                await asyncio.wait({known.task}, timeout=grace)
        if known.task.done():
            return known.value
        known.wakes.append(wake)
        return known.value if stand_in and self.clock() - known.at < KEEP_S else None

    async def _answer(self, question: Hashable, known: _Question, call: Callable[[], Awaitable[Any]], grace_s: float) -> None:
        value = None
        try:
            value = await call()
        except Exception as error:  # pods are not ours: whatever goes wrong with one, it is no answer
            log.warning("pod", error=repr(error)[:300])  # without the question, which may hold a key
        known.value, known.at = value, self.clock()
        known.slow = known.at - known.began > grace_s
        wakes, known.wakes = known.wakes, []
        known.unread = bool(wakes)
        for wake in dict.fromkeys(wakes):
            wake()

    def forget(self) -> None:
        """Drop answers that nobody asks for any more, of pods that may be long gone."""
        now = self.clock()
        for question, known in list(self._questions.items()):
            if (known.task is None or known.task.done()) and now - known.at > FORGET_S:
                del self._questions[question]

    async def close(self) -> None:
        """End what is under way."""
        tasks = [known.task for known in self._questions.values() if known.task is not None and not known.task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
