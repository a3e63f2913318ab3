"""The CUDA kernel keeps the contract, alone and inside a captured graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sere_ext.contract.policy import Bucket, Kind
from sere_ext.routing import kernel
from sere_ext.routing.reference import reroute
from sere_ext.routing.state import LayerState
from sere_ext.similarity.file import sorted_neighbours
from tests.kit.reroute_contract import KernelContract, Tensors, kernel_call, large

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device; run 'make test-gpu' on a machine that has one"),
]


def mirror(layer: LayerState) -> Any:
    from sere_ext.routing.cuda import CudaMirror

    found = CudaMirror([layer])
    found.push(similarity=True)
    return found


def on_device(tensors: Tensors) -> Tensors:
    return {name: tensor.cuda() for name, tensor in tensors.items()}


class TestCudaKernel(KernelContract):
    def launch(self, layer: LayerState, tensors: Tensors) -> None:
        held, there = mirror(layer), on_device(tensors)
        held.push_real(int(layer.real[0]))
        kernel.reroute_cuda(layer.struct, kernel_call(there), torch.cuda.current_stream().cuda_stream)
        held.pull(wait=True)
        tensors.update({name: tensor.cpu() for name, tensor in there.items()})


def test_a_captured_graph_follows_the_policy_and_counts() -> None:
    call = large(Kind.SERE, seed=7, tokens=16, experts=64, top_k=8, renormalise=False)
    layer = LayerState(0, 64, 8, False, kernel.SOFTMAX)
    layer.load_similarity(*sorted_neighbours(call["similarity"].numpy()))
    held = mirror(layer)
    given = on_device({name: call[name] for name in ("weights", "ids", "logits")})
    there = {name: tensor.clone() for name, tensor in given.items()}
    kernel.reroute_cuda(layer.struct, kernel_call(there), torch.cuda.current_stream().cuda_stream)  # loads the module
    held.pull(wait=True)
    layer.counters[:] = 0
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.reroute_cuda(layer.struct, kernel_call(there), torch.cuda.current_stream().cuda_stream)
    replays = [[], [Bucket(min_tokens=1, kind="sere", S=2, rho=0.5)], [Bucket(min_tokens=8, maxTokens=16, kind="topk", S=1)]]
    for count, table in enumerate(replays, start=1):
        layer.load_table(tuple(table))
        held.push(similarity=False)
        there["ids"].copy_(given["ids"])
        there["weights"].copy_(given["weights"])
        graph.replay()
        torch.cuda.synchronize()
        kind, S, rho = (table[0].kind, table[0].S or 1, table[0].rho) if table else (Kind.EXACT, 1, 0.0)
        want = reroute(**call | {"kind": kind, "S": S, "rho": rho})
        assert torch.equal(there["ids"].cpu(), want.ids)
        assert torch.equal(there["weights"].cpu(), want.weights)
        held.pull(wait=True)
        assert layer.counters[:, kernel.CALLS].sum() == count
        assert not np.array_equal(layer.counters[0], layer.counters[-1])
