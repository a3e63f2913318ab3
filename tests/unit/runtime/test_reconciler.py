"""The per-resource loop: wakes are merged, none is lost, one resource's trouble stays its own."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

import pytest

from sere_ext.contract.errors import NotLeadingError
from sere_operator.runtime.reconciler import Key, Place, Reconciler

A: Key = ("SereDeployment", "ns", "a")
B: Key = ("SereDeployment", "ns", "b")


async def run_until(reconciler: Reconciler, reached: Callable[[], bool]) -> None:
    """Run the loop until something has come about, however slow the machine is."""
    running = asyncio.create_task(reconciler.run())
    async with asyncio.timeout(20):
        while not reached():
            assert not running.done()
            await asyncio.sleep(0.005)
    running.cancel()


async def test_wakes_are_merged_and_one_during_the_work_is_not_lost() -> None:
    runs, at_once = 0, 0

    async def work(key: Key, place: Place) -> float | None:
        nonlocal runs, at_once
        at_once += 1
        assert at_once == 1, "one resource was worked on twice at a time"
        runs += 1
        if runs == 1:
            for _ in range(5):
                reconciler.wake(A)
        await asyncio.sleep(0.02)
        at_once -= 1
        return 60.0

    reconciler = Reconciler(work, workers=4)
    for _ in range(5):
        reconciler.wake(A)
    await run_until(reconciler, lambda: runs >= 2 and reconciler.entries[A].timer is not None)
    assert runs == 2


async def test_it_looks_again_after_the_time_that_the_plan_asks_for() -> None:
    runs = []

    async def work(key: Key, place: Place) -> float | None:
        runs.append(asyncio.get_running_loop().time())
        return 0.05

    reconciler = Reconciler(work)
    reconciler.wake(A)
    await run_until(reconciler, lambda: len(runs) >= 4)
    assert min(b - a for a, b in itertools.pairwise(runs)) >= 0.045


async def test_a_failure_is_tried_again_with_backoff_and_others_go_on() -> None:
    times: dict[str, list[float]] = {"a": [], "b": []}
    enough = asyncio.Event()

    async def work(key: Key, place: Place) -> float | None:
        times[key[2]].append(asyncio.get_running_loop().time())
        if len(times["a"]) >= 2 and len(times["b"]) >= 3:
            enough.set()
        if key == A:
            raise RuntimeError("boom")
        return 0.05

    reconciler = Reconciler(work)
    reconciler.wake(A)
    reconciler.wake(B)
    running = asyncio.create_task(reconciler.run())
    await asyncio.wait_for(enough.wait(), 20)
    running.cancel()
    assert times["a"][1] - times["a"][0] >= 0.75, "the first backoff is a second, give or take a fifth"
    assert reconciler.failed >= 1


async def test_what_is_gone_is_forgotten_and_a_lost_lease_ends_all() -> None:
    async def work(key: Key, place: Place) -> float | None:
        if key == B:
            raise NotLeadingError
        return None

    reconciler = Reconciler(work)
    reconciler.wake(A)
    await run_until(reconciler, lambda: reconciler.entries == {})
    reconciler.wake(B)
    with pytest.raises(BaseExceptionGroup) as caught:
        await reconciler.run()
    assert caught.group_contains(NotLeadingError)
