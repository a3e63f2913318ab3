"""A poll of the counters never waits for a busy device. `CudaMirror` runs here on the CPU, with a device that keeps time."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from prometheus_client import REGISTRY

from sere_ext.contract.policy import Policy
from sere_ext.contract.state import EngineState
from sere_ext.control.live import LiveControl
from sere_ext.control.metrics import Metrics
from sere_ext.routing import kernel
from sere_ext.routing.cuda import CudaMirror
from sere_ext.routing.state import LayerState, WorkerState
from tests.kit.ranks import Engine

STEP = torch.tensor([1, 16, 8, 4, 32, 5, 6])  # what a step adds to a row of counters


class Device:
    """A stream that has work until `finish`: it notes whoever waits for it, and lets no event come before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.busy = False
        self.waits = 0
        device = self

        class Event:
            def record(self, stream: Any) -> None:
                self.done = not device.busy
                device.events.append(self)

            def query(self) -> bool:
                return self.done

            def synchronize(self) -> None:
                device.wait()
                self.done = True

        self.events: list[Event] = []
        stream = SimpleNamespace(query=lambda: not device.busy, synchronize=self.wait)
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: self.wait())

    def wait(self) -> None:
        self.waits += self.busy
        self.finish()

    def finish(self) -> None:
        """All work is done that was given so far."""
        self.busy = False
        for event in self.events:
            event.done = True


def engine_on(device: Device) -> tuple[Engine, list[CudaMirror]]:
    """Two ranks whose counters stand on a device."""
    engine, mirrors = Engine(), []
    for worker in engine.workers:
        layers = [LayerState(number=n, experts=4, top_k=2, renormalise=True, scoring=0) for n in (0, 1)]
        mirrors.append(CudaMirror(layers, "cpu"))
        worker.sere = WorkerState(layers, worker.sere.key, mirrors[-1])
        worker.sere.apply(Policy(), 0, None)
    device.waits = 0
    return engine, mirrors


def step(mirrors: list[CudaMirror]) -> None:
    for mirror in mirrors:
        mirror._counters[:, -1] += STEP


def launch(engine: Engine) -> None:
    """What the worker counts of a step that a busy device has yet to run."""
    for worker in engine.workers:
        worker.sere.count_step()


def calls(control: LiveControl) -> int:
    return sum(row.calls for row in asyncio.run(control.state()).counters)


def test_polls_of_a_busy_device_answer_with_the_copy_that_arrived_last_and_wait_for_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = Device(monkeypatch)
    engine, mirrors = engine_on(device)
    control = LiveControl(engine, None)
    step(mirrors)
    device.busy = True
    assert [calls(control) for _ in range(3)] == [0, 0, 0]
    device.finish()  # the first poll's copy is there; the next steps run already
    device.busy = True
    monkeypatch.setattr(CudaMirror, "_start_copy", noted := Starts(CudaMirror._start_copy))
    assert calls(control) == 2, "two layers, one step"
    assert noted.count == 2, "the next copy of each rank is under way"
    step(mirrors)
    assert calls(control) == 2
    assert device.waits == 0
    device.finish()
    assert calls(control) == 4, "an idle device is read at once"
    assert device.waits == 0
    state = asyncio.run(control.state())
    assert state.error is None, "one copy serves all layers, so none seems to have been passed by"
    assert {row.tokens for row in state.counters} == {4 * int(STEP[kernel.TOKENS])}


class Starts:
    """`CudaMirror._start_copy`, counted."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.count = inner, 0

    def __get__(self, mirror: CudaMirror, owner: type) -> Any:
        def start(steps: int) -> None:
            self.count += 1
            self.inner(mirror, steps)

        return start


def test_a_poll_for_metrics_waits_for_nothing_either(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    engine, mirrors = engine_on(device)
    control = LiveControl(engine, None)
    device.busy = True
    seen: list[int] = []

    published = Metrics.publish

    def publish(self: Metrics, state: EngineState) -> None:
        published(self, state)
        seen.append(state.generation)
        self._active = True  # requests run

    monkeypatch.setattr(Metrics, "publish", publish)
    monkeypatch.setattr("sere_ext.control.metrics.POLL_SECONDS", 0.001)
    engine.logger_manager = SimpleNamespace(stat_loggers=[])  # type: ignore[attr-defined]

    async def polls() -> None:
        task = asyncio.create_task(Metrics(control).run())
        for _ in range(2000):
            step(mirrors)
            await asyncio.sleep(0.001)
            if len(seen) >= 3 or task.done():
                break
        task.cancel()

    before = set(REGISTRY._collector_to_names)
    try:
        asyncio.run(polls())
    finally:
        for collector in set(REGISTRY._collector_to_names) - before:
            REGISTRY.unregister(collector)
    assert len(seen) >= 3
    assert device.waits == 0


def test_steps_in_flight_are_not_taken_for_bypassed_and_steps_without_routers_are_found_once_they_ran(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = Device(monkeypatch)
    engine, mirrors = engine_on(device)
    control = LiveControl(engine, None)

    def error() -> str | None:
        return asyncio.run(control.state()).error

    device.busy = True
    launch(engine)
    launch(engine)
    assert error() is None, "the device has not run them yet; this poll's copy stands behind them"
    for _ in range(2):
        step(mirrors)
        for mirror in mirrors:  # the copy that the poll started is made where the device comes to it
            mirror._copied.copy_(mirror._counters)
    launch(engine)
    device.finish()
    device.busy = True
    assert error() is None, "two steps were launched before the copy that arrived, and it holds their calls"
    step(mirrors)
    for mirror in mirrors:
        mirror._copied.copy_(mirror._counters)
    device.finish()
    assert error() is None
    launch(engine)  # a step whose graph holds no router
    assert "Bypassed: all MoE layers" in str(error())
    assert device.waits == 0


def test_a_switch_waits_so_that_every_step_is_counted_under_its_own_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch)
    engine, mirrors = engine_on(device)
    state = engine.workers[0].sere
    step(mirrors)
    device.busy = True
    state.counters()
    step(mirrors)  # while a copy is under way, whose numbers are old by now
    state.apply(Policy.parse({"buckets": [{"minTokens": 1, "kind": "topk", "S": 1}]}), None, None)
    assert device.waits >= 1
    assert {row.digest: row.calls for row in state.counters()} == {"exact": 4}
