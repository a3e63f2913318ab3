"""Dimensions of published MoE models, made on the spot: a config.json that vLLM loads, and what a decode step must read.

Weights are random, so nothing here says anything about accuracy. `TINY` is for trying the stages on a CPU.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BF16 = 2  # bytes


@dataclass(frozen=True)
class Shape:
    """One model's dimensions. `config` is its config.json but for the vocabulary's special tokens."""

    name: str
    config: dict[str, Any]

    def get(self, key: str, otherwise: int = 0) -> int:
        return int(self.config.get(key) or otherwise)

    @property
    def hidden(self) -> int:
        return self.get("hidden_size")

    @property
    def layers(self) -> int:
        return self.get("num_hidden_layers")

    @property
    def moe_layers(self) -> int:
        return self.layers - self.get("first_k_dense_replace")

    @property
    def experts(self) -> int:
        return self.get("num_experts", self.get("n_routed_experts"))

    @property
    def top_k(self) -> int:
        return self.get("num_experts_per_tok")

    @property
    def vocabulary(self) -> int:
        return self.get("vocab_size")

    @property
    def expert_bytes(self) -> int:
        """Of one expert of one layer in bf16: gate, up and down."""
        return 3 * self.hidden * self.get("moe_intermediate_size") * BF16

    @property
    def fixed_bytes(self) -> int:
        """What every step reads in bf16 whatever is routed where: attention, routers, shared and dense MLPs, lm_head."""
        shared = self.get("shared_expert_intermediate_size", self.get("n_shared_experts") * self.get("moe_intermediate_size"))
        dense = (self.layers - self.moe_layers) * 3 * self.hidden * self.get("intermediate_size")
        per_moe_layer = self.experts * self.hidden + 3 * self.hidden * shared
        return BF16 * (self.layers * self._attention + self.moe_layers * per_moe_layer + dense + self.vocabulary * self.hidden)

    @property
    def _attention(self) -> int:
        heads = self.get("num_attention_heads")
        if latent := self.get("kv_lora_rank"):
            rope, plain, value = self.get("qk_rope_head_dim"), self.get("qk_nope_head_dim"), self.get("v_head_dim")
            into = heads * (plain + rope) + latent + rope
            return self.hidden * (into + heads * value) + latent * heads * (plain + value)
        head = self.get("head_dim", self.hidden // heads)
        return self.hidden * head * 2 * (heads + self.get("num_key_value_heads"))

    @property
    def kv_bytes(self) -> int:
        """Per token of context in bf16, all layers."""
        if latent := self.get("kv_lora_rank"):
            return BF16 * self.layers * (latent + self.get("qk_rope_head_dim"))
        head = self.get("head_dim", self.hidden // self.get("num_attention_heads"))
        return BF16 * self.layers * 2 * self.get("num_key_value_heads") * head

    def write(self, folder: Path, positions: int) -> Path:
        """Make a model folder that holds a config and nothing else; `positions` is the longest sequence."""
        folder.mkdir(parents=True, exist_ok=True)
        rope = {"rope_type": "default", "rope_theta": 1e6}
        common = {
            "hidden_act": "silu", "torch_dtype": "bfloat16", "tie_word_embeddings": False, "rms_norm_eps": 1e-6,
            "max_position_embeddings": positions, "rope_parameters": rope, "bos_token_id": 0, "eos_token_id": 0,
            "attention_bias": False, "decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False,
        }  # fmt: skip
        (folder / "config.json").write_text(json.dumps(common | self.config, indent=1))
        return folder


QWEN3_30B = Shape(
    "Qwen3-30B-A3B",
    {
        "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "num_hidden_layers": 48,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "intermediate_size": 6144, "num_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True, "vocab_size": 151936,
    },
)  # fmt: skip
QWEN15_MOE = Shape(
    "Qwen1.5-MoE-A2.7B",
    {
        "model_type": "qwen2_moe", "architectures": ["Qwen2MoeForCausalLM"], "hidden_size": 2048, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 5632, "num_experts": 60,
        "num_experts_per_tok": 4, "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632,
        "norm_topk_prob": False, "vocab_size": 151936, "qkv_bias": True,
    },
)  # fmt: skip
DEEPSEEK_V2_LITE = Shape(
    "DeepSeek-V2-Lite",
    {
        "model_type": "deepseek_v2", "architectures": ["DeepseekV2ForCausalLM"], "hidden_size": 2048, "num_hidden_layers": 27,
        "num_attention_heads": 16, "num_key_value_heads": 16, "intermediate_size": 10944, "n_routed_experts": 64,
        "n_shared_experts": 2, "num_experts_per_tok": 6, "moe_intermediate_size": 1408, "first_k_dense_replace": 1,
        "moe_layer_freq": 1, "kv_lora_rank": 512, "q_lora_rank": None, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128,
        "v_head_dim": 128, "n_group": 1, "topk_group": 1, "topk_method": "greedy", "scoring_func": "softmax",
        "norm_topk_prob": False, "routed_scaling_factor": 1.0, "vocab_size": 102400,
    },
)  # fmt: skip
TINY = Shape(
    "tiny",
    {
        **QWEN3_30B.config, "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 64, "intermediate_size": 256, "num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 128,
        "vocab_size": 4096,
    },
)  # fmt: skip
SHAPES = {"qwen3-30b": QWEN3_30B, "deepseek-v2-lite": DEEPSEEK_V2_LITE, "qwen1.5-moe": QWEN15_MOE, "tiny": TINY}
