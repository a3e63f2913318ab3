"""A small model with experts removed for good, as REAP and MoNE remove them: in `lanes.py`, and as a checkpoint.

    python -m benchmarks.pruned DESTINATION [--model DIR] [--kept SHARE]     # REAP; loads unchanged in transformers and vLLM

Shapes: L lanes, E experts of the whole model, H hidden size.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from benchmarks.experts import Experts, least, observed
from benchmarks.ground import CALIBRATION_ITEMS
from benchmarks.lanes import Lanes, Mix
from benchmarks.rerouted import Rerouted
from tests.assets.make import models


class Pruned(Lanes):
    """A model whose removed experts no token can choose (REAP), or whose removed experts put out their mean (MoNE).

    Args:
        removed: bool [layers, E].
        means: [layers, E, H] for MoNE, whose router still chooses among all experts; None for REAP.
    """

    def __init__(self, directory: Path, removed: Tensor, means: Tensor | None = None) -> None:
        super().__init__(directory)
        self.removed, self.means = removed, means

    def moe(self, layer: int, x: Tensor, route: Mix) -> Tensor:
        logits = functional.linear(x, self.weights[f"model.layers.{layer}.mlp.gate.weight"])
        if self.means is None:
            logits = logits.masked_fill(self.removed[layer], -torch.inf)
        mix = route(layer, logits)
        if self.means is not None:
            gone = mix * self.removed[layer]
            mix = torch.cat([mix - gone, gone], 1)
        return self.mixed(layer, x, mix)


def prune(directory: Path, found: Experts, method: str, kept: float) -> Pruned:
    """The model in ``directory`` with the share ``kept`` of every layer's experts, by method "reap" or "mone"."""
    removed = least(found.redundancy_order[method], kept)
    return Pruned(directory, removed, found.means if method == "mone" else None)


class Remaining:
    """A policy on a model pruned as MoNE prunes. The plug-in takes removed experts for ordinary ones; in the counts they are nothing.

    Args:
        inner: the policy.
        removed: bool [layers, E].
        batch: B.
    """

    def __init__(self, inner: Rerouted, removed: Tensor, batch: int) -> None:
        self.inner, self.removed, self.batch = inner, removed, batch
        self.before = self.after = self.slots = self.tokens = self.calls = 0

    def __call__(self, layer: int, logits: Tensor) -> Tensor:
        mix = self.inner(layer, logits)
        stays = ~self.removed[layer]
        for exact, own in zip(
            self.inner.model.exact(layer, logits).split(self.batch), (mix * stays).split(self.batch), strict=True
        ):
            self.before += int(((exact > 0) & stays).any(0).sum())
            self.after += int((own > 0).any(0).sum())
            self.slots += int((own > 0).sum())
            self.tokens += len(own)
            self.calls += 1
        return mix

    def counts(self) -> dict[str, float]:
        """Means over layers and steps, as `Rerouted.counts` gives them."""
        return {
            "activeBefore": self.before / self.calls,
            "active": self.after / self.calls,
            "slots": self.slots / self.tokens,
        }


def write(source: Path, destination: Path, removed: Tensor) -> Path:
    """Write ``source`` without the removed experts, the others numbered anew in their old order; returns ``destination``.

    Raises:
        ValueError: layers would keep different numbers of experts, which no config can say.
    """
    kept = (~removed).sum(1)
    if len(set(kept.tolist())) != 1:
        raise ValueError("every layer must keep as many experts as the others, since config.json has one number for all")
    destination.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and path.name not in {"config.json", "model.safetensors"}:
            shutil.copy(path, destination / path.name)
    config = json.loads((source / "config.json").read_text())
    name = "num_experts" if config.get("num_experts") else "num_local_experts"
    config[name] = int(kept[0])
    (destination / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    weights: dict[str, Tensor] = {}
    for key, weight in load_file(source / "model.safetensors").items():
        if ".mlp." not in key:
            weights[key] = weight
            continue
        layer = int(key.split(".")[2])
        stays = (~removed[layer]).nonzero().flatten().tolist()
        if ".mlp.gate." in key:
            weights[key] = weight[stays].contiguous()
        elif (expert := int(key.split(".")[5])) in stays:
            parts = key.split(".")
            parts[5] = str(stays.index(expert))
            weights[".".join(parts)] = weight
    save_file(weights, destination / "model.safetensors", metadata={"format": "pt"})
    return destination


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("destination", type=Path)
    parser.add_argument("--model", type=Path, default=models.ROWS_MOE.directory)
    parser.add_argument("--kept", type=float, default=0.75, help="share of every layer's experts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    items = models.of(args.model).tasks.items("calibration", CALIBRATION_ITEMS, 0)
    found = observed(Lanes(args.model), items)
    print(write(args.model, args.destination, least(found.redundancy_order["reap"], args.kept)))


if __name__ == "__main__":
    main()
