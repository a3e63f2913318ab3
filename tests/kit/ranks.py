"""Engines without a model: the real worker state of a few ranks behind the calls that vLLM's `AsyncLLM` answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from sere_ext.contract.policy import Policy
from sere_ext.engine.worker import SereWorker
from sere_ext.routing.state import LayerState, WorkerState


class Engine:
    """Two ranks with one MoE layer (0) of four experts, top-2."""

    errored = False  # whether the engine died

    def __init__(self) -> None:
        def layer() -> LayerState:
            return LayerState(number=0, experts=4, top_k=2, renormalise=True, scoring=0)

        key = {"modelName": "m", "configDigest": "c", "engineVersion": "0.32.0", "pluginVersion": "0.1.0", "device": "cpu"}
        self.workers = [SimpleNamespace(rank=rank, sere=WorkerState([layer()], key)) for rank in (0, 1)]
        for worker in self.workers:
            worker.sere.apply(Policy(), 0, None)
        self.calls: list[str] = []

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        self.calls.append(method)
        return [getattr(SereWorker, method)(worker, *args) for worker in self.workers]

    async def pause_generation(self, *, mode: str, clear_cache: bool) -> None:
        self.calls.append(f"pause {mode} {clear_cache}")

    async def resume_generation(self) -> None:
        self.calls.append("resume")

    async def reset_prefix_cache(self) -> bool:
        self.calls.append("reset")
        return True


class Engines(Engine):
    """Two data-parallel engines of two ranks; `collective_rpc` answers for the first alone, as in vLLM."""

    def __init__(self, **parallel: Any) -> None:
        super().__init__()
        self.groups = [self.workers, Engine().workers]
        fields = {"data_parallel_external_lb": False, "data_parallel_hybrid_lb": False, "_api_process_count": 1}
        self.vllm_config = SimpleNamespace(parallel_config=SimpleNamespace(data_parallel_size=2, **fields | parallel))
        self.engine_core = SimpleNamespace(call_utility_all_async=self.all)

    async def all(self, utility: str, method: str, seconds: None, args: tuple[Any, ...], kwargs: None) -> list[list[Any]]:
        assert utility == "collective_rpc"
        self.calls.append(method)
        return [[getattr(SereWorker, method)(worker, *args) for worker in group] for group in self.groups]
