"""Which of vLLM's features go together with re-routing: those that do not are refused at start, never silently wrong.

`docs/compatibility.md` is the table for people. A feature stands here if routing under it would differ from what a policy
was measured on, or if nobody ever tried it; each refusal names the flag to change.
"""

from __future__ import annotations

from typing import Any

from sere_ext.contract.errors import UnsupportedError


def check_features(vllm_config: Any) -> None:
    """Look through a `VllmConfig` before the model is loaded.

    Raises:
        UnsupportedError: with every reason, and what to change.
    """
    if reasons := refusals(vllm_config):
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
    if getattr(parallel, "use_ubatching", False):
        found.append("--enable-dbo or --ubatch-size: a router sees a part of the batch, so buckets would not hold; drop them")
    if getattr(vllm_config, "lora_config", None) is not None:
        found.append("--enable-lora: adapters change what experts answer, which similarity does not know of; drop it")
    if getattr(model, "enable_sleep_mode", False):
        found.append("--enable-sleep-mode: re-routing across sleep and wake-up was never tried; drop it")
    return found
