"""A watch that died without an error shows by comparison with a list, and fails the liveness probe."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sere_operator.runtime import health, main
from sere_operator.runtime.echoes import Echoes
from sere_operator.runtime.handlers import Wakes
from sere_operator.runtime.health import STALE_WATCH_S, Health
from sere_operator.runtime.reconciler import Key, Place, Reconciler
from sere_operator.runtime.settings import Settings


async def nothing(key: Key, place: Place) -> float | None:
    return None


def resource(version: str, name: str = "m") -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "ns", "uid": f"u-{name}", "resourceVersion": version}}


class Operator:
    """What `_check_watch` needs of one: its lists, its watch, and what it wakes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        for module in (main, health):
            monkeypatch.setattr(module.time, "monotonic", lambda: self.now)
        self.listed: list[dict[str, Any]] = []
        self.settings = Settings(namespaces=("ns",), resync_s=0.0)
        self.reconciler = Reconciler(nothing)
        self.wakes = Wakes(self.reconciler, Reconciler(nothing), Echoes())
        self.health = Health(self.reconciler, ())
        self.client = SimpleNamespace(list=self._list)
        self.suspects: dict[str, tuple[str, float]] = {}

    async def _list(self, kind: str, namespace: str) -> list[dict[str, Any]]:
        return self.listed if kind == "SereDeployment" else []

    async def check(self) -> None:
        self.suspects = await main.Operator._check_watch(self, self.suspects)  # type: ignore[arg-type]
        self.now += 30

    def shown(self, version: str) -> None:
        """An event of the watch."""
        self.wakes.resource("SereDeployment", resource(version), gone=False)


async def test_a_watch_that_shows_nothing_any_more_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = Operator(monkeypatch)
    operator.shown("1")
    operator.listed = [resource("1")]
    await operator.check()
    assert operator.health.healthy and operator.health.blind_s() == 0
    operator.listed = [resource("2")]
    await operator.check()
    assert operator.health.blind_s() == 0, "the event may be on its way"
    await operator.check()
    assert operator.health.healthy and operator.health.blind_s() > 0
    operator.now += STALE_WATCH_S
    assert not operator.health.healthy
    operator.shown("2")
    await operator.check()
    assert operator.health.healthy and operator.health.blind_since is None


async def test_a_watch_that_is_only_late_is_no_blind_one(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = Operator(monkeypatch)
    for version in range(1, 8):
        operator.listed = [resource(str(version + 1))]  # always one ahead of what was shown
        operator.shown(str(version))
        await operator.check()
    assert operator.health.blind_s() == 0


async def test_a_resource_that_was_never_shown_counts_and_everything_listed_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    operator = Operator(monkeypatch)
    operator.listed = [resource("1"), resource("1", "other")]
    await operator.check()
    assert {key[2] for key in operator.reconciler.entries} == {"m", "other"}
    await operator.check()
    assert operator.health.blind_s() > 0
    operator.listed = []  # deleted meanwhile
    await operator.check()
    assert operator.health.blind_since is None
