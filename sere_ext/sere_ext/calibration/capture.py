"""What the experts of a model are asked while texts run through it, as running sums; padding never enters them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sere_ext.calibration.experts import ExpertLayer
from sere_ext.calibration.moments import HALVES, Moments
from sere_ext.contract.errors import UnsupportedError

_CHUNK_BYTES = 64 * 1024 * 1024  # of expert outputs held at once


@dataclass
class Batch:
    """What the hooks know of the batch in flight: which rows are tokens, and which half of the data each belongs to."""

    rows: list[Any] = field(default_factory=list)  # of each half: int64 [n], rows of the flattened [B * L]
    shape: tuple[int, int] = (0, 0)  # B, L
    asked: dict[int, Any] = field(default_factory=dict)  # by layer with listed experts: what its block is asked, [B * L, H]


def run_batch(network: Any, batch: Batch, tokens: Sequence[Sequence[int]], first_text: int) -> None:
    """Send texts (token ids each) through the model at once, padded on the right; text t belongs to half t % 2.

    On the right, since under causal attention no token then sees padding, whatever a model does with the mask.
    """
    import torch

    longest = max(map(len, tokens))
    if not longest:
        return
    mask = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in tokens])
    ids = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in tokens])
    halves = (torch.arange(len(tokens)) + first_text) % HALVES
    device = network.device
    flat = [(mask.bool() & (halves == half)[:, None]).reshape(-1).nonzero()[:, 0] for half in range(HALVES)]
    batch.rows, batch.shape = [rows.to(device) for rows in flat], (len(tokens), longest)
    network.base_model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False)


@contextmanager
def collecting(layers: dict[int, ExpertLayer], sums: dict[int, Moments]) -> Iterator[Batch]:
    """While open, what the layers' experts are asked goes into `sums`, for the batch that is set in the yielded object."""
    batch = Batch()
    hooks = []
    for number, layer in layers.items():
        hooks.append(layer.asked.register_forward_pre_hook(_collector(layer, sums[number], batch), with_kwargs=True))
        if layer.listed:
            hooks.extend(expert.register_forward_pre_hook(_proof(layer, batch)) for expert in layer.experts)
    try:
        yield batch
    finally:
        for hook in hooks:
            hook.remove()


def _collector(layer: ExpertLayer, total: Moments, batch: Batch) -> Callable[..., None]:
    def hook(_module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        hidden = inputs[0] if inputs else named["hidden_states"]
        hidden = hidden.reshape(-1, hidden.shape[-1])
        if hidden.shape[0] != batch.shape[0] * batch.shape[1]:
            raise UnsupportedError(
                f"{_named(layer)} are asked {hidden.shape[0]} rows for {batch.shape[0]} x {batch.shape[1]} tokens, so it is "
                "not known which row is which; this model cannot be calibrated by this release"
            )
        if layer.listed:
            batch.asked[layer.number] = hidden
        step = max(1, _CHUNK_BYTES // (4 * layer.num_experts * hidden.shape[-1]))
        for half, rows in enumerate(batch.rows):
            for part in rows.split(step) if len(rows) else ():
                total.add(layer.answers(hidden[part]), half)

    return hook


def _proof(layer: ExpertLayer, batch: Batch) -> Callable[[Any, tuple[Any, ...]], None]:
    """Experts in a list are asked by the block around them: what they get must be what the block got."""

    def hook(_module: Any, inputs: tuple[Any, ...]) -> None:
        rows = inputs[0].reshape(-1, inputs[0].shape[-1])
        block = batch.asked[layer.number]
        if len(rows) and (rows.shape[1] != block.shape[1] or not (block == rows[0]).all(-1).any()):
            raise UnsupportedError(
                f"{_named(layer)} are not asked what their block is asked; this model cannot be calibrated by this release"
            )

    return hook


def _named(layer: ExpertLayer) -> str:
    return f"the experts of layer {layer.number} ({type(layer.asked).__name__})"
