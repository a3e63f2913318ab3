"""A layer that is not re-routed is found before the engine serves, and while it does."""

from __future__ import annotations

import pytest

from sere_ext.contract.policy import Policy
from sere_ext.engine.proof import missing
from sere_ext.routing import kernel, ops
from sere_ext.routing.state import LayerState, WorkerState


@pytest.mark.parametrize(
    ("calls", "captured", "due", "says"),
    [
        ([0, 0], {}, True, "no router was asked in the profile run"),
        ([2, 0], {}, False, r"the routers of layers \[7\] were never asked"),
        ([2, 2], {1: [1, 1], 16: [0, 1]}, True, r"the graph for 16 rows was captured without the routers of layers \[3\]"),
        ([2, 2], {1: [1, 1], 16: [2, 1]}, True, None),
        ([0, 0], {}, False, None),
    ],
)
def test_every_layer_must_be_asked_in_the_profile_run_and_in_every_graph(
    calls: list[int], captured: dict[int, list[int]], due: bool, says: str | None
) -> None:
    why = missing([3, 7], calls, captured, due=due)
    assert (why is None) == (says is None)
    if says is not None:
        with pytest.raises(ValueError, match=says):
            raise ValueError(why)


def test_calls_of_a_capture_are_told_by_rows_and_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [LayerState(number, 8, 2, True, None) for number in (3, 7)]
    first = ops.bind(layers)
    monkeypatch.setattr(ops, "_captured", {(16, first): 1, (16, first + 1): 1, (1, first + 1): 2})
    assert ops.captured(layers) == {1: [0, 2], 16: [1, 1]}


def test_a_layer_that_is_passed_by_while_the_engine_serves_is_an_error_of_its_state() -> None:
    layers = [LayerState(number, 8, 2, True, None) for number in (3, 7)]
    state = WorkerState(layers, {})
    for layer in layers:
        layer.counters[-1, kernel.CALLS] = 5
    state.counters()
    assert state.bypassed() is None
    state.apply(Policy.parse({"buckets": [{"minTokens": 1, "kind": "topk", "S": 1}]}), None, None)
    layers[0].counters[0, kernel.CALLS] = 1
    state.counters()
    assert "Bypassed: layers [7]" in str(state.bypassed())
