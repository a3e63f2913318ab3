"""Bounds, occupancy and labels of the latency metrics, and what `/metrics` shows for a state."""

from __future__ import annotations

import asyncio
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY

from sere_ext.contract.policy import Policy
from sere_ext.contract.slo import LatencyLimits, LatencySlo
from sere_ext.contract.state import COUNTED, CounterRow, EngineState
from sere_ext.control import metrics as metrics_module
from sere_ext.control.metrics import Metrics, Occupancy, batch_label, bounds
from tests.kit.states import engine_state

POLICY = Policy.parse({"buckets": [{"minTokens": 4, "maxTokens": 8, "kind": "topk", "S": 2}, {"minTokens": 9, "kind": "exact"}]})


def test_every_slo_limit_is_a_bound() -> None:
    found = bounds(LatencyLimits(p95=12.3, p99=20))
    assert {0.0123, 0.02} <= set(found)
    assert list(found) == sorted(set(found))
    assert bounds(None) == tuple(sorted(set(found) - {0.0123}))


def test_a_changed_slo_gives_new_bounds_to_a_running_engine_and_the_same_one_keeps_the_counts(metrics: Metrics) -> None:
    def bounds_of(name: str) -> set[str]:
        samples = [one for family in REGISTRY.collect() if family.name == name for one in family.samples]
        return {one.labels["le"] for one in samples if "le" in one.labels}

    metrics._since = 0.0
    metrics.observe(1e9, finished(tokens=2, decode=0.1, e2e=0.2))
    assert "0.0123" not in bounds_of("sere_tpot_seconds")
    metrics._control.slo = LatencySlo(tpot_ms=LatencyLimits(p95=12.3), ttft_ms=LatencyLimits(p99=450))
    metrics.bound()
    for _ in range(2):
        metrics.observe(1e9, finished(tokens=2, decode=0.1, e2e=0.2))
        metrics.bound()
    assert ("0.0123" in bounds_of("sere_tpot_seconds"), "0.45" in bounds_of("sere_ttft_seconds")) == (True, True)
    labels = {"policy": POLICY.digest, "bucket": "1"}
    assert value("sere_tpot_seconds_count", **labels) == value("sere_ttft_seconds_count", **labels) == 2
    metrics._control.slo = None
    metrics.bound()
    assert value("sere_tpot_seconds_count", **labels) is None


def test_occupancy_is_the_time_weighted_mean() -> None:
    running = Occupancy()
    assert running.mean(0, 1) == 0
    for now, n in ((10.0, 2), (12.0, 6), (13.0, 0)):
        running.record(now, n)
    assert running.mean(10, 12) == pytest.approx(2)
    assert running.mean(10, 13) == pytest.approx(10 / 3)
    assert running.mean(11, 12.5) == pytest.approx((2 + 3) / 1.5)
    assert running.mean(12, 14) == pytest.approx(3)
    assert running.mean(14, 14) == 0


def test_batches_are_classed_by_powers_of_two_whatever_the_policy() -> None:
    labels = [batch_label(n) for n in (0, 1, 1.6, 3.4, 3.6, 7.4, 8, 15.4, 500)]
    assert labels == ["1", "1", "2-3", "2-3", "4-7", "4-7", "8-15", "8-15", "256-511"]


@pytest.fixture
def metrics() -> Any:
    before = set(REGISTRY._collector_to_names)
    yield Metrics(SimpleNamespace(policy=POLICY, engine=None, refusals=Counter(), slo=None))  # type: ignore[arg-type]
    for collector in set(REGISTRY._collector_to_names) - before:
        REGISTRY.unregister(collector)


def value(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, labels)


KEY = {"modelName": "m", "configDigest": "c", "engineVersion": "0.32.0", "pluginVersion": "0.1.0", "device": "cpu"}
ROW = CounterRow(digest=POLICY.digest, bucket="4-8", calls=1, active_before=12, active_after=6, slots=64, rerouted=16, merged=4)


def state(calls: int, digest: str = POLICY.digest, **fields: Any) -> EngineState:
    row = ROW.model_copy(update={name: getattr(ROW, name) * calls for name in COUNTED})
    return engine_state(digest, KEY, **{"source": "http", "generation": 3, "switches": 1, "counters": (row,)} | fields)


def test_a_state_becomes_gauges_and_growing_counters(metrics: Metrics) -> None:
    metrics.publish(state(10))
    metrics.publish(state(15, source="file", switches=2))
    assert value("sere_policy_info", digest=POLICY.digest, source="http") is None
    assert value("sere_policy_info", digest=POLICY.digest, source="file") == 1
    assert value("sere_policy_generation") == 3
    assert value("sere_policy_switches_total") == 2
    where = {"layers": "all", "bucket": "4-8"}
    assert value("sere_active_experts", stage="before", **where) == 12
    assert value("sere_active_experts", stage="after", **where) == 6
    assert value("sere_router_calls_total", **where) == 15
    assert value("sere_slots_total", **where) == 64 * 15
    assert value("sere_rerouted_slots_total", **where) == 16 * 15
    assert value("sere_merged_slots_total", **where) == 4 * 15


def test_layer_groups_are_counted_apart(metrics: Metrics) -> None:
    group = ROW.model_copy(update={"layers": "1-3", "bucket": "8-64"})
    metrics.publish(state(1, counters=(group, group.model_copy(update={"layers": "rest", "rerouted": 0}))))
    assert value("sere_rerouted_slots_total", layers="1-3", bucket="8-64") == 16
    assert value("sere_rerouted_slots_total", layers="rest", bucket="8-64") == 0
    assert value("sere_active_experts", stage="after", layers="1-3", bucket="8-64") == 6


def test_a_new_policy_leaves_no_gauge_of_the_old_ones_buckets(metrics: Metrics) -> None:
    metrics.publish(state(10))
    old = state(12).counters  # the last steps under the old policy, seen after the switch
    now = ROW.model_copy(update={"digest": "exact", "bucket": "other"})
    metrics.publish(state(0, "exact", switches=2, counters=(*old, now)))
    assert value("sere_active_experts", stage="after", layers="all", bucket="4-8") is None
    assert value("sere_active_experts", stage="after", layers="all", bucket="other") == 6
    assert value("sere_slots_total", layers="all", bucket="4-8") == 64 * 12


def test_errors_and_refusals_are_counted(metrics: Metrics) -> None:
    metrics.publish(state(1, error="the file is truncated"))
    assert value("sere_policy_error") == 1
    metrics._control.refusals["http", "PolicyError"] += 2
    metrics.publish(state(1))
    metrics.publish(state(1))
    assert value("sere_policy_error") == 0
    assert value("sere_policy_refusals_total", source="http", type="PolicyError") == 2


def test_counters_that_the_worker_dropped_and_began_anew_never_go_back(metrics: Metrics) -> None:
    metrics.publish(state(10))
    metrics.publish(state(3))
    assert value("sere_router_calls_total", layers="all", bucket="4-8") == 13


async def test_an_idle_engine_is_asked_once_for_a_change_of_policy(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question keeps the engine's workers spinning on their cores for a second."""
    asked = []
    polls = 0
    bound = metrics.bound

    async def state() -> EngineState:
        asked.append(metrics._control.policy.digest)
        return engine_state(metrics._control.policy.digest, KEY)

    def count() -> None:  # stands at the head of every poll
        nonlocal polls
        polls += 1
        bound()

    async def pass_by(number: int) -> None:
        until = polls + number
        while polls < until:
            assert not polling.done()
            await asyncio.sleep(0.001)

    monkeypatch.setattr(metrics_module, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(metrics_module, "IDLE_POLLS", 1_000_000)
    monkeypatch.setattr(metrics, "bound", count)
    metrics._control.state = state  # type: ignore[method-assign]
    polling = asyncio.create_task(metrics.run())
    await pass_by(10)
    metrics._control.policy = Policy()
    await pass_by(10)
    polling.cancel()
    assert asked == [POLICY.digest, "exact"]


def test_latencies_of_the_policies_used_last_are_kept_and_no_more(metrics: Metrics, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sere_ext.control.metrics.MAX_POLICIES", 3)
    for number in (1, 2, 3, 1, 4, 5):
        metrics._latency(metrics._tpot, f"sere-{number}", "1").observe(1)
    kept = [n for n in range(1, 6) if value("sere_tpot_seconds_count", policy=f"sere-{n}", bucket="1") is not None]
    assert kept == [1, 4, 5]


def test_each_engine_has_its_own_batch_size(metrics: Metrics) -> None:
    stats = SimpleNamespace(num_running_reqs=9)
    metrics.record(stats, None, 0)
    metrics.record(SimpleNamespace(num_running_reqs=1), None, 1)
    metrics._since = 0.0
    metrics.observe(1e9, finished(tokens=2, decode=0.1, e2e=0.2), 0)
    metrics.observe(1e9, finished(tokens=2, decode=0.1, e2e=0.2), 1)
    assert value("sere_tpot_seconds_count", policy=POLICY.digest, bucket="8-15") == 1
    assert value("sere_tpot_seconds_count", policy=POLICY.digest, bucket="1") == 1


def finished(tokens: int, decode: float, e2e: float) -> Any:
    return SimpleNamespace(num_generation_tokens=tokens, decode_time=decode, e2e_latency=e2e)


def test_latency_is_labelled_by_policy_and_bucket_and_a_switch_makes_it_mixed(metrics: Metrics) -> None:
    metrics._since = 100.0
    metrics._occupancy[0].record(100.0, 6)
    metrics.observe(103.0, finished(tokens=11, decode=1.0, e2e=1.5))
    labels = {"policy": POLICY.digest, "bucket": "4-7"}
    assert value("sere_tpot_seconds_sum", **labels) == pytest.approx(0.1)
    assert value("sere_ttft_seconds_sum", **labels) == pytest.approx(0.5)
    metrics.observe(103.0, finished(tokens=11, decode=4.0, e2e=4.5))
    assert value("sere_tpot_seconds_count", policy="mixed", bucket="4-7") == 1
    assert value("sere_tpot_seconds_count", **labels) == 1
    metrics.observe(103.0, finished(tokens=1, decode=0.0, e2e=0.2))
    assert value("sere_tpot_seconds_count", **labels) == 1, "one token has no time per further token"
    assert value("sere_ttft_seconds_count", **labels) == 2
