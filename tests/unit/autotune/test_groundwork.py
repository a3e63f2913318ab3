"""What a search says of all its policies before it tries any."""

from __future__ import annotations

from pathlib import Path

from sere_autotune.words import screened
from tests.kit.planted import PlantedEngine, Quiet, run, spec_for, write_items


def test_all_policies_are_told_by_their_active_experts_beside_those_of_exact_routing() -> None:
    assert screened([50.21, 30.0, 12.04, 41.6], recorded=True) == (
        "counted on recorded steps of exact routing: 3 policies with 12.0 to 41.6 active experts a layer, exact routing 50.2"
    )
    assert screened([50.21, 19.4], recorded=True).endswith("1 policy with 19.4 active experts a layer, exact routing 50.2")
    assert screened([8, 4], recorded=False).startswith("counted on assumed steps, since this engine does not record its own")


def test_a_search_counts_before_its_first_policy(tmp_path: Path) -> None:
    lines: list[str] = []

    class Told(Quiet):
        def step(self, text: str, left_s: float) -> None:
            lines.append(text)

    run(spec_for(tmp_path / "out", write_items(tmp_path / "items.jsonl", 6000), search__trials=3), PlantedEngine(), report=Told())
    (counted,) = [i for i, line in enumerate(lines) if line.startswith("counted on ")]
    assert counted < next(i for i, line in enumerate(lines) if line.startswith("trial 1"))
