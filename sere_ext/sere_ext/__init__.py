"""SERE (similarity-based expert re-routing, arXiv 2602.07616) for vLLM.

Importing this package loads neither torch nor vLLM: the policy, similarity and profile types are shared
with the tuner and the operator, whose images carry neither.
"""

__version__ = "0.1.0"
