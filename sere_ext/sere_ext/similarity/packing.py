"""A similarity matrix in one byte per pair: the strict upper triangle as int8 with a range of its own per layer. Pure.

Values are stored as low + step * (q + 128); 256 steps span what occurs in the layer, so an error is at most half a step.
The diagonal is 1 by definition and is not stored.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_LEVELS = 255

Matrix = np.ndarray[Any, np.dtype[np.float32]]
Triangle = np.ndarray[Any, np.dtype[np.int8]]


def pack(matrix: Matrix) -> tuple[Triangle, tuple[float, float]]:
    """Pack a symmetric, finite [E, E] matrix: int8 [E (E - 1) / 2] row by row above the diagonal, and (low, step)."""
    upper = matrix[np.triu_indices(matrix.shape[0], 1)].astype(np.float64)
    if not upper.size:
        return np.zeros(0, np.int8), (0.0, 0.0)
    low, step = float(upper.min()), float(np.ptp(upper)) / _LEVELS
    levels = np.rint((upper - low) / step) if step > 0 else np.zeros_like(upper)
    return (levels - 128).astype(np.int8), (low, step)


def unpack(triangle: Triangle, scale: tuple[float, float], experts: int) -> Matrix:
    """Unpack `pack`'s answer to a float32 [E, E] matrix, symmetric with diagonal 1."""
    low, step = scale
    matrix = np.ones((experts, experts), np.float32)
    rows, columns = np.triu_indices(experts, 1)
    matrix[rows, columns] = matrix[columns, rows] = low + step * (triangle.astype(np.float64) + 128)
    return matrix
