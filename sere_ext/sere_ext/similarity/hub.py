"""The config.json of a model, from its folder or from the hub."""

from __future__ import annotations

import json
from pathlib import Path


def model_config_dict(model: str, revision: str | None = None) -> dict[str, object]:
    """The decoded config.json of a model directory or hub name, as `model_config_digest` expects it."""
    local = Path(model) / "config.json"
    if local.is_file():
        decoded: dict[str, object] = json.loads(local.read_text())
        return decoded
    from transformers import PretrainedConfig

    return dict(PretrainedConfig.get_config_dict(model, revision=revision)[0])
