"""Which kernels may read re-routed ids, and what they take a freed slot for.

A freed slot has weight 0. Its id is either an expert that its token keeps (`kernel.REPEAT`), or -1 (`kernel.MINUS_ONE`). Some
kernels lose or misplace a weighted slot where a token names an expert twice; others use -1 as an index, or add a row that they
never wrote. So kernels are allowed by name, each with the reason; one that is not here is refused until somebody has read it.
`docs/compatibility.md` shows the table (`python -m sere_ext.engine.backends` renews it), and a test holds every name against
the snapshots of vLLM's sources.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sere_ext.routing.kernel import MINUS_ONE, REPEAT

_MOE = "vllm.model_executor.layers.fused_moe"


@dataclass(frozen=True)
class Reader:
    """A class of vLLM that reads re-routed ids: experts of a layer, what dispatches tokens to ranks, or what maps ids before both."""

    symbol: str  # module:Class
    freed: tuple[int, ...]  # what a freed slot's id may be
    why: str
    versions: str = "0.26-0.33"

    @property
    def name(self) -> str:
        return self.symbol.rpartition(":")[2]


_SORTS = "moe_align_block_size sorts slots, so an expert named twice is two rows; moe_sum adds the row that -1 leaves unwritten"
_BITS = "make_routing_data packs a token's experts into bits, so an expert named twice counts once and shifts later experts' rows"
_ROUTED = "the routing kernel for few tokens keeps one slot per token and expert; -1 is skipped"
_LOOKS_UP = "the kernel uses ids as indices, and computes an expert named twice as two slots"

EXPERTS = (
    Reader(f"{_MOE}.experts.triton_moe:TritonExperts", (REPEAT,), _SORTS),
    Reader(f"{_MOE}.experts.triton_moe:TritonWNA16Experts", (REPEAT,), _SORTS),
    Reader(f"{_MOE}.experts.marlin_moe:MarlinExperts", (REPEAT,), _SORTS),
    Reader(f"{_MOE}.experts.flashinfer_cutlass_moe:FlashInferExperts", (REPEAT,), "a radix sort ranks every slot by itself"),
    Reader(f"{_MOE}.experts.deep_gemm_moe:DeepGemmExperts", (REPEAT,), "ep_scatter gives every slot a row of its own"),
    Reader(
        f"{_MOE}.experts.triton_deep_gemm_moe:TritonOrDeepGemmExperts", (REPEAT,), "either of TritonExperts and DeepGemmExperts"
    ),
    Reader(f"{_MOE}.experts.gpt_oss_triton_kernels_moe:OAITritonExperts", (MINUS_ONE,), _BITS),
    Reader(f"{_MOE}.experts.gpt_oss_triton_kernels_moe:UnfusedOAITritonExperts", (MINUS_ONE,), _BITS),
    Reader(f"{_MOE}.experts.trtllm_bf16_moe:TrtLlmBf16ExpertsModular", (MINUS_ONE,), _ROUTED),
    Reader(f"{_MOE}.experts.trtllm_fp8_moe:TrtLlmFp8ExpertsModular", (MINUS_ONE,), _ROUTED),
    Reader(f"{_MOE}.experts.trtllm_nvfp4_moe:TrtLlmNvFp4ExpertsModular", (MINUS_ONE,), _ROUTED),
    Reader(f"{_MOE}.experts.trtllm_mxfp4_moe:TrtLlmMxfp4ExpertsModular", (MINUS_ONE,), _ROUTED),
    Reader(f"{_MOE}.experts.fused_batched_moe:BatchedTritonExperts", (REPEAT, MINUS_ONE), "reads what the dispatch packed"),
    Reader(f"{_MOE}.experts.batched_deep_gemm_moe:BatchedDeepGemmExperts", (REPEAT, MINUS_ONE), "reads what the dispatch packed"),
    Reader(f"{_MOE}.experts.cpu_moe:CPUUnquantizedExperts", (REPEAT,), _LOOKS_UP, "0.32-0.33"),
    Reader(f"{_MOE}.experts.cpu_moe:X86CPUUnquantizedExperts", (REPEAT,), _LOOKS_UP, "0.32-0.33"),
    Reader(f"{_MOE}.experts.cpu_moe:ArmCPUUnquantizedExperts", (REPEAT,), _LOOKS_UP, "0.32-0.33"),
)
DISPATCH = (
    Reader(f"{_MOE}.prepare_finalize.no_dp_ep:MoEPrepareAndFinalizeNoDPEPModular", (REPEAT, MINUS_ONE), "sends nothing"),
    Reader(
        f"{_MOE}.prepare_finalize.naive_dp_ep:MoEPrepareAndFinalizeNaiveDPEPModular", (REPEAT, MINUS_ONE),
        "gathers whole rows of all ranks after they were routed",
    ),
    Reader(f"{_MOE}.prepare_finalize.deepep_ht:DeepEPHTPrepareAndFinalize", (REPEAT, MINUS_ONE), "sends a token once per rank"),
    Reader(
        f"{_MOE}.prepare_finalize.deepep_ll:DeepEPLLPrepareAndFinalize", (MINUS_ONE,),
        "a rank's area holds one row per token and expert, unchecked: an expert named twice writes past its end; -1 is skipped",
    ),
    Reader(
        f"{_MOE}.prepare_finalize.nixl_ep:NixlEPPrepareAndFinalize", (MINUS_ONE,), "as DeepEPLLPrepareAndFinalize, which it follows"
    ),
)  # fmt: skip
MAPPINGS = (
    Reader(
        f"{_MOE}.expert_substitution:SubstitutedRoutedExperts", (REPEAT,),
        "maps -1 to an unused slot of the first expert, which is a repeat again; constants themselves cost nothing", "0.33-0.33",
    ),
)  # fmt: skip


def constants_of(runner: Any) -> tuple[int, ...]:
    """Ids of a layer's experts that a MoNE checkpoint replaced by a constant vector (vLLM 0.33), none elsewhere.

    Such ids leave the router like any other, and are taken out behind the place where routing is changed.
    """
    substitution = getattr(runner.routed_experts, "expert_substitution", None)
    return () if substitution is None else tuple(substitution.substituted_expert_ids)


def freed_slot(runner: Any, device: str) -> int | str:
    """What a freed slot's id must be for the kernels of one MoE layer (vLLM's `MoERunner`, weights loaded).

    Returns:
        kernel.REPEAT or kernel.MINUS_ONE; or a sentence that says why the layer cannot be re-routed, and what to do.
    """
    chosen = getattr(runner._quant_method, "moe_kernel", None)
    if chosen is None:
        return f"nothing is known of its kernel ({type(runner._quant_method).__name__}); {way_out(runner, device)}"
    allowed = {REPEAT, MINUS_ONE}
    mapping = MAPPINGS if constants_of(runner) else None
    for part, known in ((chosen.fused_experts, EXPERTS), (chosen.prepare_finalize, DISPATCH), (runner.routed_experts, mapping)):
        if known is None:
            continue
        name = type(part).__name__
        found = next((reader for reader in known if reader.name == name), None)
        if found is None:
            return f"nobody has read yet what {name} makes of re-routed slots; {way_out(runner, device)}"
        allowed &= set(found.freed)
    if not allowed:
        names = f"{type(chosen.fused_experts).__name__} and {type(chosen.prepare_finalize).__name__}"
        return f"{names} need different ids for a freed slot; {way_out(runner, device)}"
    return REPEAT if REPEAT in allowed else MINUS_ONE


_WAYS_OUT = (  # by what stands in the names of a layer's quantisation and experts
    ("mxfp4", "--moe-backend marlin"),
    ("mxint4", "--moe-backend marlin"),
    ("nvfp4", "--moe-backend flashinfer_cutlass"),
    ("fp8", "--moe-backend triton"),
    ("wna16", "--moe-backend marlin"),
    ("unquantized", "--moe-backend triton"),
)


def way_out(runner: Any, device: str) -> str:
    """What to change so that another kernel is chosen for this layer: depends on how its weights are stored."""
    if device == "cpu":
        return "serve unquantised weights, or without sere"
    method = runner._quant_method
    names = (
        f"{type(method).__name__} {type(getattr(getattr(method, 'moe_kernel', None), 'fused_experts', None)).__name__}".lower()
    )
    flag = next((flag for part, flag in _WAYS_OUT if part in names), None)
    return f"start the engine with `{flag}`, or serve without sere" if flag else "serve without sere"


def prefer_modular() -> None:
    """Have vLLM choose kernels that ask the router, for layers that are built from now on in this process.

    Since 0.33 a router can say that monolithic kernels do not do. Before, such a kernel lists the routing methods that it
    implements, so the router names one that none does; modular kernels take any, and pass on none (read in 0.26 to 0.32).
    """
    from vllm.model_executor.layers.fused_moe.config import RoutingMethodType
    from vllm.model_executor.layers.fused_moe.router.fused_moe_router import FusedMoERouter

    since = "supports_monolithic_kernels"
    name, value = (since, False) if hasattr(FusedMoERouter, since) else ("routing_method_type", RoutingMethodType.Custom)
    for router in [FusedMoERouter, *_below(FusedMoERouter)]:
        if name in vars(router):
            setattr(router, name, property(lambda self: value))


def _below(base: type[Any]) -> list[type[Any]]:
    return [found for child in base.__subclasses__() for found in (child, *_below(child))]


@dataclass(frozen=True)
class Combination:
    """What vLLM chooses for some weights on some GPU once monolithic kernels are ruled out (read in vLLM's oracles, not run)."""

    models: str
    weights: str
    gpu: str
    parallel: str
    chosen: str  # name of the experts' class, or a plain word
    refused: str = ""


COMBINATIONS = (
    Combination("Qwen3-30B-A3B, Qwen3-Next, Mixtral, OLMoE, DeepSeek-V2", "bf16", "Ampere to Hopper", "TP, EP", "TritonExperts"),
    Combination("the same", "bf16", "Blackwell", "TP, EP", "TrtLlmBf16ExpertsModular"),
    Combination("the same", "FP8, block scales", "Hopper", "TP", "TritonExperts"),
    Combination("the same, DeepSeek-V3, GLM-4.x", "FP8, block scales", "Hopper", "EP", "FlashInferExperts"),
    Combination("the same, DeepSeek-V3, GLM-4.x", "FP8, block scales", "Blackwell", "TP, EP", "TrtLlmFp8ExpertsModular"),
    Combination("gpt-oss", "MXFP4", "Hopper", "TP, EP", "OAITritonExperts"),
    Combination("gpt-oss", "MXFP4", "Blackwell", "TP, EP", "TrtLlmMxfp4ExpertsModular"),
    Combination("gpt-oss", "MXFP4", "Ampere, or `--moe-backend marlin`", "TP, EP", "MarlinExperts"),
    Combination("any", "NVFP4", "Blackwell", "TP, EP", "TrtLlmNvFp4ExpertsModular"),
    Combination("any", "NVFP4", "Hopper", "TP, EP", "MarlinExperts"),
    Combination("Kimi-K2-Thinking and others", "int4 (WNA16)", "Ampere to Hopper", "TP, EP", "MarlinExperts"),
    Combination("any", "any", "any", "DP with DeepEP low latency", "BatchedDeepGemmExperts"),
    Combination("DeepSeek-V4, Kimi-K3", "FP8, MXFP4", "Blackwell", "EP, `deep_gemm_mega_moe`", "none",
                "routes inside the model's own layer, without a router; choose another `--moe-backend`"),
    Combination("DeepSeek-V4.1", "any", "Blackwell", "`decode_backend`", "none",
                "decode steps pass by the router; drop it from --additional-config"),
    Combination("Flint", "bf16, NVFP4", "Blackwell", "any", "none", "its own kernels route small batches, without the router"),
    Combination("Llama 4", "any", "any", "any", "none", "one expert per token, which is always kept"),
    Combination("any", "any", "any", "Humming, HPC, CUTLASS, MoonEP, Mori, NVLink all-to-all, ROCm and XPU kernels", "not read",
                "nobody has read yet what they make of a freed slot; choose another `--moe-backend`"),
    Combination("any", "any", "any", "`VLLM_BATCH_INVARIANT=1`", "any", "re-routing depends on the batch by design; unset it"),
    Combination("any", "unquantised", "CPU (x86, Arm)", "TP, EP", "CPUUnquantizedExperts"),
)  # fmt: skip


def table() -> str:
    """The combinations as a Markdown table."""
    lines = [
        "| models | weights | GPU | parallelism | experts' kernel | re-routed | freed slot | why, way out |",
        "|" + " --- |" * 8,
    ]
    words = {REPEAT: "repeats an expert", MINUS_ONE: "-1"}
    for row in COMBINATIONS:
        found = next((reader for reader in EXPERTS if reader.name == row.chosen), None)
        verdict, slot, why = ("no", "", row.refused) if row.refused or not found else ("yes", words[found.freed[-1]], found.why)
        kernel = f"`{row.chosen}`" if found else row.chosen
        lines.append(f"| {row.models} | {row.weights} | {row.gpu} | {row.parallel} | {kernel} | {verdict} | {slot} | {why} |")
    return "\n".join(lines) + "\n"


BEGIN, END = "<!-- backends: made by python -m sere_ext.engine.backends -->\n", "<!-- end of backends -->\n"


def renewed(page: str) -> str:
    """A page of documentation with the table between its two marks."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/compatibility.md")
    target.write_text(renewed(target.read_text()))
