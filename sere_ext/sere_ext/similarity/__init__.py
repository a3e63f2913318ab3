"""Similarity files: reading, writing, packing and showing the matrices that say how alike a model's experts are."""
