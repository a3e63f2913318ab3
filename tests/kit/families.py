"""Small random models of MoE families, one config each, without a tokenizer or weights on disk.

vLLM builds the model from `config.json`; the loader below fills it with numbers large enough that routing matters, where
vLLM's own dummy weights (1e-3) would leave every logit a tie.
"""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

LOAD_FORMAT = "sere_test_random"
VOCABULARY = 128

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0, "torch_dtype": "float32",
}  # fmt: skip
# 512 + 64 is the only head size that the CPU's MLA kernel has.
_MLA: dict[str, Any] = {
    "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 64,
    "v_head_dim": 64, "head_dim": 64, "n_shared_experts": 1, "n_routed_experts": 16, "num_experts_per_tok": 4,
    "moe_intermediate_size": 32, "first_k_dense_replace": 1, "moe_layer_freq": 1, "routed_scaling_factor": 1.5,
    "n_group": 4, "topk_group": 2, "rope_interleave": True,
}  # fmt: skip


def _family(architecture: str, model_type: str, base: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    return {"architectures": [architecture], "model_type": model_type, **_COMMON, **(base or {}), **fields}


FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2-moe": _family(
        "Qwen2MoeForCausalLM", "qwen2_moe", num_experts=16, num_experts_per_tok=4, moe_intermediate_size=32,
        shared_expert_intermediate_size=64, norm_topk_prob=False, decoder_sparse_step=1, mlp_only_layers=[],
        use_sliding_window=False,
    ),
    "qwen3-moe": _family(
        "Qwen3MoeForCausalLM", "qwen3_moe", num_experts=16, num_experts_per_tok=4, moe_intermediate_size=32,
        norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
    ),
    "qwen3-next": _family(
        "Qwen3NextForCausalLM", "qwen3_next", num_experts=16, num_experts_per_tok=4, moe_intermediate_size=32,
        shared_expert_intermediate_size=64, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
        layer_types=["linear_attention", "full_attention"], linear_conv_kernel_dim=4, linear_key_head_dim=128,
        linear_value_head_dim=128, linear_num_key_heads=2, linear_num_value_heads=4, partial_rotary_factor=0.25,
        full_attention_interval=2, torch_dtype="bfloat16",
    ),
    "mixtral": _family("MixtralForCausalLM", "mixtral", num_local_experts=8, num_experts_per_tok=2, sliding_window=None),
    "deepseek-v2": _family(
        "DeepseekV2ForCausalLM", "deepseek_v2", _MLA, topk_method="group_limited_greedy", norm_topk_prob=False,
        scoring_func="softmax",
    ),
    "deepseek-v3": _family(
        "DeepseekV3ForCausalLM", "deepseek_v3", _MLA, topk_method="noaux_tc", norm_topk_prob=True, scoring_func="sigmoid",
        num_nextn_predict_layers=0,
    ),
    "glm4-moe": _family(
        "Glm4MoeForCausalLM", "glm4_moe", n_routed_experts=16, n_shared_experts=1, num_experts_per_tok=4,
        moe_intermediate_size=32, first_k_dense_replace=1, norm_topk_prob=True, routed_scaling_factor=1.5, n_group=1,
        topk_group=1, partial_rotary_factor=0.5, use_qk_norm=True, attention_bias=True, num_nextn_predict_layers=0,
    ),
    "gpt-oss": _family(
        "GptOssForCausalLM", "gpt_oss", num_local_experts=16, num_experts_per_tok=4, sliding_window=32,
        layer_types=["sliding_attention", "full_attention"], swiglu_limit=7.0, attention_bias=True,
        rope_scaling={"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128, "beta_fast": 32.0,
                      "beta_slow": 1.0, "truncate": False},
    ),
    "olmoe": _family(
        "OlmoeForCausalLM", "olmoe", num_experts=16, num_experts_per_tok=4, norm_topk_prob=False,
    ),
    "granite-moe": _family(
        "GraniteMoeForCausalLM", "granitemoe", num_local_experts=16, num_experts_per_tok=4, embedding_multiplier=12.0,
        logits_scaling=6.0, residual_multiplier=0.22, attention_multiplier=0.0156,
    ),
    "phi-moe": _family(
        "PhiMoEForCausalLM", "phimoe", num_local_experts=16, num_experts_per_tok=2, router_jitter_noise=0.01,
        input_jitter_noise=0.0, attention_bias=True, lm_head_bias=True, sliding_window=None,
    ),
    "ernie4.5-moe": _family(
        "Ernie4_5_MoeForCausalLM", "ernie4_5_moe", moe_num_experts=16, moe_k=4, moe_intermediate_size=32,
        moe_num_shared_experts=1, moe_layer_start_index=1, moe_layer_end_index=1, moe_layer_interval=1, use_bias=False,
        moe_capacity=[64, 64, 64],
    ),
    "llama4": _family(
        "Llama4ForCausalLM", "llama4_text", num_local_experts=16, num_experts_per_tok=1, intermediate_size_mlp=64,
        interleave_moe_layer_step=1, moe_layers=[0, 1], use_qk_norm=True, no_rope_layers=[1, 1], attention_bias=False,
        attn_temperature_tuning=False, attention_chunk_size=None, layer_types=["full_attention", "full_attention"],
    ),
}  # fmt: skip

REFUSED = {  # why re-routing refuses a family that stock vLLM serves on the CPU
    "llama4": r"Llama4ForCausalLM, .*one expert per token.*nothing could be re-routed; serve it without sere",
}
SERVED = [family for family in FAMILIES if family not in REFUSED]


def dtype(model: Path) -> str:
    """The dtype that the family runs in: float32, unless the CPU has no float32 kernel for it."""
    return str(json.loads((model / "config.json").read_text())["torch_dtype"])


def write(family: str, directory: Path) -> Path:
    """Write the family's `config.json` into `directory`, which is all that vLLM needs under `LOAD_FORMAT`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(FAMILIES[family]))
    return directory


def register_loader() -> None:
    """Make `load_format=LOAD_FORMAT` known in this process."""
    import torch
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    class RandomLoader(BaseModelLoader):
        """Seeded by each tensor's name, so that two engines hold the same model. Norms are near 1, biases near 0."""

        def download_model(self, model_config: Any) -> None:
            pass

        def load_weights(self, model: Any, model_config: Any) -> None:
            for name, tensor in model.state_dict().items():
                if not torch.is_floating_point(tensor):
                    continue
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                values = torch.randn(tensor.shape, generator=generator)
                values = 1 + 0.1 * values if "norm" in name and name.endswith("weight") else 0.15 * values
                tensor.data.copy_(values.to(tensor.dtype))

    register_model_loader(LOAD_FORMAT)(RandomLoader)
