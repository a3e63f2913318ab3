"""What the wraps around a worker's steps count: the real rows of each step, and the steps that no router was asked in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sere_ext.contract.policy import Policy
from sere_ext.contract.state import OTHER, CounterRow, by_key
from sere_ext.control.live import LiveControl
from sere_ext.engine import worker as worker_module
from sere_ext.engine.settings import resolve
from sere_ext.engine.worker import SereWorker
from sere_ext.routing import kernel, ops
from sere_ext.routing.state import LayerState, WorkerState

KEY = {"modelName": "m", "configDigest": "c", "engineVersion": "0.32.0", "pluginVersion": "0.1.0", "device": "cpu"}
PADDED = 8  # rows of every step: as in a captured graph, real tokens come first and padding behind them
DECODE = Policy.parse({"buckets": [{"minTokens": 1, "maxTokens": 4, "kind": "topk", "S": 1}]})
LAYERS = 2


class Worker:
    """vLLM's worker with a model of two MoE layers, whose routers are the real operator. `asked` is how many of them are asked."""

    rank = 0

    def __init__(self) -> None:
        self.asked = LAYERS

    def load_model(self) -> None: ...
    def compile_or_warm_up_model(self) -> None: ...

    def execute_model(self, scheduler_output: Any) -> str:
        if scheduler_output.total_num_scheduled_tokens:
            self._forward()
        return "output"

    def execute_dummy_batch(self) -> str:
        self._forward()
        return "dummy"

    def _forward(self) -> None:
        for layer in self.sere.layers[: self.asked]:
            ids = torch.tensor([[1, 2]] * PADDED)
            torch.ops.sere.reroute(torch.full((PADDED, 2), 0.5), ids, torch.zeros(PADDED, 8), layer.slot)

    sere: WorkerState


@pytest.fixture
def worker() -> Any:
    """A worker as `patch_worker_base` leaves it, after its model was loaded and proven."""
    config = SimpleNamespace(
        additional_config={"sere": {}}, device_config=SimpleNamespace(device_type="cpu"), kernel_config=None, lora_config=None,
        parallel_config=SimpleNamespace(pipeline_parallel_size=1), model_config=SimpleNamespace(),
    )  # fmt: skip
    made = Worker()
    settings = resolve(config.additional_config)
    assert settings is not None
    worker_module._attach(made, config, settings)
    layers = [LayerState(number, 8, 2, True, kernel.SOFTMAX) for number in (3, 7)]
    ops.bind(layers)
    made.sere = WorkerState(layers, KEY)
    made.sere.apply(DECODE, 0, None)
    return made


def step(tokens: int) -> Any:
    return SimpleNamespace(total_num_scheduled_tokens=tokens)


def rows(worker: Any) -> dict[str, CounterRow]:
    """Counters by bucket."""
    return {bucket: row for (_, _, bucket), row in by_key(worker.sere.counters()).items()}


async def error(worker: Any) -> str | None:
    """The error in `GET /sere` of an engine of this one rank."""

    async def collective_rpc(method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        return [getattr(SereWorker, method)(worker, *args)]

    return (await LiveControl(SimpleNamespace(collective_rpc=collective_rpc), None).state()).error


def test_a_step_has_as_many_real_rows_as_tokens_were_scheduled_and_a_dummy_batch_has_none(worker: Any) -> None:
    assert worker.execute_model(step(3)) == "output"
    assert worker.execute_dummy_batch() == "dummy"
    assert worker.execute_model(step(6)) == "output"
    counted = rows(worker)
    assert set(counted) == {"1-4", OTHER}
    assert (counted["1-4"].calls, counted["1-4"].tokens, counted["1-4"].slots) == (LAYERS, LAYERS * 3, LAYERS * 3 * 2)
    assert (counted[OTHER].calls, counted[OTHER].tokens) == (2 * LAYERS, LAYERS * (0 + 6))


async def test_a_decode_step_in_which_no_router_was_asked_is_an_error_of_the_engine(worker: Any) -> None:
    for _ in range(3):
        worker.execute_model(step(2))
    assert await error(worker) is None
    worker.asked = 0
    worker.execute_model(step(2))
    assert await error(worker) == (
        "Bypassed: all MoE layers routed some steps by themselves, exactly, so no policy holds for those steps; "
        "start with `--enforce-eager`, or serve without sere"
    )
    worker.asked = LAYERS
    worker.execute_model(step(2))
    assert "Bypassed: all MoE layers" in str(await error(worker)), "what was served is not mended by later steps"


async def test_dummy_batches_do_not_hide_that_the_routers_were_not_asked(worker: Any) -> None:
    """Idle data-parallel ranks run many of them, and each asks every router."""
    for _ in range(50):
        worker.execute_dummy_batch()
    worker.asked = 0
    worker.execute_model(step(2))
    assert "Bypassed: all MoE layers" in str(await error(worker))


async def test_a_step_in_which_one_router_was_not_asked_names_its_layer(worker: Any) -> None:
    worker.asked = 1
    worker.execute_model(step(2))
    assert "Bypassed: layers [7] routed" in str(await error(worker))


@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([], id="idle from the start"),
        pytest.param([0, 0], id="steps without tokens, in which the model does not run"),
        pytest.param([6, 6], id="prompts alone, outside every bucket"),
        pytest.param([6, 2, 2, 0, None, None], id="a request, then an idle data-parallel rank"),
        pytest.param([None] * 9, id="a data-parallel rank without a request"),
    ],
)
async def test_what_asks_its_routers_or_runs_no_model_is_no_error(worker: Any, steps: list[int | None]) -> None:
    for tokens in steps:
        if tokens is None:
            worker.execute_dummy_batch()
        else:
            worker.execute_model(step(tokens))
        assert await error(worker) is None


async def test_a_state_that_is_read_while_a_step_runs_is_no_error(worker: Any) -> None:
    """A Ray actor may answer beside its steps."""
    seen = []
    forward = worker._forward

    def read_then_forward() -> None:
        worker.sere.counters()
        seen.append(worker.sere.bypassed())
        forward()

    worker._forward = read_then_forward
    for _ in range(2):
        worker.execute_model(step(2))
    assert seen == [None, None]
    assert await error(worker) is None


async def test_a_change_of_policy_between_steps_is_no_error(worker: Any) -> None:
    worker.execute_model(step(2))
    worker.sere.apply(Policy(), None, None)
    worker.execute_model(step(2))
    assert await error(worker) is None
