"""Writes the tables of docs/results.md, docs/policies.md and docs/speed.md anew: `python -m benchmarks.render`.

A table stands between `<!-- bench:NAME -->` and `<!-- /bench -->`; everything between them is replaced. A unit test holds the
committed pages against the committed results, so that no figure can drift from the run it came from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial

from benchmarks import policies_page, speed_page
from benchmarks.ground import RESULTS
from benchmarks.layers_page import layers
from benchmarks.results_page import engine_runs
from tests.kit import ROOT

PAGES = (ROOT / "docs" / "results.md", ROOT / "docs" / "policies.md", ROOT / "docs" / "speed.md")
BLOCK = re.compile(r"(<!-- bench:([a-z-]+) -->\n)(.*?)(<!-- /bench -->)", re.DOTALL)


# By name of a block: the results that it is made of, and what makes it.
BLOCKS: dict[str, tuple[tuple[str, ...], Callable[..., str]]] = {
    "policies": (("policies-rows_moe",), policies_page.policies),
    "policies-short": (("policies-rows_moe",), policies_page.policies_short),
    "policies-tiny-run": (("policies-tiny_moe",), policies_page.policies_run),
    "policies-tiny": (("policies-tiny_moe",), policies_page.policies_short),
    "novice": (("policies-rows_moe",), partial(policies_page.kind, "novice")),
    "novice-tiny": (("policies-tiny_moe",), partial(policies_page.kind, "novice")),
    "hybrid": (("policies-rows_moe",), partial(policies_page.kind, "hybrid")),
    "pruned": (("policies-rows_moe",), policies_page.pruned),
    "ext-short": (("ext",), speed_page.ext_short),
    "ext-ops": (("ext",), speed_page.ext_ops),
    "ext-decode": (("ext",), partial(speed_page.ext_decode, "widened")),
    "ext-parts": (("ext",), partial(speed_page.ext_parts, "widened")),
    "ext-calibration": (("ext",), speed_page.ext_calibration),
    "layers": (("layers",), layers),
    "engine-runs": (("tune", "telemetry"), engine_runs),
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
