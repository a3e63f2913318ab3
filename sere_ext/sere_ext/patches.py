"""Ledger of every vLLM symbol that the plug-in changes or leans on: why, in which versions, and how it could go away.

`tests/engine/test_patches.py` asserts that each still exists in the installed vLLM, so that an upgrade fails there and
not in a running engine.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Literal

SUPPORTED = ">=0.26,<0.34"  # CUDA; the CPU engine routes outside its kernel from 0.32
CPU_SINCE = (0, 32)
SINCE, BEFORE = (0, 26), (0, 34)


@dataclass(frozen=True)
class Touched:
    """One symbol: `module:qualified.name`."""

    symbol: str
    how: Literal["patched", "wrapped", "read", "called"]
    why: str
    versions: str
    exit: str

    def resolve(self) -> object:
        """The object; raises ImportError or AttributeError if the installed vLLM has it no more."""
        module, _, name = self.symbol.partition(":")
        target: object = importlib.import_module(module)
        for part in name.split("."):
            target = getattr(target, part)
        return target


_MOE = "vllm.model_executor.layers.fused_moe"
LEDGER = (
    Touched(
        "vllm.v1.worker.worker_base:WorkerBase.__init__", "patched",
        "every worker passes here after plug-ins are loaded and before its model is; worker_extension_cls is the user's",
        "0.26-0.33", "a worker life-cycle hook in vllm.general_plugins",
    ),
    Touched(
        f"{_MOE}.router.base_router:BaseRouter._compute_routing", "wrapped",
        "logical ids and final weights of every router, before expert load balancing",
        "0.26-0.33", "out-of-tree routers (vLLM RFC 51005)",
    ),
    Touched(
        f"{_MOE}.runner.moe_runner:MoERunner.is_monolithic", "read",
        "kernels that route inside themselves never ask the router", "0.26-0.33", "a public capability flag",
    ),
    Touched(f"{_MOE}.runner.moe_runner:MoERunner.layer_id", "read", "the model's layer number", "0.32-0.33", "none needed"),
    Touched(
        f"{_MOE}.experts.cpu_moe:CPUUnquantizedExperts.apply", "wrapped",
        "the CPU kernel computes slots of weight 0 too; passing only the columns in use saves that", "0.32-0.33",
        "a kernel that skips slots of weight 0",
    ),
    Touched("vllm._custom_ops:cpu_fused_moe", "called", "the kernel itself, on fewer columns", "0.32-0.33", "as above"),
    Touched("vllm.forward_context:get_forward_context", "called", "is_padding of the running step", "0.32-0.33", "none needed"),
    Touched("vllm.plugins.endpoint_plugins.interface:EndpointPlugin", "read", "interface of routes", "0.32-0.33", "none needed"),
    Touched(
        "vllm.v1.engine.async_llm:AsyncLLM.collective_rpc", "called", "switches all ranks between two steps", "0.26-0.33", "none needed",
    ),
    Touched(
        "vllm.v1.engine.core_client:AsyncMPClient.call_utility_all_async", "called",
        "collective_rpc hands back what the first data-parallel engine answers; a change is read back from all", "0.32-0.33",
        "a collective_rpc that answers for all engines",
    ),
    Touched(
        "vllm.v1.engine.async_llm:AsyncLLM.pause_generation", "called",
        "clean switches: drain and drop the prefix cache; data-parallel engines: held for a change", "0.26-0.33", "none needed",
    ),
    Touched(
        "vllm.v1.metrics.loggers:StatLoggerBase.record", "called", "finished requests, for TPOT and TTFT by policy",
        "0.26-0.33", "none needed",
    ),
)  # fmt: skip
