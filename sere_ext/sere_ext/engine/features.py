"""Which of vLLM's features go together with re-routing: those that do not are refused at start, never silently wrong.

`docs/compatibility.md` is the table for people. A feature stands here if routing under it would differ from what a policy
was measured on, or if nobody ever tried it; each refusal names the flag to change.
"""

from __future__ import annotations

from typing import Any

from sere_ext.contract.errors import UnsupportedError

Release = tuple[int, int]
V1_RUNNER_MASKS_SINCE: Release = (0, 31)


def check_features(vllm_config: Any, release: Release, masks_padding: bool) -> None:
    """Look through a `VllmConfig` before the model is loaded.

    Args:
        release: vLLM's (major, minor).
        masks_padding: vLLM's `VLLM_MOE_SKIP_PADDING`, by which its second model runner fills the mask of padding rows.

    Raises:
        UnsupportedError: with every reason, and what to change.
    """
    reasons = refusals(vllm_config)
    if why := padding_refusal(vllm_config, release, masks_padding):
        reasons.append(why)
    if reasons:
        raise UnsupportedError("sere cannot run with this engine: " + "; ".join(reasons))


def refusals(vllm_config: Any) -> list[str]:
    """One sentence for each feature in use that is refused, empty if there is none."""
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    found = []
    if getattr(parallel, "use_sequence_parallel_moe", False):
        found.append(
            "sequence-parallel experts (tensor, data and expert parallel at once): a rank routes a share of the batch only; drop "
            "--enable-expert-parallel"
        )
    if parallel.pipeline_parallel_size > 1:
        found.append(
            f"--pipeline-parallel-size {parallel.pipeline_parallel_size}: a stage holds some of the layers, while a policy and "
            "its similarity are for all; use --tensor-parallel-size"
        )
    if getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        found.append("--prefill-context-parallel-size: ranks exchange rows before they are routed; set it to 1")
    if getattr(parallel, "enable_eplb", False):
        found.append("--enable-eplb: it moves experts by loads that a policy changes, which was never tried; drop it")
    if getattr(parallel, "enable_dbo", False):
        found.append("--enable-dbo: a router sees half of the batch, so batch-size buckets would not hold; drop it")
    if getattr(vllm_config, "lora_config", None) is not None:
        found.append("--enable-lora: adapters change what experts answer, which similarity does not know of; drop it")
    if getattr(model, "enable_sleep_mode", False):
        found.append("--enable-sleep-mode: re-routing across sleep and wake-up was never tried; drop it")
    return found


def padding_refusal(vllm_config: Any, release: Release, masks_padding: bool) -> str | None:
    """Why rows that pad a batch up to a captured CUDA graph would count as tokens; None if they are known, or there are none."""
    if vllm_config.device_config.device_type == "cpu" or vllm_config.model_config.enforce_eager:
        return None  # nothing is captured
    if vllm_config.use_v2_model_runner:
        return None if masks_padding else "padding is not marked: set VLLM_MOE_SKIP_PADDING=1, or start with --enforce-eager"
    if release >= V1_RUNNER_MASKS_SINCE:
        return None
    return (
        f"padding is not marked by the first model runner of vLLM {release[0]}.{release[1]}: set VLLM_USE_V2_MODEL_RUNNER=1 and "
        "VLLM_MOE_SKIP_PADDING=1, start with --enforce-eager, or use vLLM 0.31 or newer"
    )
