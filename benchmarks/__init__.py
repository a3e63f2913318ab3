"""Measurements: each module is one, run as `python -m benchmarks.NAME`, and says in its first line what it measures."""
