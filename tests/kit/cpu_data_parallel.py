"""Lets vLLM's CPU engine serve data-parallel MoE models, which 0.32 cannot: its CPU communicator lacks two collectives.

Named by `--worker-extension-cls tests.kit.cpu_data_parallel.Exchange`, so that every worker imports this file. Only for tests of what
happens between data-parallel engines; gloo has neither collective, so both are made of plain ones.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator


def all_gatherv(self: Any, input_: Any, dim: int = 0, sizes: list[int] | None = None) -> Any:
    """Gather the rows of all ranks in rank order; rank r contributes `sizes[r]` rows."""
    if isinstance(input_, list):
        return [all_gatherv(self, part, dim, sizes) for part in input_]
    rows = sizes or [input_.shape[0]] * self.world_size
    padded = input_.new_zeros((max(rows), *input_.shape[1:]))
    padded[: input_.shape[0]] = input_
    gathered = [torch.empty_like(padded) for _ in rows]
    dist.all_gather(gathered, padded, group=self.device_group)
    return torch.cat([part[:count] for part, count in zip(gathered, rows, strict=True)])


def reduce_scatterv(self: Any, input_: torch.Tensor, dim: int = -1, sizes: list[int] | None = None) -> torch.Tensor:
    """Sum the rows over ranks; rank r keeps its own `sizes[r]` rows of the sum."""
    rows = sizes or [input_.shape[0] // self.world_size] * self.world_size
    total = input_.clone()
    dist.all_reduce(total, group=self.device_group)
    start = sum(rows[: self.rank_in_group])
    return total[start : start + rows[self.rank_in_group]].clone()


CpuCommunicator.all_gatherv = all_gatherv
CpuCommunicator.reduce_scatterv = reduce_scatterv


class Exchange:
    """Adds nothing to a worker; naming it makes every worker import this file."""
