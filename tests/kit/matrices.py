"""Similarity matrices for artefacts of tests."""

from __future__ import annotations

from typing import Any

import numpy as np


def symmetric(values: Any) -> Any:
    """float32 [E, E] of any square values: as alike one way as the other, diagonal 1."""
    matrix = ((values + values.T) / 2).astype(np.float32)
    np.fill_diagonal(matrix, 1)
    return matrix
