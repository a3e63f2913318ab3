"""Bounds, occupancy and labels of the latency metrics, and what `/metrics` shows for a state."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY
from sere_ext.metrics import Metrics, Occupancy, batch_label, bounds
from sere_ext.policy import Policy

POLICY = Policy.parse({"buckets": [{"minTokens": 4, "maxTokens": 8, "kind": "topk", "S": 2}, {"minTokens": 9, "kind": "exact"}]})


def test_every_slo_limit_is_a_bound() -> None:
    assert {0.0123, 0.02} <= set(bounds("12.3,20"))
    assert bounds("12.3, 20") == tuple(sorted(set(bounds("12.3, 20"))))
    assert bounds("fast,,") == bounds(None)


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
    yield Metrics(SimpleNamespace(policy=POLICY, engine=None))  # type: ignore[arg-type]
    for collector in set(REGISTRY._collector_to_names) - before:
        REGISTRY.unregister(collector)


def value(name: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, labels)


def state(calls: int, source: str = "http", switches: int = 1) -> dict[str, Any]:
    row = {"calls": calls, "tokens": 0, "activeBefore": 12 * calls, "activeAfter": 6 * calls, "slots": 64 * calls,
           "rerouted": 16 * calls, "merged": 0}  # fmt: skip
    return {"policyDigest": POLICY.digest, "source": source, "generation": 3, "switches": switches,
            "counters": {f"{POLICY.digest}|4-8": row}}  # fmt: skip


def test_a_state_becomes_gauges_and_growing_counters(metrics: Metrics) -> None:
    metrics.publish(state(10))
    metrics.publish(state(15, source="file", switches=2))
    assert value("sere_policy_info", digest=POLICY.digest, source="http") == 0
    assert value("sere_policy_info", digest=POLICY.digest, source="file") == 1
    assert value("sere_policy_generation") == 3
    assert value("sere_policy_switches_total") == 2
    assert value("sere_active_experts", stage="before", bucket="4-8") == 12
    assert value("sere_active_experts", stage="after", bucket="4-8") == 6
    assert value("sere_slots_total", bucket="4-8") == 64 * 15
    assert value("sere_rerouted_slots_total", bucket="4-8") == 16 * 15


def finished(tokens: int, decode: float, e2e: float) -> Any:
    return SimpleNamespace(num_generation_tokens=tokens, decode_time=decode, e2e_latency=e2e)


def test_latency_is_labelled_by_policy_and_bucket_and_a_switch_makes_it_mixed(metrics: Metrics) -> None:
    metrics._since = 100.0
    metrics._occupancy.record(100.0, 6)
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
