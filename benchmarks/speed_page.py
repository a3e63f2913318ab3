"""The tables of docs/speed.md: operators, decode steps and calibration, from benchmarks/results/ext.json."""

from __future__ import annotations

from typing import Any

from benchmarks.tables import interval, table, where


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
    return table(head, rows) + f"\nOne layer, 100 MB of expert weights, `sere S=2`; {where(part['machine'])}.\n"


def ext_decode(name: str, result: dict[str, Any]) -> str:
    """TPOT of stock vLLM against each policy."""
    part = result[name]
    rows = []
    for arm in part["arms"]:
        active = f"{arm['activeBefore']:.1f} -> {arm['active']:.1f}" if "active" in arm else ""
        ratio = "1" if arm["arm"] == "stock" else interval(arm["ratio"], arm["ratioLow"], arm["ratioHigh"], 2) + "x"
        slots = f"{arm['slots']:.2f}" if "slots" in arm else ""
        rows.append([str(arm["concurrency"]), f"`{arm['arm']}`", f"{arm['tpotMs']:.1f}", ratio, active, slots])
    return (
        table(["concurrency", "arm", "TPOT ms", "stock / arm, 95 %", "active experts", "experts per token"], rows)
        + f"\n{_shape(part)}; {part['rounds']} rounds in which the arms take turns; `stock` has no plug-in loaded; "
        f"{where(part['machine'])}.\n"
    )


def ext_short(result: dict[str, Any]) -> str:
    """Concurrency 16 of the widened model."""
    part = result["widened"]
    rows = []
    for arm in (arm for arm in part["arms"] if arm["concurrency"] == 16):
        if arm["arm"] == "stock":
            rows.append(["`stock`", f"{arm['tpotMs']:.1f} ms", "", ""])
            continue
        ratio = interval(arm["ratio"], arm["ratioLow"], arm["ratioHigh"], 2)
        rows.append(
            [f"`{arm['arm']}`", f"{arm['tpotMs']:.1f} ms", f"{ratio}x", f"{arm['activeBefore']:.1f} -> {arm['active']:.1f}"]
        )
    return table([_shape(part), "TPOT", "stock / arm, 95 %", "active experts"], rows)


def _shape(part: dict[str, Any]) -> str:
    return f"`{part['model']}`: {part['experts']} experts, top-{part['topK']}, widened {part['factor']} times"


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
    return table(head, rows)


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
    return table(head, rows) + f"\n{part['experts']} experts, one layer; {where(part['machine'])}.\n"
