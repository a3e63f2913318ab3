"""The layers' arrays on a GPU: allocated once, updated in place, so that captured CUDA graphs see every change.

Compiled by nvcc in the tests; it has not yet run on a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sere_ext.routing.state import ALL_REAL, LayerState


class CudaMirror:
    """`state.Mirror` on one CUDA device. The layers' structs hold its addresses from now on."""

    def __init__(self, layers: list[LayerState], device: torch.device | str = "cuda") -> None:
        self.layers = layers
        self._tables = torch.from_numpy(np.stack([layer.table for layer in layers])).to(device)
        self._limits = torch.from_numpy(np.stack([layer.limits for layer in layers]).view(np.int16)).to(device)
        self._neighbours = [torch.from_numpy(layer.neighbours.view(np.int16)).to(device) for layer in layers]
        self._counters = torch.zeros((len(layers), *layers[0].counters.shape), dtype=torch.int64, device=device)
        self._real = torch.full((1,), ALL_REAL, dtype=torch.int32, device=device)
        # Pinned memory is what lets a copy to the host run behind the steps that are launched while nobody waits for it.
        self._copied = torch.zeros(self._counters.shape, dtype=torch.int64, pin_memory=self._counters.is_cuda)
        self._arrived: torch.cuda.Event | None = None  # of the copy of the counters that is under way
        self._steps_copied = 0  # steps that were launched before that copy
        self._steps_seen = 0  # steps whose calls stand in `_seen`
        self._seen: Any = np.zeros(tuple(self._counters.shape), np.int64)
        for index, layer in enumerate(layers):
            tensors = (self._tables[index], self._neighbours[index], self._limits[index], self._counters[index], self._real)
            layer.point_at(*(tensor.data_ptr() for tensor in tensors))

    def push(self, *, similarity: bool) -> None:
        """See `state.Mirror`. Waits on both sides: a step in flight ends under the old policy, the next begins under the new."""
        torch.cuda.synchronize(self._tables.device)
        self._tables.copy_(torch.from_numpy(np.stack([layer.table for layer in self.layers])))
        self._limits.copy_(torch.from_numpy(np.stack([layer.limits for layer in self.layers]).view(np.int16)))
        if similarity:
            for layer, neighbours in zip(self.layers, self._neighbours, strict=True):
                neighbours.copy_(torch.from_numpy(layer.neighbours.view(np.int16)))
        torch.cuda.synchronize(self._tables.device)

    def push_real(self, tokens: int) -> None:
        """See `state.Mirror`. The number travels as an argument of the launch, so no host buffer has to outlive it."""
        self._real.fill_(tokens)

    def pull(self, *, wait: bool, steps: int = 0) -> int:
        """See `state.Mirror`. The device only ever adds, so no step can be missed between reading and clearing.

        A copy of the counters stands behind the steps that were launched before it. On a busy device a caller that does not
        wait gets the last copy that has arrived, and the next copy is started for the next caller. An idle device is read at
        once, since nothing but the copy itself would be waited for.
        """
        at_once = wait or torch.cuda.current_stream(self._counters.device).query()
        if at_once or self._arrived is None:
            self._start_copy(steps)
        if at_once:
            self._arrived.synchronize()  # type: ignore[union-attr]
        elif not self._arrived.query():  # type: ignore[union-attr]
            return self._steps_seen
        now = self._copied.numpy().copy()
        for layer, gained in zip(self.layers, now - self._seen, strict=True):
            layer.counters += gained
        self._seen, self._arrived = now, None
        self._steps_seen = self._steps_copied
        if not at_once:
            self._start_copy(steps)
        return self._steps_seen

    def _start_copy(self, steps: int) -> None:
        """Start to copy the counters behind the work that was launched so far, which `steps` steps belong to."""
        self._steps_copied = steps
        self._copied.copy_(self._counters, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record(torch.cuda.current_stream(self._counters.device))
