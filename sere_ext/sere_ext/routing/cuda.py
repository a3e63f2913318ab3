"""The layers' arrays on a GPU: allocated once, updated in place, so that captured CUDA graphs see every change.

Compiled by nvcc in the tests; it has not yet run on a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sere_ext.routing import kernel
from sere_ext.routing.state import LayerState


class CudaMirror:
    """`state.Mirror` on one CUDA device. The layers' structs hold its addresses from now on."""

    def __init__(self, layers: list[LayerState], device: torch.device | str = "cuda") -> None:
        self.layers = layers
        self._tables = torch.from_numpy(np.stack([layer.table for layer in layers])).to(device)
        self._neighbours = [torch.from_numpy(layer.neighbours.view(np.int16)).to(device) for layer in layers]
        self._similarities = [torch.from_numpy(layer.similarities).to(device) for layer in layers]
        self._counters = torch.zeros((len(layers), *layers[0].counters.shape), dtype=torch.int64, device=device)
        self._seen: Any = np.zeros(tuple(self._counters.shape), np.int64)
        for index, layer in enumerate(layers):
            tensors = (self._tables[index], self._neighbours[index], self._similarities[index], self._counters[index])
            layer.struct = kernel.Layer(
                *(tensor.data_ptr() for tensor in tensors), layer.experts, layer.renormalise, layer.scoring or 0
            )

    def push(self, *, similarity: bool) -> None:
        """See `state.Mirror`. Waits on both sides: a step in flight ends under the old policy, the next begins under the new."""
        torch.cuda.synchronize(self._tables.device)
        self._tables.copy_(torch.from_numpy(np.stack([layer.table for layer in self.layers])))
        if similarity:
            for layer, neighbours, similarities in zip(self.layers, self._neighbours, self._similarities, strict=True):
                neighbours.copy_(torch.from_numpy(layer.neighbours.view(np.int16)))
                similarities.copy_(torch.from_numpy(layer.similarities))
        torch.cuda.synchronize(self._tables.device)

    def pull(self) -> None:
        """See `state.Mirror`. The device only ever adds, so no step can be missed between reading and clearing."""
        now = self._counters.cpu().numpy().copy()
        for layer, gained in zip(self.layers, now - self._seen, strict=True):
            layer.counters += gained
        self._seen = now
