"""What a decode step can take at best, and what a straight line through measured steps predicts. No device, no engine."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.gpu.shapes import Shape

ZIPF = 1.1  # exponent of the skew that was fitted to published numbers of active experts (OEA, arXiv 2511.02237)


def bound_ms(shape: Shape, active: float, batch: int, context: float, bytes_per_s: float) -> float:
    """Time to read everything that a decode step needs once, in ms.

    Args:
        active: mean distinct experts per MoE layer.
        context: mean tokens in the cache per sequence.
        bytes_per_s: bandwidth that a copy reached.
    """
    moved = shape.moe_layers * active * shape.expert_bytes + shape.fixed_bytes + batch * context * shape.kv_bytes
    return 1e3 * moved / bytes_per_s


@dataclass(frozen=True)
class Line:
    """T = `base` + `per_expert` * active, in ms; `r2` is the share of the variance that it explains."""

    base: float
    per_expert: float
    r2: float

    def at(self, active: float) -> float:
        return self.base + self.per_expert * active

    def speedup(self, before: float, after: float) -> float | None:
        """Of a step whose active experts fall from `before` to `after`; None where the line leaves no time for either."""
        return self.at(before) / self.at(after) if min(self.at(before), self.at(after)) > 0 else None


def fit(points: Sequence[tuple[float, float]]) -> Line | None:
    """Least squares through (active experts, ms); None where fewer than three numbers of experts were seen."""
    if len({active for active, _ in points}) < 3:
        return None
    n = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / n, sum(y for _, y in points) / n
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    base = mean_y - slope * mean_x
    left = sum((y - base - slope * x) ** 2 for x, y in points)
    total = sum((y - mean_y) ** 2 for _, y in points)
    return Line(base, slope, 1 - left / total if total else 1.0)


def uniform_active(experts: int, top: int, batch: int) -> float:
    """Expected distinct experts if each token draws `top` of them evenly."""
    return experts * (1 - (1 - top / experts) ** batch)


def zipf(experts: int) -> torch.Tensor:
    """[E] log-weights of the fitted skew, most popular first."""
    return -ZIPF * torch.arange(1, experts + 1, dtype=torch.float32).log()


def gumbel(into: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    """Fill a tensor with standard Gumbel noise: the best `k` of log-weights plus it are a draw without replacement."""
    return into.exponential_(generator=source).log_().neg_()


def distinct(logits: torch.Tensor, top: int, batch: int) -> float:
    """Mean distinct experts of batches of `batch` tokens, from logits [tokens, E]."""
    ids = logits.topk(top, -1).indices
    used = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, ids, True)
    whole = len(logits) // batch * batch
    return float(used[:whole].view(-1, batch, logits.shape[1]).any(1).sum(1).float().mean())


@functools.cache
def skewed_active(experts: int, top: int, batch: int, batches: int = 200) -> float:
    """Expected distinct experts under the fitted skew: Plackett-Luce, so weights plus Gumbel noise (simulated, seeded)."""
    source = torch.Generator().manual_seed(experts)
    return distinct(zipf(experts) + gumbel(torch.empty(batches * batch, experts), source), top, batch)


def drawn_active(routing: str, experts: int, top: int, batch: int) -> float:
    """Expected distinct experts of one kind of routing."""
    return uniform_active(experts, top, batch) if routing == "uniform" else skewed_active(experts, top, batch)
