"""Reading what engines say: metrics."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from sere_ext.contract.profile import GoldenPrompt
from sere_operator.runtime.golden import request_of, text_of
from sere_operator.runtime.probe import parse_metrics


def test_metrics_as_the_plug_in_writes_them() -> None:
    registry = CollectorRegistry()
    tpot = Histogram("sere_tpot_seconds", "x", ["policy", "bucket"], buckets=(0.01, 0.02, 0.05), registry=registry)
    Histogram("vllm:time_to_first_token_seconds", "x", registry=registry).observe(1)
    for value in (0.005, 0.015, 0.02, 0.03):
        tpot.labels("sere-1", "8-64").observe(value)
    tpot.labels("exact", "other").observe(0.1)
    found = parse_metrics(generate_latest(registry).decode(), {"20"})
    assert set(found.tpot) == {("sere-1", "8-64"), ("exact", "other")}
    histogram = found.tpot["sere-1", "8-64"]
    assert (histogram.count, histogram.over) == (4, {"20": 1})
    assert histogram.total_s == pytest.approx(0.07)
    # Two in (10, 20] ms, one in (0, 10], one in (20, 50]: middles of 5, 15, 15 and 35 ms.
    assert histogram.moments is not None
    assert histogram.moments[0] == pytest.approx(0.070)
    assert found.tpot["exact", "other"].over == {"20": 1}
    assert found.ttft == {}


def test_a_golden_prompt_is_asked_as_the_tuner_asked_it() -> None:
    plain = GoldenPrompt(prompt="1+1=", answer="2", max_tokens=4, stop=("\n",))
    assert request_of("m", plain) == (
        "/v1/completions",
        {"model": "m", "prompt": "1+1=", "max_tokens": 4, "temperature": 0, "stop": ["\n"]},
    )
    messages = [{"role": "user", "content": "1+1="}]
    path, body = request_of("m", GoldenPrompt.model_validate({**plain.to_json_dict(), "messages": messages}))
    assert (path, body["messages"]) == ("/v1/chat/completions", messages) and "prompt" not in body
    assert text_of({"choices": [{"text": "2"}]}) == text_of({"choices": [{"message": {"content": "2"}}]}) == "2"
