"""Ledger of every vLLM symbol that the plug-in changes or leans on: why, in which versions, and how it could go away.

Two tests hold it: `tests/unit/ext/test_vllm_snapshots.py` against committed snapshots of these symbols in every supported
release (`make vllm-snapshots` takes them from the wheels), and `tests/engine/test_patches.py` against the installed vLLM.
So an upgrade fails there and not in a running engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sere_ext.engine.backends import DISPATCH, EXPERTS, MAPPINGS

SUPPORTED = ">=0.26,<0.34"  # CUDA; the CPU engine routes outside its kernel from 0.32
CPU_SINCE = (0, 32)
SINCE, BEFORE = (0, 26), (0, 34)


@dataclass(frozen=True)
class Touched:
    """One symbol: `module:qualified.name`, a function, method, class or property.

    `needs` are fragments of its source (as `ast.unparse` writes it, docstrings left out; of a class only its own fields)
    that we rely on. `versions` are the first and last supported release in which it stands with all of them.
    """

    symbol: str
    how: Literal["patched", "wrapped", "read", "called"]
    why: str
    versions: str
    exit: str
    needs: tuple[str, ...] = ()

    @property
    def span(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """First and last release of `versions` as (major, minor)."""
        first, last = (tuple(map(int, release.split("."))) for release in self.versions.split("-"))
        return (first[0], first[1]), (last[0], last[1])


_MOE = "vllm.model_executor.layers.fused_moe"
_WORKER = "vllm.v1.worker.worker_base:WorkerBase"
_ENGINE = "vllm.v1.engine.async_llm:AsyncLLM"
_ALL, _CPU = "0.26-0.33", "0.32-0.33"
_HOOK = "a worker life-cycle hook in vllm.general_plugins"
_GRAPHS = "a public list of the sizes that a runner captures"
_ROUTERS = "out-of-tree routers (vLLM RFC 51005)"
LEDGER = (
    Touched(
        f"{_WORKER}.__init__", "patched",
        "every worker passes here after plug-ins are loaded and before its model is; worker_extension_cls is the user's",
        _ALL, _HOOK, ("self.vllm_config = vllm_config", "self.rank = rank"),
    ),
    Touched(f"{_WORKER}.load_model", "wrapped", "the seam is installed once weights and kernels are final", _ALL, _HOOK),
    Touched(f"{_WORKER}.compile_or_warm_up_model", "wrapped", "after it, every router must have been asked", _ALL, _HOOK),
    Touched(f"{_WORKER}.get_model", "called", "the module whose routers are wrapped", _ALL, _HOOK),
    Touched(
        f"{_MOE}.router.base_router:BaseRouter._compute_routing", "wrapped",
        "logical ids and final weights of every router, before expert load balancing", _ALL, _ROUTERS,
        ("(self, hidden_states: torch.Tensor, router_logits: torch.Tensor, indices_type: torch.dtype | None, *, "
         "input_ids: torch.Tensor | None=None) -> tuple[torch.Tensor, torch.Tensor]",),
    ),
    Touched(
        f"{_MOE}.router.base_router:BaseRouter._select_experts", "read",
        "asks the wrapped method, and maps logical ids to physical ones after it", _ALL, _ROUTERS,
        ("topk_weights, topk_ids = self._compute_routing(hidden_states, router_logits, topk_indices_dtype, input_ids=input_ids)",
         "topk_ids = self._apply_eplb_mapping(topk_ids)"),
    ),
    Touched(
        f"{_MOE}.router.base_router:BaseRouter.set_capture_fn", "called",
        "fused decode steps of a model's own yield to it, and are then routed by the router", _ALL, _ROUTERS,
        ("self.capture_fn = capture_fn",),
    ),
    Touched(
        f"{_MOE}.router.base_router:BaseRouter.__init__", "read", "slots per token", _ALL, _ROUTERS, ("self.top_k = top_k",),
    ),
    Touched(
        f"{_MOE}.router.fused_topk_router:FusedTopKRouter.__init__", "read",
        "how scores become weights, for the rival policies; so in the next three", _ALL, _ROUTERS,
        ("self.renormalize = renormalize", "self.scoring_func = scoring_func"),
    ),
    Touched(
        f"{_MOE}.router.grouped_topk_router:GroupedTopKRouter.__init__", "read", "as above", _ALL, _ROUTERS,
        ("self.renormalize = renormalize", "self.scoring_func = scoring_func"),
    ),
    Touched(
        f"{_MOE}.router.fused_topk_bias_router:FusedTopKBiasRouter.__init__", "read", "as above", _ALL, _ROUTERS,
        ("self.renormalize = renormalize", "self.scoring_func = scoring_func"),
    ),
    Touched(
        f"{_MOE}.router.custom_routing_router:CustomRoutingRouter.__init__", "read", "as above", _ALL, _ROUTERS,
        ("self.renormalize = renormalize", "self.custom_routing_function = custom_routing_function"),
    ),
    Touched(
        f"{_MOE}.router.zero_expert_router:ZeroExpertRouter", "read", "refused by name", _ALL, "none needed",
    ),
    Touched(
        f"{_MOE}.runner.moe_runner:MoERunner.do_naive_dispatch_combine", "read",
        "rows of all ranks are gathered before they are routed: refused", _ALL, "vLLM means to remove it",
    ),
    Touched(
        f"{_MOE}.router.cpu_router:CPURouter.__init__", "read", "how scores become weights, for the rival policies", _CPU,
        _ROUTERS, ("self.renormalize = renormalize", "self.scoring_func = scoring_func",
                   "self.custom_routing_function = custom_routing_function",
                   "self.e_score_correction_bias = e_score_correction_bias"),
    ),
    Touched(
        f"{_MOE}.runner.moe_runner:MoERunner.__init__", "read", "one per MoE layer: its name, router and sizes", _ALL,
        "none needed", ("self.layer_name = layer_name", "self.router = router", "self.routed_experts = routed_experts",
                        "self.moe_config = moe_config"),
    ),
    Touched(
        f"{_MOE}.expert_substitution:ConstantExpertSubstitution.__init__", "read",
        "which experts a MoNE checkpoint replaced by constants: they cost nothing (`backends.constants_of`)", "0.33-0.33",
        "none needed", ("self.substituted_expert_ids = tuple(sorted(substituted))",),
    ),
    Touched(
        f"{_MOE}.expert_substitution:ConstantExpertSubstitution.transform_routes", "read",
        "gets logical ids from the router; -1 becomes an unused slot of the first expert", "0.33-0.33", "none needed",
        ("topk_weights.masked_fill_(~valid | substituted, 0.0)", "topk_ids.copy_(routes.clamp_min(0).to(topk_ids.dtype))"),
    ),
    Touched(
        f"{_MOE}.expert_substitution:SubstitutedRoutedExperts.__init__", "read", "where the former is found", "0.33-0.33",
        "none needed", ("self.expert_substitution = expert_substitution",),
    ),
    Touched(
        f"{_MOE}.expert_substitution:SubstitutedRoutedExperts.forward_modular", "read",
        "takes constants out behind the router", "0.33-0.33", "none needed",
        ("self.expert_substitution.transform_routes(x, topk_weights, topk_ids)",),
    ),
    Touched(
        f"{_MOE}.fused_moe_method_base:FusedMoEMethodBase.__init__", "read", "the kernel of a layer", _ALL, "none needed",
        ("self.moe_kernel: mk.FusedMoEKernel | None = None",),
    ),
    Touched(
        f"{_MOE}.modular_kernel:FusedMoEKernel.fused_experts", "read", "which experts' class the kernel has, by name", _ALL,
        "none needed",
    ),
    Touched(
        f"{_MOE}.modular_kernel:FusedMoEKernel.prepare_finalize", "read", "how the kernel dispatches tokens, by name", _ALL,
        "none needed",
    ),
    Touched(
        f"{_MOE}.runner.moe_runner:MoERunner._apply_quant_method", "read", "asks the router unless the kernel is monolithic",
        _ALL, _ROUTERS, ("topk_weights, topk_ids = self.router.select_experts(",
                         "if self.routed_experts.quant_method.is_monolithic:"),
    ),
    Touched(
        f"{_MOE}.runner.moe_runner:MoERunner.is_monolithic", "read",
        "kernels that route inside themselves never ask the router", _ALL, "a public capability flag",
    ),
    Touched(
        f"{_MOE}.router.fused_moe_router:FusedMoERouter.supports_monolithic_kernels", "patched",
        "False has every oracle choose a kernel that asks the router (`backends.prefer_modular`)", "0.33-0.33", _ROUTERS,
    ),
    Touched(
        f"{_MOE}.router.fused_moe_router:FusedMoERouter.routing_method_type", "patched",
        "the same before 0.33: no monolithic kernel lists the method Custom, and modular ones take any", _ALL, _ROUTERS,
    ),
    Touched(f"{_MOE}.config:RoutingMethodType", "read", "that method", _ALL, _ROUTERS, ("Custom = (101,)",)),
    Touched(
        f"{_MOE}.modular_kernel:FusedMoEExpertsModular", "read", "kernels that ask the router; which of them may read our ids "
        "stands in `backends.py`", _ALL, _ROUTERS,
    ),
    Touched(f"{_MOE}.runner.moe_runner:MoERunner.layer_id", "read", "the model's layer number", _ALL, "none needed"),
    Touched(
        f"{_MOE}.config:FusedMoEConfig", "read", "experts of the model, without redundant copies", _ALL, "none needed",
        ("num_logical_experts: int",),
    ),
    Touched(
        f"{_MOE}.experts.cpu_moe:CPUUnquantizedExperts.apply", "wrapped",
        "the CPU kernel computes slots of weight 0 too; passing only the columns in use saves that", _CPU,
        "a kernel that skips slots of weight 0", ("cpu_fused_moe(output, hidden_states, w1, w2, self.w1_bias, self.w2_bias, "
        "topk_weights, topk_ids, activation.value, self.isa, apply_router_weight_on_input)",),
    ),
    Touched(
        f"{_MOE}.experts.cpu_moe:CPUUnquantizedExperts.__init__", "read", "experts that zentorch computes are left as they are", _CPU,
        "as above", ("self._use_zentorch = False",),
    ),
    Touched(
        f"{_MOE}.runner.moe_runner:MoERunner._quant_method", "read", "where the kernel of a layer is found", _ALL, "none needed",
    ),
    Touched(
        "vllm._custom_ops:cpu_fused_moe", "called", "the kernel itself, on fewer columns", _CPU, "as above",
        ("torch.ops._C.cpu_fused_moe(out, input, w13, w2, w13_bias, w2_bias, topk_weights, topk_ids, skip_weighted, act, isa)",),
    ),
    Touched(
        "vllm.v1.worker.cpu_worker:CPUWorker._should_warm_up_model", "called", "whether a profile run was due at all", _CPU,
        "a hook after the profile run",
    ),
    Touched(
        "vllm.v1.worker.gpu_worker:Worker.get_model", "read", "where a worker keeps its model runner (`proof.listed_sizes`)", _ALL,
        _GRAPHS, ("self.model_runner.get_model()",),
    ),
    Touched(
        "vllm.config.compilation:CompilationConfig", "read", "as above", _ALL, _GRAPHS, ("cudagraph_mode: CUDAGraphMode",),
    ),
    Touched(
        "vllm.config.compilation:CUDAGraphMode", "read", "what a graph of each mode holds", _ALL, _GRAPHS,
        ("NONE = 0", "PIECEWISE = 1", "FULL = 2"),
    ),
    Touched(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.__init__", "read", "where the first model runner keeps the sizes that it captures",
        _ALL, _GRAPHS, ("self.cudagraph_dispatcher = CudagraphDispatcher(self.vllm_config)",),
    ),
    Touched(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.capture_model", "read", "captures all of them", _ALL, _GRAPHS,
        ("if self.compilation_config.cudagraph_mode == CUDAGraphMode.NONE",
         "for runtime_mode, batch_descs in self.cudagraph_dispatcher.get_capture_descs()"),
    ),
    Touched(
        "vllm.v1.cudagraph_dispatcher:CudagraphDispatcher.get_capture_descs", "called", "hands them out", _ALL, _GRAPHS,
        ("-> list[tuple[CUDAGraphMode, list[BatchDescriptor]]]",),
    ),
    Touched("vllm.forward_context:BatchDescriptor", "read", "tokens of such a size", _ALL, _GRAPHS, ("num_tokens: int",)),
    Touched(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.__init__", "read", "where the second model runner keeps them", _ALL, _GRAPHS,
        ("self.cudagraph_manager: ModelCudaGraphManager | None = None",),
    ),
    Touched(
        "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.__init__", "read", "as above", _ALL, _GRAPHS,
        ("self._capture_descs: dict[CUDAGraphMode, list[BatchExecutionDescriptor]] = {}",),
    ),
    Touched(
        "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.capture", "read", "captures all of them", _ALL, _GRAPHS,
        ("descs = self._capture_descs[mode]",),
    ),
    Touched(
        "vllm.v1.worker.gpu.cudagraph_utils:BatchExecutionDescriptor", "read", "tokens of such a size", _ALL, _GRAPHS,
        ("num_tokens: int",),
    ),
    Touched(
        f"{_WORKER}.execute_model", "wrapped", "how many rows of the coming step are real tokens: what pads it stands behind them",
        _ALL, _HOOK, ("(self, scheduler_output: SchedulerOutput)",),
    ),
    Touched(
        "vllm.v1.worker.gpu_worker:Worker.execute_dummy_batch", "wrapped", "steps of idle data-parallel ranks have no real row",
        _ALL, _HOOK, ("(self) -> None",),
    ),
    Touched(
        "vllm.v1.core.sched.output:SchedulerOutput", "read", "that number", _ALL, "none needed",
        ("total_num_scheduled_tokens: int",),
    ),
    Touched(
        "vllm.config.parallel:ParallelConfig", "read", "what is refused at start (`features.py`)", _ALL, "none needed",
        ("tensor_parallel_size: int", "data_parallel_size: int", "pipeline_parallel_size: int", "enable_eplb: bool",
         "prefill_context_parallel_size: int", "data_parallel_external_lb: bool", "data_parallel_hybrid_lb: bool",
         "_api_process_count: int"),
    ),
    Touched("vllm.config.parallel:ParallelConfig.use_ubatching", "read", "as above", _ALL, "none needed"),
    Touched("vllm.config.parallel:ParallelConfig.use_sequence_parallel_moe", "read", "as above", _ALL, "none needed"),
    Touched("vllm.config.vllm:VllmConfig", "read", "as above", _ALL, "none needed", ("lora_config: LoRAConfig | None", "kernel_config: KernelConfig", "additional_config: dict | SupportsHash", "ec_transfer_config: ECTransferConfig | None")),
    Touched("vllm.config.ec_transfer:ECTransferConfig.is_ec_producer", "read", "as above", _ALL, "none needed"),
    Touched("vllm.config.ec_transfer:ECTransferConfig.is_ec_consumer", "read", "as above", _ALL, "none needed"),
    Touched("vllm.config.kernel:KernelConfig", "read", "as above", _ALL, "none needed", ("moe_backend: MoEBackend",)),
    Touched("vllm.config.model:ModelConfig", "read", "as above", _ALL, "none needed",
            ("enable_sleep_mode: bool", "enforce_eager: bool", "hf_config: Pre")),
    Touched("vllm.models.flint.configs:FlintConfig", "read", "as above", "0.33-0.33", "none needed", ("model_type = 'flint'",)),
    Touched("vllm.models.flint.model:FlintSparseMoeBlock.forward", "read", "small batches pass by the router", "0.33-0.33",
            "none needed", ("self.bf16_decode is not None and hidden_states.shape[0] <= BF16_DECODE_MAX_TOKENS",)),
    Touched(
        "vllm.plugins.endpoint_plugins.interface:EndpointPlugin", "read", "interface of routes", _ALL, "none needed",
        ("name: str", "required_tasks: 'tuple[SupportedTask, ...] | None'"),
    ),
    Touched(
        "vllm.plugins.endpoint_plugins.interface:EndpointPlugin.init_state", "read", "as above", _ALL, "none needed",
        ("(self, engine_client: 'EngineClient | None', state: State, args: Namespace)",),
    ),
    Touched(
        f"{_ENGINE}.__init__", "read", "how many engines there are, and where statistics of finished requests are handed on", _ALL,
        "none needed", ("self.vllm_config = vllm_config", "self.logger_manager: StatLoggerManager | None = None"),
    ),
    Touched(
        "vllm.v1.metrics.loggers:StatLoggerManager.__init__", "read", "as above", _ALL, "none needed",
        ("self.stat_loggers: list[AggregateStatLoggerBase] = []",),
    ),
    Touched(
        f"{_ENGINE}.collective_rpc", "called", "switches all ranks between two steps", _ALL, "none needed",
        ("(self, method: str, timeout: float | None=None, args: tuple=(), kwargs: dict | None=None)",),
    ),
    Touched(
        "vllm.v1.engine.core_client:AsyncMPClient.call_utility_all_async", "called",
        "collective_rpc hands back what the first data-parallel engine answers; a change is read back from all, or refused "
        "(`switch.unreachable`)", "0.32-0.33", "a collective_rpc that answers for all engines", ("(self, method: str, *args)",),
    ),
    Touched(
        f"{_ENGINE}.pause_generation", "called",
        "clean switches: drain and drop the prefix cache; data-parallel engines: held for a change", _ALL, "none needed",
        ("mode: PauseMode='abort'", "clear_cache: bool=True"),
    ),
    Touched(f"{_ENGINE}.resume_generation", "called", "after a clean switch", _ALL, "none needed"),
    Touched(
        "vllm.v1.metrics.loggers:StatLoggerBase.record", "called", "finished requests, for TPOT and TTFT by policy",
        _ALL, "none needed", ("scheduler_stats: SchedulerStats | None, iteration_stats: IterationStats | None",
                              "engine_idx: int=0"),
    ),
    Touched(
        "vllm.v1.metrics.stats:FinishedRequestStats", "read", "as above", _ALL, "none needed",
        ("e2e_latency: float", "num_generation_tokens: int", "decode_time: float"),
    ),
    *(
        Touched(reader.symbol, "read", f"reads re-routed ids: {reader.why}", reader.versions, "none needed")
        for reader in (*EXPERTS, *DISPATCH, *MAPPINGS)
    ),
)  # fmt: skip
