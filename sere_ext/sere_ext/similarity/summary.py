"""How alike the experts of each layer are, in numbers that a threshold rho can be compared with. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from sere_ext.contract.similarity import SimilarityMeta
from sere_ext.similarity.packing import Matrix


def describe(meta: SimilarityMeta, matrices: Iterable[Matrix]) -> str:
    """One line for each layer: quantiles over experts of the similarity to the nearest other expert."""
    lines = []
    for layer, matrix in zip(meta.layers, matrices, strict=True):
        low, mid, high = nearest_quantiles(matrix)
        lines.append(f"layer {layer}: nearest expert {low:.2f} / {mid:.2f} / {high:.2f} (10th, 50th, 90th percentile)")
    return "\n".join(lines)


def nearest_quantiles(matrix: Matrix) -> tuple[float, float, float]:
    """10th, 50th and 90th percentile over experts of the similarity to the most similar other one."""
    low, mid, high = np.quantile(nearest_similarity(matrix), [0.1, 0.5, 0.9])
    return float(low), float(mid), float(high)


def nearest(matrix: Matrix, allowed: np.ndarray[Any, Any] | None = None) -> np.ndarray[Any, Any]:
    """Per expert the id of its most similar one, int64 [E]; ties go to the lower id as in the kernels.

    Args:
        matrix: [E, E]; NaN counts as the least similar of all.
        allowed: bool [E, E], which experts are candidates for which; None: all others.
    """
    allowed = ~np.eye(matrix.shape[0], dtype=bool) if allowed is None else allowed
    return np.where(allowed, np.nan_to_num(matrix, nan=-2.0), -3.0).argmax(axis=1)


def nearest_similarity(matrix: Matrix) -> np.ndarray[Any, Any]:
    """Per expert the similarity to its most similar other one, float32 [E]; -inf where all others are NaN."""
    found = np.take_along_axis(matrix, nearest(matrix)[:, None], axis=1)[:, 0]
    return np.nan_to_num(found, nan=-np.inf)
