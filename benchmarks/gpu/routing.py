"""Random weights whose routing is known: one model that routes evenly or skewed, by which tokens it is asked.

What vLLM's own dummy weights give is near zero everywhere, norms included, so that answers and routing say nothing. Here the
embedding is what a token is: it dominates the residual stream, and its coordinates are Gumbel noise, of which each router reads
another one per expert. Tokens of even id also carry a constant first coordinate, through which each router adds its own order of
favourites: they draw experts with the skew of `bound.py`, tokens of odd id evenly. The head answers token t with t + `STRIDE` (mod
the vocabulary), so that sequences that begin with different tokens never meet and stay on their side.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from benchmarks.gpu.bound import gumbel, zipf
from benchmarks.gpu.shapes import Shape

STRIDE = 2 * 7919  # even: a token's successor is on its side
LOAD_FORMAT = "sere_random"
EULER, DEVIATION = 0.5772157, math.pi / math.sqrt(6)  # mean and standard deviation of Gumbel noise
EXPERT_SHARE = 0.03  # size of an expert layer's output beside the residual stream's
MARGIN = 2.0  # of the answer's logit over the logarithm of the vocabulary
ROUTINGS = ("uniform", "skewed")


def prompts(shape: Shape, routing: str, batch: int, length: int, number: int) -> list[list[int]]:
    """Token ids of `batch` prompts of one kind of routing; another `number` gives others. Last tokens are all different."""
    half = shape.vocabulary // 2
    source = torch.Generator().manual_seed(number)
    start = torch.randperm(half, generator=source)[: batch * length].view(batch, length)
    return (2 * start + (routing == "uniform")).tolist()


def successor(tokens: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """What the head answers after each token. The vocabulary must be even."""
    return (tokens + STRIDE) % vocabulary


def first_coordinate(shape: Shape) -> float:
    """The constant that tokens of even id carry: a quarter of a normal token's energy."""
    return 0.5 * math.sqrt(shape.hidden)


def embedding(shape: Shape, device: Any, dtype: torch.dtype) -> torch.Tensor:
    """[V, H], Gumbel noise of mean 0 and variance 1 but for the first coordinate."""
    source = torch.Generator(device).manual_seed(11)
    found = torch.empty(shape.vocabulary, shape.hidden, device=device, dtype=dtype)
    for part in found.split(1 << 14):  # noise is made in float32, a few rows at a time
        part.copy_((gumbel(torch.empty_like(part, dtype=torch.float32), source) - EULER) / DEVIATION)
    found[0::2, 0] = first_coordinate(shape)
    found[1::2, 0] = 0.0
    return found


def router(shape: Shape, layer: int) -> torch.Tensor:
    """[E, H] float32: each expert reads one coordinate as its noise, and its log-weight off the first. `layer` seeds the choice."""
    source = torch.Generator().manual_seed(1000 + layer)
    norm = math.sqrt(
        1 + first_coordinate(shape) ** 2 / shape.hidden
    )  # what the norm before it divides by, where the first is set
    own = 1 + torch.randperm(shape.hidden - 1, generator=source)[: shape.experts]
    favourites = zipf(shape.experts)[torch.randperm(shape.experts, generator=source)]
    found = torch.zeros(shape.experts, shape.hidden)
    found[torch.arange(shape.experts), own] = DEVIATION * norm
    found[:, 0] = (favourites - favourites.mean()) * norm / first_coordinate(shape)
    return found


@torch.no_grad()
def fill(model: torch.nn.Module, shape: Shape) -> None:
    """Put the weights into a loaded model, before its kernels pack them. Expert weights are those of the dummy loader, scaled.

    Raises:
        ValueError: a parameter that this needs is not there; the engine's names have changed.
    """
    seen = {"embed": 0, "head": 0, "gate": 0, "w13": 0, "w2": 0}
    for name, weight in model.named_parameters():
        if "norm" in name and weight.dim() == 1:
            weight.fill_(1.0)
        elif name.endswith("embed_tokens.weight"):
            weight[: shape.vocabulary] = embedding(shape, weight.device, weight.dtype)
            seen["embed"] += 1
        elif name.endswith("lm_head.weight"):
            rows = embedding(shape, weight.device, weight.dtype)
            rows[:, 0] = 0.0
            rows *= (math.log(shape.vocabulary) + MARGIN) / shape.hidden  # so that a log-probability is no zero
            weight[successor(torch.arange(shape.vocabulary, device=weight.device), shape.vocabulary)] = rows
            seen["head"] += 1
        elif name.endswith(".gate.weight") and weight.shape[0] == shape.experts:
            weight.copy_(router(shape, seen["gate"]))
            seen["gate"] += 1
        elif name.endswith("w13_weight"):
            _scale_to(weight, 1 / math.sqrt(shape.hidden))  # gate and up of variance 1
            seen["w13"] += 1
        elif name.endswith("w2_weight"):
            inner = shape.get("moe_intermediate_size")
            _scale_to(weight, EXPERT_SHARE / (0.36 * math.sqrt(inner)))  # silu(g) * u of two normal variables: 0.36
            seen["w2"] += 1
    wanted = {"embed": 1, "head": 1, "gate": shape.moe_layers, "w13": shape.moe_layers, "w2": shape.moe_layers}
    if seen != wanted:
        raise ValueError(f"the model's parameters are not named as expected: found {seen}, wanted {wanted}")


def _scale_to(weight: torch.Tensor, deviation: float) -> None:
    """Bring a tensor to a standard deviation, read off a part of it."""
    weight.mul_(deviation / weight.flatten()[: 1 << 20].float().std())


def register(shape: Shape) -> str:
    """Teach vLLM (in this process) a load format that makes these weights; returns its name."""
    from vllm.model_executor.model_loader import register_model_loader
    from vllm.model_executor.model_loader.dummy_loader import DummyModelLoader

    @register_model_loader(LOAD_FORMAT)
    class Random(DummyModelLoader):
        def load_weights(self, model: Any, model_config: Any) -> None:
            super().load_weights(model, model_config)
            fill(model, shape)

    return LOAD_FORMAT
