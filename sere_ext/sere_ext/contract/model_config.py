"""What a model's config.json says of the model, and whether a name means a folder or a model of the hub. Pure."""

from __future__ import annotations

from sere_ext.contract.record import canonical_json, content_digest

# What of a model's config.json decides whether similarity still fits: shape and routing, not serving details.
_CONFIG_KEYS = (
    "model_type", "hidden_size", "num_hidden_layers", "moe_intermediate_size", "intermediate_size", "num_experts",
    "num_local_experts", "n_routed_experts", "num_experts_per_tok", "vocab_size", "first_k_dense_replace",
    "decoder_sparse_step", "mlp_only_layers",
)  # fmt: skip

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.gguf")  # of a model's folder


def names_folder(model: str) -> bool:
    """Whether a model's name is meant as a local folder: a name of the hub has one slash at most."""
    return model.startswith(("/", ".", "~")) or model.count("/") > 1


def language_config(config: dict[str, object]) -> dict[str, object]:
    """A decoded config.json with the settings of its language model on top, which multimodal models nest.

    Models that also speak nest them twice, below the part that writes text (`thinker_config`).
    """
    for name in ("thinker_config", "text_config"):
        if isinstance(inner := config.get(name), dict):
            return language_config({**{key: value for key, value in config.items() if key != name}, **inner})
    return config


def model_config_digest(config: dict[str, object]) -> str:
    """Digest of the parts of a decoded config.json that similarity depends on. `sha256:` and 64 hex digits."""
    source = language_config(config)
    return content_digest(canonical_json({key: source.get(key) for key in _CONFIG_KEYS}))


def weight_format(config: dict[str, object], dtype: str, quantization: str | None) -> str:
    """How a model's weights are held: `bfloat16`, or `fp8-1a2b3c4d` of bfloat16 with a hash of the quantisation's settings.

    Models of one shape differ in it (BF16 and FP8 of one release), and so do their answers.

    Args:
        config: decoded config.json.
        dtype: that the engine computes in, such as `bfloat16`.
        quantization: as the engine names it, None for none.
    """
    settings = config.get("quantization_config") or config.get("compression_config")
    if not settings and quantization is None:
        return dtype
    method = quantization or (str(settings.get("quant_method", "quantised")) if isinstance(settings, dict) else "quantised")
    return f"{method}-{content_digest(canonical_json(settings)).removeprefix('sha256:')[:8]} of {dtype}"
