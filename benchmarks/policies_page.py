"""The tables of docs/policies.md: accuracy against active experts of every kind of policy, from benchmarks/results/policies-*.json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.tables import interval, table, where

SHORT = (
    "topk S=1", "sere S=1", "oea S=1", "topk S=2", "sere S=2", "oea S=2", "oea S=2 share=0.50", "novice S=2 active", "sere S=3", "oea S=3",
)  # fmt: skip


def _rows(result: dict[str, Any], batch: int | None = None) -> list[dict[str, Any]]:
    return [row for key, part in result["batches"].items() if batch in (None, int(key)) for row in part["rows"]]


def _duels(result: dict[str, Any]) -> list[dict[str, Any]]:
    return [duel for part in result["batches"].values() for duel in part["duels"]]


def policies_run(result: dict[str, Any]) -> str:
    """What was run, and whether the engine agrees."""
    check = result["engineCheck"]
    engine = (
        f"vLLM itself, `{check['policy']}` at batch {check['batch']}: {check['equal']} of {check['items']} answers are the same, "
        f"{check['engineRight']} right (here {check['right']})."
        if check
        else "vLLM itself was not asked in this run."
    )
    minutes = round(sum(part["processorSeconds"] for part in result["batches"].values()) / 60)
    return (
        f"`{result['model']}`: {result['items']:,} items (seed {result['seed']}), {result['experts']} experts, top-{result['topK']}; one of "
        f"{where(result['machine'])}; {minutes} minute{'' if minutes == 1 else 's'} of processor time. {engine}\n"
    )


def policies(result: dict[str, Any]) -> str:
    """One table per batch size, by active experts."""
    text = [policies_run(result)]
    for batch in sorted(map(int, result["batches"])):
        rows = sorted(
            (row for row in _rows(result, batch) if "method" not in row), key=lambda row: (row["active"], row["dropPoints"])
        )
        exact = next(row for row in rows if row["kind"] == "exact")
        text.append(f"\n### Batch {batch}: exact routing is right on {exact['correctPercent']:.2f} %\n\n")
        text.append(
            table(
                ["policy", "active experts", "experts per token", "points lost, 95 %", "answers that differ %", "front"],
                [
                    [
                        f"`{row['policy']}`",
                        f"{row['active']:.2f}",
                        f"{row['slots']:.2f}",
                        "" if row is exact else interval(row["dropPoints"], row["dropLow"], row["dropHigh"], 2),
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
    batches = sorted(map(int, result["batches"]))
    cells = {(row["policy"], row["batch"]): row for row in _rows(result)}

    def cell(policy: str, batch: int) -> str:
        row = cells[policy, batch]
        return f"{interval(row['dropPoints'], row['dropLow'], row['dropHigh'], 2)}, {row['active']:.1f}"

    exact = ["`exact`: active experts", *(f"{cells['exact', batch]['active']:.1f}" for batch in batches)]
    named = [policy for policy in SHORT if (policy, batches[0]) in cells]
    return table(
        ["points lost with 95 % limits, active experts", *(f"batch {batch}" for batch in batches)],
        [exact, *([f"`{policy}`", *(cell(policy, batch) for batch in batches)] for policy in named)],
    )


def _challengers(result: dict[str, Any], chosen: Callable[[dict[str, Any]], bool]) -> str:
    """A row per challenger, a column per kind: points that the challenger gains on it, in bold where that is beyond noise."""
    kinds = list(dict.fromkeys(duel["kind"] for duel in _duels(result)))
    lines: dict[tuple[int, str], dict[str, Any]] = {}
    for duel in filter(chosen, _duels(result)):
        line = lines.setdefault((duel["batch"], duel["policy"]), {"active": duel["active"]})
        text = interval(duel["gainPoints"], duel["gainLow"], duel["gainHigh"], 2)
        beyond = duel["verdict"] != "level"
        line[duel["kind"]] = f"{f'**{text}**' if beyond else text} `{duel['rival']}` {duel['rivalActive']:.1f}"
    head = ["batch", "challenger", "active experts", *(f"against `{kind}`" for kind in kinds)]
    return table(
        head,
        [
            [str(batch), f"`{policy}`", f"{line['active']:.1f}", *(line.get(kind, "") for kind in kinds)]
            for (batch, policy), line in lines.items()
        ],
    )


def kind(name: str, result: dict[str, Any]) -> str:
    """One kind against those of the product: how often it wins and loses beyond noise, and by how much each time."""
    mine = [duel for duel in _duels(result) if duel["policy"].split()[0] == name]
    text = []
    for rival in dict.fromkeys(duel["kind"] for duel in mine):
        verdicts = [duel["verdict"] for duel in mine if duel["kind"] == rival]
        text.append(f"against `{rival}` it wins {verdicts.count('wins')} of {len(verdicts)} and loses {verdicts.count('loses')}")
    return f"`{result['model']}`: " + "; ".join(text) + ".\n\n" + _challengers(result, lambda duel: duel in mine)


def pruned(result: dict[str, Any]) -> str:
    """Models with experts removed: alone and re-routed, and against re-routing of the whole model at equal weight traffic."""
    found = [row for row in _rows(result) if "method" in row]
    alone = table(
        ["pruned model and policy", "batch", "experts in memory", "active experts", "right %", "points lost, 95 %"],
        [
            [
                f"`{row['policy']}`", str(row["batch"]), f"{100 * row['kept']:.0f} %", f"{row['active']:.1f}", f"{row['correctPercent']:.2f}",
                interval(row["dropPoints"], row["dropLow"], row["dropHigh"], 2),
            ]
            for row in found
        ],
    )  # fmt: skip
    names = {row["policy"] for row in found}
    return (
        alone
        + "\nPoints gained on a policy of the whole model that needs no more active experts:\n\n"
        + _challengers(result, lambda duel: duel["policy"] in names)
    )
