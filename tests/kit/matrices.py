"""Similarity matrices for artefacts of tests."""

from __future__ import annotations

from typing import Any

import numpy as np


def symmetric(values: Any) -> Any:
    """A similarity matrix, float32 [E, E], made of any square values: symmetric, with ones on the diagonal."""
    matrix = ((values + values.T) / 2).astype(np.float32)
    np.fill_diagonal(matrix, 1)
    return matrix
