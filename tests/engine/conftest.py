"""Tiny models with random weights, made on the spot: two MoE architectures and a dense one, with what tests compare them to."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

# Before vLLM is imported: little memory for KV, no telemetry, nothing fetched.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

SHAPE = {
    "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "num_attention_heads": 4,
    "num_experts_per_tok": 4, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip


def _tokenizer(directory: Path) -> int:
    """A tokenizer of one token a character; returns the size of the vocabulary."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    for character in [chr(code) for code in range(32, 127)] + ["\n"]:
        vocabulary[character] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    fast.save_pretrained(directory)
    return len(vocabulary)


def _save(directory: Path, config_class: str, model_class: str, **fields: object) -> Path:
    import torch
    import transformers

    size = _tokenizer(directory)
    config = getattr(transformers, config_class)(vocab_size=size, **SHAPE, **fields)
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config).float()
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.normal_(0, 0.15)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3-MoE: 4 MoE layers, 16 experts, top-4, renormalised softmax."""
    return _save(
        tmp_path_factory.mktemp("qwen3"), "Qwen3MoeConfig", "Qwen3MoeForCausalLM", num_hidden_layers=4,
        num_key_value_heads=2, head_dim=32, num_experts=16, norm_topk_prob=True,
    )  # fmt: skip


@pytest.fixture(scope="session")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek-V2-like: a dense first layer, 2 MoE layers of 16 experts in 4 groups, top-4 of 2 groups, a shared expert, MLA."""
    return _save(
        tmp_path_factory.mktemp("deepseek"), "DeepseekV2Config", "DeepseekV2ForCausalLM", num_hidden_layers=3,
        num_key_value_heads=4, n_shared_experts=1, n_routed_experts=16, q_lora_rank=None, kv_lora_rank=512,
        qk_rope_head_dim=64, qk_nope_head_dim=64, v_head_dim=64,  # 512 + 64 is the only size that the CPU's MLA kernel has
        n_group=4, topk_group=2, topk_method="group_limited_greedy",
        first_k_dense_replace=1, norm_topk_prob=False, routed_scaling_factor=1.5,
    )  # fmt: skip


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3 without experts."""
    directory = tmp_path_factory.mktemp("dense")
    import torch
    import transformers

    size = _tokenizer(directory)
    fields = {name: value for name, value in SHAPE.items() if name not in ("moe_intermediate_size", "num_experts_per_tok")}
    config = transformers.Qwen3Config(vocab_size=size, **fields, num_hidden_layers=2, num_key_value_heads=2, head_dim=32)
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(config).float().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "calibration.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}*{i % 7}=", "answer": str(i * (i % 7))}) + "\n" for i in range(60)))
    return path


@pytest.fixture(scope="session")
def similarity(qwen3: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sere_ext.calibration.run import calibrate

    path = tmp_path_factory.mktemp("similarity") / "qwen3.safetensors"
    calibrate(str(qwen3), calibration, path)
    return path


@pytest.fixture(scope="session")
def stock(qwen3: Path) -> Any:
    """What the Qwen3-MoE model answers in an engine without the plug-in."""
    from tests.kit.library import answers, engine

    with engine(qwen3) as llm:
        return answers(llm)
