"""What docs/policies.md says of the layers that keep the larger S, from the JSON of `layers.py`."""

from __future__ import annotations

from typing import Any

from benchmarks.tables import interval, table


def layers(result: dict[str, Any]) -> str:
    """Two tables per model: each layer alone with the larger S, and the layers that lose least against the first ones."""

    def points(found: dict[str, float]) -> str:
        return interval(found["points"], found["low"], found["high"], 2)

    def cell(row: dict[str, Any]) -> str:
        return f"{points(row['lost'])}, {row['active']:.1f}"

    text = []
    for name, part in result.items():
        alone, against = [], []
        for found in part["families"]:
            label = f"`{found['kind']} S={found['S']}`"
            alone.append([label, *map(cell, (found["none"], *found["each"], found["all"]))])
            for pair in found["against"] if found["none"]["lost"]["low"] > 0 else []:
                mine = ", ".join(map(str, pair["chosen"]["larger"]))
                against.append([label, str(len(pair["chosen"]["larger"])), cell(pair["first"]), f"{cell(pair['chosen'])} ({mine})",
                                points(pair["gained"])])  # fmt: skip
        text += [
            f"`{name}`, {part['items']:,} items (seed {part['seed']}), batch {part['batch']}; exact routing is right on "
            f"{100 * part['right'] / part['items']:.2f} %. Points lost with 95 % limits, active experts:\n",
            table(["S", "S everywhere", *(f"S+1 in layer {i}" for i in range(part["layers"])), "S+1 everywhere"], alone),
            "The layers that lost least on the even items, against the first ones on the odd items, where S everywhere loses something:\n",
            table(["S", "layers with S+1", "the first ones", "those that lost least", "points gained"], against),
        ]
    return "\n".join(text)
