"""Similarity as its definitions say it, pair by pair over all outputs held at once: slow, and nothing of ours in it.

arXiv 2602.07616 and its repository's calibration; linear CKA as in Kornblith et al. 2019 (centred). Inputs are [E, N, H].
"""

from __future__ import annotations

from collections.abc import Callable

import torch


def frobenius(outputs: torch.Tensor) -> torch.Tensor:
    distance = _pairs(outputs, lambda a, b: torch.linalg.norm(a - b), 0.0)
    return 1 - distance / distance.max()


def cosine(outputs: torch.Tensor) -> torch.Tensor:
    return _pairs(outputs, lambda a, b: (torch.nn.functional.cosine_similarity(a, b, dim=-1).mean() + 1) / 2, 1.0)


def cka(outputs: torch.Tensor) -> torch.Tensor:
    def linear(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a, b = a - a.mean(0), b - b.mean(0)
        return torch.linalg.norm(b.T @ a) ** 2 / (torch.linalg.norm(a.T @ a) * torch.linalg.norm(b.T @ b))

    return _pairs(outputs, linear, 1.0)


def kernel_cka(outputs: torch.Tensor) -> torch.Tensor:
    """Linear CKA from centred kernel matrices [N, N], the form that other kernels (RBF, polynomial) need too."""

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        k, m = (y @ y.T for y in (a - a.mean(0), b - b.mean(0)))
        return (k * m).sum() / (torch.linalg.norm(k) * torch.linalg.norm(m))

    return _pairs(outputs, kernel, 1.0)


def _pairs(outputs: torch.Tensor, measure: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], diagonal: float) -> torch.Tensor:
    experts = outputs.shape[0]
    found = torch.full((experts, experts), diagonal, dtype=outputs.dtype)
    for i in range(experts):
        for j in range(i + 1, experts):
            found[i, j] = found[j, i] = measure(outputs[i], outputs[j])
    return found


METRICS = {"frobenius": frobenius, "cosine": cosine, "cka": cka}
LOOPS = {**METRICS, "cka, kernel matrices": kernel_cka}
