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


def told(out: Path, items: Path, trials: int) -> list[str]:
    """Every step that a run reports."""
    lines: list[str] = []

    class Told(Quiet):
        def step(self, text: str, left_s: float) -> None:
            lines.append(text)

    run(spec_for(out, items, search__trials=trials), PlantedEngine(), report=Told())
    return lines


def test_a_search_counts_before_its_first_policy_and_a_run_without_one_says_nothing_of_it(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.jsonl", 6000)
    lines = told(tmp_path / "three" / "out", items, 3)
    (counted,) = [i for i, line in enumerate(lines) if line.startswith("counted on ")]
    assert counted < next(i for i, line in enumerate(lines) if line.startswith("trial 1"))
    assert not [line for line in told(tmp_path / "one" / "out", items, 1) if line.startswith("counted on ")]
