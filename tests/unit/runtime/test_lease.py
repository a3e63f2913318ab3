"""The Lease: a leader has stopped to write before another may begin, also by how its times are set."""

from __future__ import annotations

from typing import Any, cast

import pytest

from sere_operator.runtime import lease as module
from sere_operator.runtime.client import Client
from sere_operator.runtime.lease import Elector, LeaseSettings
from sere_operator.runtime.settings import Settings


class Server:
    """One Lease, with the API server's guard against writes to an older version."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.version = 0

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        return None if self.lease is None else {**self.lease, "spec": dict(self.lease["spec"])}

    async def create(self, body: dict[str, Any]) -> None:
        assert self.lease is None
        await self.replace({**body, "metadata": {**body["metadata"], "resourceVersion": "0"}})

    async def replace(self, body: dict[str, Any]) -> None:
        assert body["metadata"]["resourceVersion"] == str(self.version)
        self.version += 1
        self.lease = {**body, "metadata": {**body["metadata"], "resourceVersion": str(self.version)}}


@pytest.mark.parametrize("lease_s", [3.0, 12.0, 15.0, 60.0])
def test_the_deadline_is_shorter_than_the_lease_by_a_whole_retry(lease_s: float) -> None:
    """Equal, and a leader whose last renewal is just in time writes beside its successor."""
    settings = LeaseSettings.of("ns", "l", lease_s)
    assert settings.renew_deadline_s + settings.retry_s < settings.lease_s
    assert settings.renew_deadline_s / settings.retry_s >= 2, "one lost request does not lose the Lease"


@pytest.mark.parametrize(("deadline", "retry"), [(15.0, 2.0), (16.0, 2.0), (3.0, 2.0)])
def test_times_by_which_two_could_lead_are_refused(deadline: float, retry: float) -> None:
    with pytest.raises(ValueError, match="a deadline shorter than itself"):
        LeaseSettings("ns", "l", 15.0, deadline, retry)


async def test_nobody_may_begin_before_the_leader_has_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes on one clock, the leader cut off at its last renewal: never both, at any tenth of a second."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    server, settings = Server(), LeaseSettings.of("ns", "l", 15.0)
    leader, other = (Elector(cast("Client", server), settings, name) for name in ("a", "b"))
    assert await leader._try()
    gap = 0
    while not await other._try():
        assert not other.leads
        gap += not leader.leads
        now[0] += 0.1
    assert other.leads and not leader.leads
    assert gap >= 40, "about five seconds in which nobody writes"


@pytest.mark.parametrize("value", ["soon", "nan", "inf", "1"])
def test_a_setting_that_cannot_be_is_refused_by_its_name(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("SERE_LEASE_S", value)
    with pytest.raises(ValueError, match=r"SERE_LEASE_S is .* give a number of 2 or more"):
        Settings.from_environment()
