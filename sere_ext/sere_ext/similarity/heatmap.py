"""One self-contained HTML page with a heat map per layer: which experts answer alike. Pure: metadata and matrices in, text out.

The values travel as one byte each (256 steps from 0 to 1) and are drawn on canvases by the few lines of script in the page.
"""

from __future__ import annotations

import base64
import html
from typing import Any

import numpy as np

from sere_ext.similarity.file import Similarity
from sere_ext.similarity.packing import Matrix
from sere_ext.similarity.stability import describe as describe_changes
from sere_ext.similarity.summary import nearest_quantiles, nearest_similarity

_RHOS = (0.1, 0.3, 0.5, 0.7, 0.9)


def render(similarity: Similarity) -> str:
    """The page. Colours run from 0 to 1 on the same scale in every layer."""
    meta = similarity.meta
    facts = {
        "metric": meta.metric,
        "experts": f"{meta.num_experts} in each of {len(meta.layers)} layers",
        "calibration": f"{meta.tokens:,} tokens",
        "stability": f"{describe_changes(meta.stability)} differ between halves of the data"
        if meta.stability
        else "not measured",
        "form": f"int8; {describe_changes(meta.packing.changes)} differ from float32" if meta.packing else "float32",
        "digest": meta.digest,
    }
    listed = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(text)}</dd>" for name, text in facts.items())
    rows = "".join(_row(layer, matrix) for layer, matrix in sorted(similarity.matrices.items()))
    maps = "".join(_figure(layer, matrix) for layer, matrix in sorted(similarity.matrices.items()))
    heads = "".join(f"<th>&ge; {rho}</th>" for rho in _RHOS)
    name = html.escape(f"{meta.model_name} {meta.model_revision}".strip())
    return _PAGE.format(title=name, facts=listed, heads=heads, rows=rows, maps=maps, side=_side(meta.num_experts))


def _side(experts: int) -> int:
    """Side of a heat map in pixels: about 240, and a whole number for each expert."""
    return experts * max(1, round(240 / experts))


def _row(layer: int, matrix: Matrix) -> str:
    """Table row of one layer: quantiles of similarity to the nearest expert, and the share of experts that each rho would accept."""
    nearest = nearest_similarity(matrix)
    quantiles = "".join(f"<td>{value:.2f}</td>" for value in nearest_quantiles(matrix))
    shares = "".join(f"<td>{100 * np.mean(nearest >= rho):.0f} %</td>" for rho in _RHOS)
    return f"<tr><th>{layer}</th>{quantiles}{shares}</tr>"


def _figure(layer: int, matrix: Matrix) -> str:
    experts = matrix.shape[0]
    levels: np.ndarray[Any, Any] = np.rint(np.clip(np.nan_to_num(matrix, nan=0.0), 0, 1) * 255).astype(np.uint8)
    data = base64.b64encode(levels.tobytes()).decode()
    label = f"similarity of the experts of layer {layer}"
    return (
        f'<figure><figcaption>layer {layer}<output></output></figcaption><canvas width="{experts}" height="{experts}" '
        f'role="img" aria-label="{label}" data-levels="{data}"></canvas></figure>'
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Expert similarity of {title}</title>
<style>
:root {{ color-scheme: light; }}
body {{ font: 15px/1.45 system-ui, sans-serif; color: #1c2128; background: #fff; max-width: 1100px; margin: 2rem auto; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; margin: 0 0 1rem; }} h2 {{ font-size: 1.1rem; margin: 2rem 0 .5rem; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0; }}
dt {{ color: #59636e; }} dd {{ margin: 0; overflow-wrap: anywhere; }}
p {{ max-width: 46rem; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .15rem .8rem; text-align: right; border-bottom: 1px solid #e3e7eb; font-weight: normal; }}
thead th {{ color: #59636e; }}
.maps {{ display: flex; flex-wrap: wrap; gap: 1.25rem; }}
figure {{ margin: 0; width: {side}px; }}
figcaption {{ display: flex; justify-content: space-between; font-size: .85rem; color: #59636e; height: 1.4rem; white-space: nowrap; }}
canvas {{ width: {side}px; height: {side}px; image-rendering: pixelated; display: block; }}
.scale {{ display: flex; align-items: center; gap: .5rem; margin: .5rem 0 1rem; font-size: .85rem; color: #59636e; }}
.scale canvas {{ width: 220px; height: 12px; image-rendering: auto; }}
</style></head><body>
<h1>Expert similarity of {title}</h1>
<dl>{facts}</dl>
<h2>Nearest expert by layer</h2>
<p>How similar each expert's most similar other one is (10th, 50th and 90th percentile over experts), and the share of experts
whose most similar one reaches rho. A layer with few of them gives re-routing little to do at that rho.</p>
<table><thead><tr><th>layer</th><th>10th</th><th>50th</th><th>90th</th>{heads}</tr></thead><tbody>{rows}</tbody></table>
<h2>Heat maps</h2>
<p>Row and column are experts by id, from the top left. Point at a map to read a pair.</p>
<div class="scale">0 <canvas id="scale" width="256" height="1"></canvas> 1</div>
<div class="maps">{maps}</div>
<script>
"use strict";
const stops = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];  // viridis
function colour(level) {{
  const at = level / 255 * (stops.length - 1), low = Math.min(Math.floor(at), stops.length - 2), part = at - low;
  return stops[low].map((value, i) => Math.round(value + part * (stops[low + 1][i] - value)));
}}
function paint(canvas, levels) {{
  const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
  levels.forEach((level, i) => image.data.set([...colour(level), 255], 4 * i));
  context.putImageData(image, 0, 0);
}}
paint(document.getElementById("scale"), Uint8Array.from({{length: 256}}, (_, i) => i));
for (const canvas of document.querySelectorAll("canvas[data-levels]")) {{
  const levels = Uint8Array.from(atob(canvas.dataset.levels), c => c.charCodeAt(0));
  const output = canvas.parentElement.querySelector("output");
  paint(canvas, levels);
  canvas.addEventListener("mousemove", event => {{
    const column = Math.min(canvas.width - 1, Math.floor(event.offsetX / canvas.clientWidth * canvas.width));
    const row = Math.min(canvas.height - 1, Math.floor(event.offsetY / canvas.clientHeight * canvas.height));
    output.textContent = `${{row}} and ${{column}}: ${{(levels[row * canvas.width + column] / 255).toFixed(2)}}`;
  }});
  canvas.addEventListener("mouseleave", () => output.textContent = "");
}}
</script></body></html>
"""
