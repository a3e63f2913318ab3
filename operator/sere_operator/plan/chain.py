"""Checklists as code: an ordered tuple of named functions, of which the first that has an answer decides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def first(checks: Sequence[Callable[P, T | None]], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """The answer of the first check that has one; None if no check has."""
    for check in checks:
        answer = check(*args, **kwargs)
        if answer is not None:
            return answer
    return None
