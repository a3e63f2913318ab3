"""Whole studies in models whose truth is known; `make bench-tuner` runs a hundred of them."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import tuner as bench
from sere_autotune.trial.items import load_items
from sere_autotune.tuning.space import EXACT
from tests.kit.worlds import LAWS, seeded


@pytest.mark.parametrize("law", LAWS)
def test_a_study_ends_with_a_feasible_policy_near_the_best(tmp_path: Path, law: str) -> None:
    found = bench.study(bench.Ground(tmp_path, items=7000), seeded(law, 3), 3, bench.OURS, trials=16)
    assert found.best > 1.2
    assert found.chosen and not found.infeasible
    assert found.regret < 0.2, found


def test_answers_do_not_follow_the_order_of_the_items(tmp_path: Path) -> None:
    """A search sees the first items and a block of the certificate consecutive ones, so truth in their order is correlation."""
    ground, world = bench.Ground(tmp_path, items=4000), seeded("knee", 3)
    items = load_items(ground.spec(world, 0, 1).accuracy)
    right = world.right([item.prompt for item in items], EXACT, np.random.default_rng(0))
    assert abs(np.corrcoef(right, np.arange(len(right)))[0, 1]) < 0.05
