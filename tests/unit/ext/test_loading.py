"""Models as they come: multimodal ones give their language model, quantised ones their plain numbers, or the twin is asked for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from sere_ext.calibration import loading
from sere_ext.calibration.capture import collecting, run_batch
from sere_ext.calibration.experts import find_experts
from sere_ext.calibration.moments import make_moments
from sere_ext.calibration.run import Options, calibrate
from sere_ext.contract.errors import UnsupportedError
from sere_ext.contract.model_config import language_config
from sere_ext.similarity.file import read_similarity
from tests.kit import TINY_MOE

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 24, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "num_experts_per_tok": 2,
    "moe_intermediate_size": 24, "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "depth": 1, "num_heads": 2, "num_hidden_layers": 1, "num_attention_heads": 2,
    "out_hidden_size": 32, "patch_size": 4, "image_size": 8,
}  # fmt: skip
DEEP = {**VISION, "deepstack_visual_indexes": [0]}
SOUND = {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "output_dim": 32}


def rotary(**more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, **more}}


MULTIMODAL: dict[str, dict[str, Any]] = {
    "qwen3_vl_moe": {"text_config": {**TEXT, "num_experts": 4, **rotary(mrope_section=[2, 1, 1])}, "vision_config": DEEP},
    "qwen3_5_moe": {
        "text_config": {
            **TEXT, "num_experts": 4, "shared_expert_intermediate_size": 24, "layer_types": ["full_attention"] * 2,
            **rotary(mrope_section=[2, 1, 1], partial_rotary_factor=1.0),
        },
        "vision_config": VISION,
    },
    "glm4v_moe": {
        "text_config": {
            **TEXT, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
            **rotary(mrope_section=[1, 1, 2], partial_rotary_factor=1.0),
        },
        "vision_config": VISION,
    },
    "llama4": {
        "text_config": {**TEXT, "num_local_experts": 4, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 1, **rotary()},
        "vision_config": {**VISION, "vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
    },
    "gemma4": {
        "text_config": {**TEXT, "num_experts": 4, "top_k_experts": 2, "enable_moe_block": True, "hidden_size_per_layer_input": 0},
        "vision_config": None, "audio_config": None,
    },
    "minimax_m3_vl": {"text_config": {**TEXT, "num_local_experts": 4}, "vision_config": VISION},
    "qwen3_omni_moe_thinker": {
        "text_config": {**TEXT, "num_experts": 4, **rotary(mrope_section=[2, 1, 1])}, "vision_config": DEEP, "audio_config": SOUND,
    },
}  # fmt: skip


def folder(path: Path, network: Any) -> Path:
    """A checkpoint of the network with the small model's tokenizer."""
    network.save_pretrained(path)
    for file in TINY_MOE.glob("tokenizer*"):
        shutil.copy(file, path)
    return path


def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i}+{i + 3}={2 * i + 3}"}) + "\n" for i in range(8)))
    return path


@pytest.mark.parametrize("family", MULTIMODAL)
def test_a_multimodal_model_calibrates_its_language_model(family: str, tmp_path: Path) -> None:
    """From a saved checkpoint, the artefact holds what the text decoder of the network in memory answers to the same texts."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **MULTIMODAL[family])
    network = loading._class_of(config).from_config(config).eval()
    for parameter in network.parameters():  # weights as small as a fresh model's make all experts alike
        torch.nn.init.normal_(parameter, std=0.3)
    model = folder(tmp_path / "model", network)
    data = texts(tmp_path)
    calibrate(str(model), data, tmp_path / "out.safetensors", Options(batch=8))
    found = read_similarity(tmp_path / "out.safetensors")
    assert found.meta.num_experts == 4 and found.meta.tokens > 0

    reader = loading.language_model(network)
    layers = find_experts(reader)
    assert set(found.matrices) == set(layers)
    tokenizer, _ = loading.load(str(TINY_MOE), None, "cpu", trust=False)
    sums = {n: make_moments("frobenius", layer.num_experts, "cpu") for n, layer in layers.items()}
    lines = [json.loads(line)["text"] for line in data.read_text().splitlines()]
    with torch.inference_mode(), collecting(layers, sums) as batch:
        run_batch(reader, batch, [tokenizer(line)["input_ids"] for line in lines], 0)
    for n, matrix in found.matrices.items():
        np.testing.assert_allclose(matrix, sums[n].matrix(), atol=1e-4)
        assert np.ptp(matrix) > 0.01, "experts differ"


def test_settings_of_a_model_that_also_speaks_are_those_of_its_thinker() -> None:
    config = {"model_type": "o", "hidden_size": 1, "thinker_config": {"model_type": "t", "text_config": {"hidden_size": 7}}}
    merged = language_config(config)
    assert (merged["hidden_size"], merged["model_type"]) == (7, "t")


def changed(path: Path, source: Path, change: Callable[[dict[str, Any]], dict[str, Any]], method: str, **settings: Any) -> Path:
    """A copy of a checkpoint with other tensors and a quantisation in its configuration."""
    shutil.copytree(source, path)
    save_file(change(load_file(path / "model.safetensors")), path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method, **settings}}))
    return path


def scaled_to_fp8(block: bool) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Linear weights as float8 with a scale: of the whole (they are smaller than one block of 128 x 128), or of each row."""

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        made = {}
        for name, weight in tensors.items():
            if weight.dim() != 2 or "proj" not in name:
                made[name] = weight
                continue
            scale = (weight.abs().max().reshape(1, 1) if block else weight.abs().amax(1, keepdim=True)) / 448
            made[name] = (weight / scale).to(torch.float8_e4m3fn)
            made[name + ("_scale_inv" if block else "_scale")] = scale
        return made

    return change


FP8 = {"activation_scheme": "dynamic", "weight_block_size": [128, 128], "fmt": "e4m3"}
EIGHT_BITS = {"num_bits": 8, "type": "float", "symmetric": True}
COMPRESSED = {
    "format": "float-quantized", "quantization_status": "compressed", "ignore": ["lm_head", "re:.*gate$"],
    "config_groups": {"group_0": {
        "targets": ["Linear"], "weights": {**EIGHT_BITS, "strategy": "channel", "dynamic": False},
        "input_activations": {**EIGHT_BITS, "strategy": "token", "dynamic": True},
    }},
}  # fmt: skip


@pytest.mark.parametrize(("method", "settings"), [("fp8", FP8), ("compressed-tensors", COMPRESSED)])
def test_a_quantised_model_is_calibrated_dequantised(method: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Its similarities are the plain model's but for the rounding to 8 bits, and the file fits both."""
    model = changed(tmp_path / "model", TINY_MOE, scaled_to_fp8(method == "fp8"), method, **settings)
    data = texts(tmp_path)
    plain = calibrate(str(TINY_MOE), data, tmp_path / "plain.safetensors", Options(batch=8))
    made = calibrate(str(model), data, tmp_path / "out.safetensors", Options(batch=8))
    assert made.config_digest == plain.config_digest
    want, found = (read_similarity(tmp_path / name).matrices for name in ("plain.safetensors", "out.safetensors"))
    for n in want:
        assert 0 < np.abs(want[n] - found[n]).max() < 0.03
        assert np.ptp(want[n]) > 0.3


def test_a_model_of_four_bit_floats_is_calibrated_dequantised(tmp_path: Path) -> None:
    """gpt-oss as it is published: blocks of 32 values of 4 bits, each block with a power of two as its scale."""
    torch.manual_seed(0)
    sizes = {**TEXT, "hidden_size": 64, "intermediate_size": 64, "head_dim": 16, "num_local_experts": 4}
    plain = folder(tmp_path / "plain", AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_oss", **sizes)))
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
    exact: dict[str, Any] = {}

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        made = {}
        for name, weight in tensors.items():
            if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                made[name] = exact[name] = weight
                continue
            experts, inputs, outs = weight.shape
            codes = torch.randint(0, 16, (experts, outs, inputs // 32, 32), dtype=torch.uint8)
            scales = torch.randint(121, 125, (experts, outs, inputs // 32), dtype=torch.uint8)
            made[name + "_blocks"] = codes[..., 0::2] | (codes[..., 1::2] << 4)
            made[name + "_scales"] = scales
            numbers = values[codes.long()] * 2.0 ** (scales.float() - 127)[..., None]
            exact[name] = numbers.reshape(experts, outs, inputs).transpose(1, 2).contiguous()
        return made

    model = changed(tmp_path / "model", plain, change, "mxfp4", modules_to_not_convert=["model.layers.*.self_attn"])
    save_file(exact, plain / "model.safetensors", {"format": "pt"})
    data = texts(tmp_path)
    for source, out in ((plain, "plain.safetensors"), (model, "out.safetensors")):
        calibrate(str(source), data, tmp_path / out, Options(batch=8))
    want, found = (read_similarity(tmp_path / name).matrices for name in ("plain.safetensors", "out.safetensors"))
    for n in want:
        np.testing.assert_allclose(found[n], want[n], atol=0.02)  # it is loaded as bfloat16
        assert np.ptp(want[n]) > 0.05


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("awq", {"bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}),
        ("gptq", {"bits": 4, "group_size": 32}),
        ("bitsandbytes", {"load_in_4bit": True}),
        ("quark", {}),
        ("modelopt", {"quant_algo": "NVFP4"}),
        ("something-new", {}),
    ],
)
def test_what_cannot_be_dequantised_asks_for_the_unquantised_twin(method: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Also where the weights could be read: numbers in an unknown form would give a similarity that is wrong in silence."""
    model = changed(tmp_path / "model", TINY_MOE, lambda tensors: tensors, method, **settings)
    with pytest.raises(UnsupportedError) as refused:
        calibrate(str(model), texts(tmp_path), tmp_path / "out.safetensors", Options(batch=8))
    assert str(refused.value) == (
        f"{model} is quantised by {method}, which transformers cannot undo; run `sere calibrate` on the unquantised model that it was "
        "made from, whose file fits this one too (--similarity FILE of `sere tune`)"
    )
    assert not (tmp_path / "out.safetensors").exists()


def test_a_missing_part_of_transformers_is_named_beside_the_twin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = changed(tmp_path / "model", TINY_MOE, scaled_to_fp8(block=True), "fp8", **FP8)
    monkeypatch.setattr("transformers.quantizers.quantizer_finegrained_fp8.is_accelerate_available", lambda *_: False)
    with pytest.raises(
        UnsupportedError, match=r"quantised by fp8, and what undoes that is missing \(.*accelerate.*\); run `sere cal"
    ):
        calibrate(str(model), texts(tmp_path), tmp_path / "out.safetensors", Options(batch=8))
