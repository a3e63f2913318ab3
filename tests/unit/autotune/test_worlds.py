"""Whole studies in models whose truth is known; `make bench-tuner` runs a hundred of them."""

from pathlib import Path

import pytest

from benchmarks import tuner as bench
from tests.kit.worlds import LAWS, seeded


@pytest.mark.parametrize("law", LAWS)
def test_a_study_ends_with_a_feasible_policy_near_the_best(tmp_path: Path, law: str) -> None:
    found = bench.study(bench.Ground(tmp_path, items=7000), seeded(law, 3), 3, bench.OURS, trials=16)
    assert found.best > 1.2
    assert found.chosen and not found.infeasible
    assert found.regret < 0.2, found
