"""A wider model that computes the same function: ``python -m tests.assets.make.widen SOURCE DESTINATION``.

Each expert's neurons are repeated ``factor`` times and their outgoing weights divided by it, so that outputs are equal up to
rounding while an expert weighs ``factor`` times as much. Decode time is then ruled by reading expert weights, as it is in
a large model, and accuracy stays that of the small one: one model shows speed and quality together on a CPU.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.assets.make import models


def widen(source: Path, destination: Path, factor: int = 0, dtype: str = "") -> Path:
    """Write the widened form of the HF directory ``source`` to ``destination`` (made if missing) and return it.

    Args:
        factor: 0 takes the recipe's own.
        dtype: name of the torch type that all weights are stored in; empty takes the recipe's own.
    """
    factor, dtype = factor or models.of(source).widening, dtype or models.of(source).widened_dtype
    destination.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and path.name not in {"config.json", "model.safetensors"}:
            shutil.copy(path, destination / path.name)
    config = json.loads((source / "config.json").read_text())
    config["moe_intermediate_size"] *= factor
    config["dtype"] = dtype
    (destination / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    weights = load_file(source / "model.safetensors")
    for name, weight in weights.items():
        if ".mlp.experts." not in name:
            continue
        if name.endswith("down_proj.weight"):  # [H, I]: every copy contributes its share
            weights[name] = (weight / factor).repeat(1, factor).contiguous()
        else:  # gate and up, [I, H]
            weights[name] = weight.repeat(factor, 1).contiguous()
    weights = {name: weight.to(getattr(torch, dtype)) for name, weight in weights.items()}
    save_file(weights, destination / "model.safetensors", metadata={"format": "pt"})
    # safetensors writes for the owner only; a server in a container runs as somebody else.
    (destination / "model.safetensors").chmod(0o644)
    return destination


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="an HF directory, such as tests/assets/rows_moe")
    parser.add_argument("destination", type=Path)
    parser.add_argument("--factor", type=int, default=0, help="the model's own when not given")
    given = parser.parse_args()
    print(widen(given.source, given.destination, given.factor))


if __name__ == "__main__":
    main()
