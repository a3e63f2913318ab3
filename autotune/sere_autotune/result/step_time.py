"""Step time against active experts: what a study measured, the line through it, and its plot as SVG. Pure.

A step takes T = a + b U + c s, with U the active experts of an MoE layer and s the slots of a token, means over layers and steps.
Active experts and slots are counted by the engine and by the replay of recorded routing, so they carry no noise. The mean TPOT
stands for the step time, since a decoding request gets one token a step; it holds the prompts that are computed between the steps, too.
A trial's is the one of the report's table of trials (the machine's drift taken out), the certificate's the one of its blocks.

The ceiling (`sere_autotune.doctor`) fits a law of the same form to decode steps alone, under policies whose slots differ. It therefore
tells what slots cost, which the constant a holds here wherever all policies compute nearly the same number of them.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls

from sere_autotune.doctor.finding import exact_shares
from sere_autotune.result.axes import HEIGHT, WIDTH, Axes

LEAST_POINTS = 3
_LEAST_SPREAD = 0.15  # of the largest number of active experts: a line through points that are closer together says nothing


@dataclass(frozen=True)
class Point:
    """One measurement: a trial, or one routing of the certificate.

    Attributes:
        active: active experts per MoE layer and step.
        slots: of a token.
        step_ms: mean TPOT at the first load in milliseconds.
        name: what it is, in words.
        certified: of the certificate, and not a trial.
    """

    active: float
    slots: float
    step_ms: float
    name: str
    certified: bool = False


@dataclass(frozen=True)
class Line:
    """T = a + b U + c s in milliseconds; none of the three is below 0."""

    a: float
    b: float
    c: float

    def at(self, active: float, slots: float) -> float:
        """Milliseconds of a step."""
        return self.a + self.b * active + self.c * slots

    def share(self, active: float, slots: float) -> float:
        """Share of a step that active experts take, and slots where they have a cost of their own in the line."""
        return 1 - self.a / self.at(active, slots)


def points(summary: dict[str, Any]) -> list[Point]:
    """Every measurement of the first load level that has a step time, active experts and slots, the trials first."""
    found = []
    for trial in summary["trials"]:
        level = trial["levels"][0] if trial["levels"] else None
        step = trial.get("firstLoadTpotMs") or math.nan
        if level is None or level["active_after"] is None or not trial["slots"] or not math.isfinite(step):
            continue
        found.append(Point(level["active_after"], trial["slots"][0], step, f"trial {trial['number']}: {trial['policy']}"))
    exact = next((trial for trial in summary["trials"] if trial["digest"] == "exact" and trial["slots"]), None)
    for candidate in summary["ladder"]:
        result = candidate["result"]
        if not result or result.get("active_before") is None or not candidate["slots"] or exact is None:
            continue
        for routing, active, slots in (
            ("exact", result["active_before"], exact["slots"][0]),
            ("chosen", result["active_after"], candidate["slots"][0]),
        ):
            step = result["latency_ms"][routing]["tpot"]["mean"]
            if not math.isfinite(step):
                continue
            name = "exact routing" if routing == "exact" else candidate["describe"]
            found.append(Point(active, slots, step, f"certificate {candidate['number']}: {name}", certified=True))
    return found


def fit(measured: Sequence[Point]) -> Line | None:
    """The line of least squared deviations; None where the points are too few or have too nearly the same active experts."""
    active = np.array([point.active for point in measured])
    if len(measured) < LEAST_POINTS or np.ptp(active) < _LEAST_SPREAD * active.max():
        return None
    slots = np.array([point.slots for point in measured])
    # Units of the largest value, so that the three columns weigh alike.
    scale = np.array([1.0, active.max(), max(slots.max(), 1e-9)])
    columns = np.stack([np.ones(len(active)), active, slots], axis=1) / scale
    if np.ptp(slots) < _LEAST_SPREAD * slots.max():  # slots that hardly differ cannot be told from the constant part
        columns[:, 2] = 0.0
    found, _ = nnls(columns, np.array([point.step_ms for point in measured]))
    a, b, c = found / scale
    return Line(float(a), float(b), float(c))


def deviation(line: Line, measured: Sequence[Point]) -> float:
    """Root of the mean squared relative deviation of the points from the line."""
    off = [point.step_ms / line.at(point.active, point.slots) - 1 for point in measured]
    return float(np.sqrt(np.mean(np.square(off))))


def section(summary: dict[str, Any]) -> str:
    """The report's part on step time, as HTML; nothing where no trial counted its active experts."""
    measured = points(summary)
    if len(measured) < LEAST_POINTS:
        return ""
    line = fit(measured)
    return (
        f"<h2>Step time against active experts</h2>{_svg(measured, line)}<p class=soft>{html.escape(_words(measured, line))}</p>"
        + (f"<p class=soft>{html.escape(_beside_the_ceiling(summary['ceiling'], line))}</p>" if line is not None else "")
    )


def _words(measured: Sequence[Point], line: Line | None) -> str:
    """What the fitted line says, and how much of the speed-up that it predicts was measured."""
    what = (
        "Filled: trials. Diamonds: the certificate. Active experts are counted by the engine. Milliseconds are mean TPOT, with the prompts "
        "that come between decode steps: a trial's at the first load with the machine's drift taken out, as in the table of trials; the "
        "certificate's as measured in its blocks."
    )
    if line is None:
        return f"{what} The points are too close together for a line."
    slots = f" + {line.c:.2f} ms x slots" if line.c > 0 else ""
    text = (
        f"{what} Fitted: step time = {line.a:.1f} ms + {line.b:.2f} ms x active experts{slots}; the points lie {deviation(line, measured):.0%} "
        "off the line (root mean square)."
    )
    exact = max(measured, key=lambda point: point.active)
    takers = "active experts and slots take" if line.c > 0 else "active experts take"
    text += (
        f" Of a step with {exact.active:.1f} active experts, {takers} {line.share(exact.active, exact.slots):.0%} by this line."
    )
    if line.c <= 0:
        text += " These policies compute nearly the same number of slots, so what slots cost is in the line's constant."
    certified = [point for point in measured if point.certified]
    if len(certified) >= 2:
        before, after = certified[-2:]
        predicted = line.at(before.active, before.slots) / line.at(after.active, after.slots)
        text += f" For the certified policy this line, drawn through its own diamond too, gives {predicted:.2f}x; measured: {before.step_ms / after.step_ms:.2f}x."
    return text


def _beside_the_ceiling(ceiling: dict[str, Any] | None, line: Line) -> str:
    """Why the ceiling names another share of experts than the line, with the ceiling's share in its parts; empty without a ceiling.

    Args:
        ceiling: of the summary; where nothing could be told it has no law.
    """
    shares = exact_shares(ceiling or {})
    if ceiling is None or shares is None:
        return ""
    load = next(found for found in ceiling["ceilings"] if found["requests"] == shares.requests)
    prompts = f" ({load['promptsShare']:.0%} of it)" if load["promptsShare"] is not None else ""
    where = "its slots together with active experts" if line.c > 0 else "slots in its constant"
    return (
        f"Ceiling, from decode steps alone that were timed before the search under policies that differ in slots, too: {ceiling['sentence']}. "
        f"Of such a step of {load['requests']} requests under exact routing active experts take {shares.active:.1%} and slots {shares.slots:.1%}, "
        f"together the {load['expertsShare'][0]:.1%} that the ceiling calls the share of experts. The line above has prompts in its step{prompts}, and {where}."
    )


def _svg(measured: Sequence[Point], line: Line | None) -> str:
    right = max(point.active for point in measured) * 1.08
    axes = Axes((0.0, right), (0.0, max(point.step_ms for point in measured) * 1.1))
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role=img aria-label="Step time over active experts">',
        axes.grid("active experts per layer and step", "mean TPOT (trials: drift taken out), ms"),
    ]
    if line is not None:
        slots = max(measured, key=lambda point: point.active).slots  # exact routing's: the line is drawn for all slots in use
        ends = [(axes.x(u), axes.y(line.at(u, slots))) for u in (0.0, right)]
        (x0, y0), (x1, y1) = ends
        parts.append(f'<line x1={x0:.1f} y1={y0:.1f} x2={x1:.1f} y2={y1:.1f} stroke="var(--soft)" stroke-width=1.5 />')
    for point in measured:
        x, y = axes.x(point.active), axes.y(point.step_ms)
        tip = f"{point.name}, {point.active:.1f} active experts, {point.slots:.1f} slots, {point.step_ms:.2f} ms"
        title = f"<title>{html.escape(tip)}</title>"
        if point.certified:
            parts.append(
                f'<path d="M{x:.1f} {y - 8:.1f}l8 8-8 8-8-8z" fill=none stroke="var(--ink)" stroke-width=2>{title}</path>'
            )
        else:
            parts.append(f'<rect x={x - 4:.1f} y={y - 4:.1f} width=8 height=8 rx=4 fill="var(--mark)">{title}</rect>')
    return "".join(parts) + "</svg>"
