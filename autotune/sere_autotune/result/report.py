"""The HTML report: one file, inline SVG, nothing loaded from elsewhere. Pure: from the summary to text."""

from __future__ import annotations

import html
import itertools
import json
import math
from collections.abc import Sequence
from typing import Any

from sere_autotune.result import step_time
from sere_autotune.result.axes import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Axes
from sere_autotune.words import bracketed, no_harm, over_limits, percent

_HARM_CHECK = (
    " A harm check asks search items at the smallest and largest steps that the policy re-routes: it keeps out what breaks there, and "
    "certifies nothing."
)
_STYLE = """
:root{--ink:#1b1f24;--soft:#59636e;--line:#d1d9e0;--paper:#fff;--good:#1a7f37;--bad:#c4392b;--mark:#0969da;--wash:#f6f8fa}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9198a1;--line:#3d444d;--paper:#0d1117;--good:#3fb950;--bad:#f47067;
--mark:#4493f8;--wash:#151b23}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:66rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.5rem;margin:0}h2{font-size:1.1rem;margin:2rem 0 .5rem}p{margin:.4rem 0}.soft{color:var(--soft)}
.verdict{border-left:4px solid var(--mark);background:var(--wash);padding:.7rem 1rem;margin:1rem 0}
.verdict.bad{border-color:var(--bad);color:inherit}.verdict.good{border-color:var(--good);color:inherit}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}.scroll{overflow-x:auto}
th{white-space:normal;vertical-align:bottom}th,td{text-align:right;padding:.25rem .6rem;border-bottom:1px solid var(--line)}td{white-space:nowrap}
th:nth-child(1),td:nth-child(1),.w{white-space:normal!important;text-align:left!important}td.w:nth-child(2){min-width:17rem}th{font-weight:600;color:var(--soft)}
.good{color:var(--good)}.bad{color:var(--bad)}tr.chosen td{font-weight:600}svg{width:100%;height:auto}
svg text{font:12px system-ui,sans-serif;fill:var(--ink)}svg .soft{fill:var(--soft)}
@media(max-width:40rem){thead{display:none}tr{display:block;padding:.4rem 0;border-bottom:1px solid var(--line)}
td,td.w{display:block;overflow:hidden;padding:.05rem 0;border:0;white-space:normal;text-align:right!important}td.w:nth-child(2){min-width:0}
td::before{content:attr(data-head);float:left;margin-right:1rem;color:var(--soft);font-weight:400}
svg text{font-size:17px}svg [transform]{font-size:15px}
td:first-child{font-weight:600}td[data-head=""]:first-child{text-align:left!important}td:empty{display:none}}
"""


def _e(value: Any) -> str:
    return html.escape(str(value))


def _points(drop_points: float) -> str:
    """A drop as people read it: `-0.45`, and never `-0.00`."""
    return f"{-drop_points if abs(drop_points) >= 0.005 else 0.0:+.2f}"


def _plural(points: float) -> str:
    return f"{points:g} point{'' if points == 1 else 's'}"


def _number(value: Any, form: str = ".2f", unit: str = "") -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    return f"{value:{form}}{unit}"


def render(summary: dict[str, Any]) -> str:
    """The whole page, for a wide screen and a phone."""
    title = f"SERE tuning of {'/'.join(summary['model'].rstrip('/').split('/')[-2:])}"
    parts = [
        f"<h1>{_e(title)}</h1>",
        f"<p class=soft>{_e(summary['condition'])} · {len(summary['trials'])} trials · "
        f"{summary['spent']['deviceHours']:.2f} of {summary['budget']['deviceHours']:g} device-hours</p>",
        _verdict(summary),
        _certificate(summary),
        "<h2>Speed against accuracy, as the search saw it</h2>",
        pareto_svg(summary),
        "<p class=soft>The search ranks on few items and decides nothing; only the certificate above does. "
        "The stepped line joins the trials within all limits that no other of them beats in both.</p>",
        step_time.section(summary),
        _ladder(summary),
        _trials(summary),
        _noise(summary),
    ]
    data = json.dumps({k: v for k, v in summary.items() if k != "profile"}).replace("<", "\\u003c")
    return (
        f'<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>{_e(title)}</title><style>{_STYLE}</style>{''.join(parts)}"
        f"<script type=application/json id=summary>{data}</script></html>\n"
    )


def _verdict(summary: dict[str, Any]) -> str:
    kind = "good" if summary["outcome"] == "Chosen" and not summary["advisory"] else "bad"
    word = {
        "Chosen": "Chosen",
        "Infeasible": "Nothing feasible",
        "BudgetExhausted": "A budget ran out",
        "CannotCertify": "These items cannot certify the limit",
    }.get(summary["outcome"], "Failed")
    if summary["advisory"]:
        word = "Advisory only, not certified"
    return f"<div class='verdict {kind}'><p><strong>{word}.</strong> {_e(summary['message'])}</p></div>"


def _certificate(summary: dict[str, Any]) -> str:
    if summary["chosen"] is None:
        return ""
    result = summary["ladder"][summary["chosen"] - 1]["result"]
    limit = {(row["metric"], row["statistic"]): row["limitMs"] for row in summary["limits"]}
    shown = dict.fromkeys([("tpot", summary["headline"]), ("tpot", "mean"), *limit])
    rows = []
    for metric, name in shown:
        exact, chosen = (result["latency_ms"][routing][metric][name] for routing in ("exact", "chosen"))
        ratio = (result["speedup"].get(name) or {}) if metric == "tpot" else {}
        faster = f"{ratio['value']:.2f}x{bracketed(ratio['low'], ratio['high'])}" if ratio else ""
        bound = limit.get((metric, name))
        rows.append([f"{metric.upper()} {name}", _number(exact, ".2f", " ms"), _number(chosen, ".2f", " ms"),
                     _number(bound, "g", " ms") if bound else "", faster])  # fmt: skip
    rows.append(["accuracy", f"{result['exact_accuracy']:.2%}", f"{result['chosen_accuracy']:.2%}",
                 f"at most {_plural(summary['accuracy']['maxDropPoints'])} lost",
                 f"{_points((result['exact_accuracy'] - result['chosen_accuracy']) * 100)} points, at most {result['upper_bound'] * 100:.2f} lost"])  # fmt: skip
    rows.append(
        [
            "active experts per layer and step",
            _number(result["active_before"], ".1f"),
            _number(result["active_after"], ".1f"),
            "",
            "",
        ]
    )
    rows.append(
        ["mean output tokens", _number(result["tokens"]["exact"], ".2f"), _number(result["tokens"]["chosen"], ".2f"), "", ""]
    )
    rows.append(["speed verdict", "", "", "mean TPOT lower", result["speed"]["verdict"]])
    for part in result["parts"]:
        if part["kind"] == "edge":
            seen = no_harm(part["losses"], part["gains"], part["items"], part["harmed"])
            rows.append([f"harm check at {part['name']}", "", "", "", seen])
            continue
        drop = (part["losses"] - part["gains"]) / max(part["items"], 1) * 100
        word = ", harm shown" if part["harmed"] else ""
        rows.append([f"{part['kind']} {part['name']}", "", "", f"{part['items']:,} items", f"{_points(drop)} points{word}"])
    discordant = (result["losses"] + result["gains"]) / max(result["items"], 1)
    note = (
        f"Non-inferiority by the score test on {result['items']:,} distinct held-out items, declared beforehand, each once with each routing: "
        f"{result['losses']} lost, {result['gains']} gained ({discordant:.2%} discordant); design effect {result['design_effect']:.2f}; "
        f"{result['left_out']:,} items left out, unanswered. Speed-ups are exact / chosen at {summary['condition']}, from paired blocks."
    )
    return (
        "<h2>Certificate</h2>"
        + _table(["", "exact", "chosen", "limit", "difference"], rows, words=frozenset({4}))
        + f"<p class=soft>{_e(note)}{_e(_HARM_CHECK) if any(part['kind'] == 'edge' for part in result['parts']) else ''}</p>"
        + f"<p class=soft>{_e(_confidence(summary, result))}</p>"
        + _most_load(summary["mostLoad"])
    )


def _confidence(summary: dict[str, Any], result: dict[str, Any]) -> str:
    """What the confidences of the certificate mean, and the stricter levels of the single tests by which they are kept."""
    accuracy, speed = summary["accuracy"], result["speed"]
    sure = percent(accuracy["confidence"])
    risk = percent(1 - accuracy["confidence"])
    all_at = "Every confidence on this page is 95%" if sure == "95%" else f"Accuracy has {sure} confidence, everything else 95%"
    earlier = accuracy["earlierOpenings"] or 0
    before = f"after {earlier} earlier {'study' if earlier == 1 else 'studies'}" if earlier else "the first"
    low = f"; it is {speed['low']:.3f}" if speed["low"] is not None else ""
    return (
        f"{all_at}. Single tests are stricter, so that the risk of a false certificate stays within it. Accuracy: all studies that open "
        f"these items share the {risk}, and this one, {before}, may spend {percent(result['alpha'])}: p may be at most "
        f"{result['alpha']:.3g}, and is {result['p_value']:.2g}. Speed: the candidates of a ladder, each judged twice at most, share 5%, and "
        f"one judgement has {percent(speed['alpha'])}: the lower limit of exact / chosen at {percent(1 - speed['alpha'])} must be above 1"
        f"{low}. Limits of a speed-up in brackets have that level, too, so that they hold at 95% whichever candidate was measured fastest; "
        "other limits in brackets are 95% limits of that one figure."
    )


def _most_load(found: dict[str, Any] | None) -> str:
    if not found:
        return ""
    held = ((f"{p['load']:.4g}", p["broken"] or f"held at mean TPOT {p['tpot_ms']:.1f} ms") for p in found["probes"])
    tried = "".join(f"<li>{load}: {_e(words)}</li>" for load, words in held)
    return (
        f"<h2>Most load at the latency of exact routing</h2><p>{_e(found['sentence'][0].upper() + found['sentence'][1:])}.</p>"
        + (
            f"<p class=soft>Loads that were tried in one block each, on search items:</p><ul class=soft>{tried}</ul>"
            if tried
            else ""
        )
    )


def _table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    marked: int | None = None,
    raw: frozenset[int] = frozenset(),
    words: frozenset[int] = frozenset(),
) -> str:
    """A table of text. On a narrow screen each row becomes a block, in which every cell has its column's name before it.

    Args:
        marked: row that is set off.
        raw: columns that are HTML already.
        words: columns of words, which wrap; the others are figures.
    """
    kind = ["class=w" if column in words else "" for column in range(len(head))]
    cells = []
    for index, row in enumerate(rows):
        shown = "".join(
            f'<td {kind[column]} data-head="{_e(head[column])}">{cell if column in raw else _e(cell)}</td>'
            for column, cell in enumerate(row)
        )
        cells.append(f"<tr{' class=chosen' if index == marked else ''}>{shown}</tr>")
    return (
        f"<div class=scroll><table><thead><tr>{''.join(f'<th {k}>{_e(h)}</th>' for h, k in zip(head, kind, strict=True))}</tr></thead>"
        f"<tbody>{''.join(cells)}</tbody></table></div>"
    )


def _ladder(summary: dict[str, Any]) -> str:
    if not summary["ladder"]:
        return ""
    rows = []
    for candidate in summary["ladder"]:
        result = candidate["result"]
        good = candidate["verdict"] == "passed"
        verdict = f"<span class={'good' if good else 'bad'}>{_e(candidate['verdict'])}</span>"
        found = ["–", "–"]
        reason = f"the items certify it with a chance of {candidate['power']:.0%}, by what the trials predict"
        if result:
            mean = result["speedup"].get("mean")
            lost = _points((result["exact_accuracy"] - result["chosen_accuracy"]) * 100) if result["items"] else "–"
            found, reason = [lost, f"{mean['value']:.2f}x" if mean else "–"], result["reason"]
        rows.append([str(candidate["number"]), candidate["describe"], _points(candidate["drop"] * 100), found[0],
                     f"{candidate['speedup']:.2f}x", found[1], verdict, reason])  # fmt: skip
    head = ["candidate", "policy", "points, predicted", "points, found", "speed, predicted", "speed, found", "verdict", "reason"]
    chosen = None if summary["chosen"] is None else summary["chosen"] - 1
    note = (
        "A candidate is a policy of those that the search could have tried, picked by a model fitted to all trials: it need not have been a "
        "trial itself. Predicted: by that model, from the trials' few items. Found: by the certificate, which decides."
    )
    table = _table(head, rows, chosen, raw=frozenset({6}), words=frozenset({1, 7}))
    return f"<h2>Ladder, frozen before the held-out items were opened</h2>{table}<p class=soft>{note}</p>"


def _trials(summary: dict[str, Any]) -> str:
    rows = []
    for trial in summary["trials"]:
        broken = [key for key, by in trial["violations"].items() if by > 0]
        state = "<span class=good>feasible</span>" if not broken else f"<span class=bad>{_e(over_limits(broken, 0))}</span>"
        if trial["crash"]:
            state = "<span class=bad>engine crashed</span>"
        elif trial["stopped"]:
            state += f" <span class=soft>({_e(trial['stopped'])})</span>"
        active = trial["levels"][0]["active_after"] if trial["levels"] else None
        rows.append([str(trial["number"]), trial["policy"], _number(trial["tpotMs"]), _number(trial["accuracy"], ".2%"),
                     _points(trial["dropPoints"]), f"{trial['differShare']:.1%}", _number(active, ".1f"), str(trial["items"] or "–"), state])  # fmt: skip
    head = ["trial", "policy", "mean TPOT ms", "accuracy", "points", "answers differ", "experts", "items", ""]
    note = (
        "<p class=soft>A trial only ranks: one answer of its items weighs 100 / items points. Mean TPOT: over several loads their geometric mean; what the machine was slower or faster than in "
        "trial 0 is taken out, by answers under exact routing beside each trial. Points and items: against exact routing's answers in trial "
        "0 to the same items.</p>"
    )
    return "<h2>Trials</h2>" + _table(head, rows, raw=frozenset({8}), words=frozenset({1, 8})) + note


def _noise(summary: dict[str, Any]) -> str:
    noise = summary["noiseFloor"]
    if not noise or not noise["items"]:
        return ""
    return (
        "<h2>Noise floor</h2><p>Exact routing against itself under the same load: answers differed on "
        f"{noise['differ']:.2%} of {noise['items']:,} items, right or wrong on {noise['discordant']:.2%}. "
        "Batches change the order of sums, so no comparison can be finer than this.</p>"
    )


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (drop, TPOT) that no other beats in both, by rising drop."""
    found: list[int] = []
    best = math.inf
    for index in sorted(range(len(points)), key=lambda i: points[i]):
        if points[index][1] < best:
            best = points[index][1]
            found.append(index)
    return found


def pareto_svg(summary: dict[str, Any]) -> str:
    """Mean TPOT over measured drop, one mark per trial, with the limits as lines."""
    trials = [t for t in summary["trials"] if t["levels"] and t["tpotMs"] and math.isfinite(t["tpotMs"])]
    if not trials:
        return "<p class=soft>No trial ended, so there is nothing to draw.</p>"
    budget = summary["accuracy"]["maxDropPoints"]
    tpot_limits = [(f"TPOT {r['statistic']} limit", r["limitMs"]) for r in summary["limits"] if r["metric"] == "tpot"]
    xs, ys = [t["dropPoints"] for t in trials], [t["tpotMs"] for t in trials]
    x0, x1 = min(0.0, *xs, -0.2) - 0.2, max(budget, *xs) + 0.4
    top = max(ys)
    shown = [(name, v) for name, v in tpot_limits if v <= top * 1.4]
    y0, y1 = min(ys) * 0.92, max([top, *(v for _, v in shown)]) * 1.06

    axes = Axes((x0, x1), (y0, y1))
    px, py = axes.x, axes.y
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="Mean TPOT over accuracy drop, one mark per trial">']
    parts.append(axes.grid("accuracy lost, points (search items)", "mean TPOT, ms"))
    parts.append(
        f'<line x1={px(budget):.1f} y1={TOP} x2={px(budget):.1f} y2={HEIGHT - BOTTOM} stroke="var(--bad)" stroke-dasharray="5 4"/>'
    )
    parts.append(f'<text x={px(budget) + 5:.1f} y={TOP + 12} style="fill:var(--bad)">budget {_plural(budget)}</text>')
    for name, value in shown:
        parts.append(
            f'<line x1={LEFT} y1={py(value):.1f} x2={WIDTH - RIGHT} y2={py(value):.1f} stroke="var(--bad)" stroke-dasharray="5 4"/>'
        )
        parts.append(f'<text x={LEFT + 6} y={py(value) - 5:.1f} style="fill:var(--bad)">{_e(name)} {value:g} ms</text>')
    good = [i for i, trial in enumerate(trials) if trial["feasible"]]
    front = [good[i] for i in pareto([(xs[i], ys[i]) for i in good])]
    if len(front) > 1:
        steps = " ".join(f"{px(xs[b]):.1f},{py(ys[a]):.1f} {px(xs[b]):.1f},{py(ys[b]):.1f}" for a, b in itertools.pairwise(front))
        first = f"{px(xs[front[0]]):.1f},{py(ys[front[0]]):.1f}"
        parts.append(f'<polyline points="{first} {steps}" fill=none stroke="var(--soft)"/>')
    chosen = summary["ladder"][summary["chosen"] - 1] if summary["chosen"] else None
    for trial in trials:
        x, y = px(trial["dropPoints"]), py(trial["tpotMs"])
        exact = trial["digest"] == "exact"
        colour = "var(--mark)" if exact else "var(--good)" if trial["feasible"] else "var(--bad)"
        tip = f"trial {trial['number']}: {trial['policy']}, {trial['tpotMs']:.2f} ms, {_points(trial['dropPoints'])} points"
        fill = colour if trial["feasible"] or exact else "none"
        parts.append(
            f'<circle cx={x:.1f} cy={y:.1f} r=5 fill="{fill}" stroke="{colour}" stroke-width=1.5><title>{_e(tip)}</title></circle>'
        )
        if exact:
            parts.append(f"<text x={x + 7:.1f} y={y - 7:.1f}>exact</text>")
    if chosen and chosen["result"]:
        x = px(max(x0, min(x1, (chosen["result"]["exact_accuracy"] - chosen["result"]["chosen_accuracy"]) * 100)))
        mean = chosen["result"]["latency_ms"]["chosen"]["tpot"]["mean"]
        y = py(max(y0, min(y1, mean)))
        parts.append(
            f'<path d="M{x:.1f} {y - 9:.1f}l9 9-9 9-9-9z" fill=none stroke="var(--ink)" stroke-width=2>'
            f"<title>certified: {_e(chosen['describe'])}, {mean:.2f} ms</title></path>"
        )
        parts.append(f"<text x={x + 13:.1f} y={y + 4:.1f}>chosen, as certified</text>")
    return "".join(parts) + "</svg>"
