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
    from vllm import envs

    if reasons := refusals(vllm_config, batch_invariant=bool(envs.VLLM_BATCH_INVARIANT)):
        raise UnsupportedError("sere cannot run with this engine: " + "; ".join(reasons))


def refusals(vllm_config: Any, *, batch_invariant: bool = False) -> list[str]:
    """One sentence for each feature in use that is refused, empty if there is none.

    Args:
        vllm_config: vLLM's `VllmConfig`.
        batch_invariant: vLLM's VLLM_BATCH_INVARIANT.
    """
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    found = []
    if batch_invariant:
        found.append("VLLM_BATCH_INVARIANT: re-routing depends on which experts the batch uses, by design; unset it")
    if "mega_moe" in str(getattr(getattr(vllm_config, "kernel_config", None), "moe_backend", "")):
        found.append("--moe-backend with mega_moe: the model routes inside its own layers, without a router; choose another")
    if (getattr(vllm_config, "additional_config", None) or {}).get("decode_backend"):
        found.append("additional_config.decode_backend: decode steps pass by the router, so they would stay exact; drop it")
    if getattr(getattr(model, "hf_config", None), "model_type", "") == "flint":
        found.append("the model Flint: its own kernels route small batches, without the router; serve it without sere")
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
    transfer = getattr(vllm_config, "ec_transfer_config", None)
    if transfer is not None and transfer.is_ec_producer and not transfer.is_ec_consumer:
        found.append(
            "--ec-transfer-config with ec_role ec_producer: this engine runs the encoder alone, so no router is ever asked; serve "
            "it without sere"
        )
    if getattr(vllm_config, "lora_config", None) is not None:
        found.append("--enable-lora: adapters change what experts answer, which similarity does not know of; drop it")
    if getattr(model, "enable_sleep_mode", False):
        found.append("--enable-sleep-mode: re-routing across sleep and wake-up was never tried; drop it")
    return found
