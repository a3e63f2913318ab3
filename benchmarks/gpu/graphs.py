"""Times of CUDA graphs that hold a chain of calls; on a CPU, loops in their place, whose times say nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any


class Loop:
    """In place of a graph on a CPU."""

    def __init__(self, form: Callable[[], Any], calls: int) -> None:
        self._form, self._calls = form, calls

    def instantiate(self) -> None: ...

    def replay(self) -> None:
        for _ in range(self._calls):
            self._form()


def graph_of(form: Callable[[], Any], calls: int, device: str = "cuda") -> Any:
    """A captured graph of so many calls in a chain, not yet instantiated."""
    import torch

    for _ in range(3):
        form()
    if device == "cpu":
        return Loop(form, calls)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        for _ in range(calls):
            form()
    return graph


def replayed(graphs: dict[str, Any], calls: int, replays: int, device: str = "cuda") -> dict[str, float]:
    """Median of the microseconds per call of each graph's replays, which take turns."""
    import torch

    taken: dict[str, list[float]] = {name: [] for name in graphs}
    if device == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for number in range(-3, replays):
        for name, graph in graphs.items():
            if device == "cuda":
                begin.record()
                graph.replay()
                end.record()
                end.synchronize()
                us = 1e3 * begin.elapsed_time(end)
            else:
                began = time.perf_counter()
                graph.replay()
                us = 1e6 * (time.perf_counter() - began)
            if number >= 0:  # the first ones warm up
                taken[name].append(us / calls)
    return {name: statistics.median(times) for name, times in taken.items()}
