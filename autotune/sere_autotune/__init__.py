"""Searches SERE's thresholds on a live engine against latency limits and an accuracy budget."""
