"""What the model learns from: a study's trials, each as losses, gains and a speed-up against exact routing beside it."""

from __future__ import annotations

import math

from sere_autotune.search.posterior import Observation
from sere_autotune.study.study import TuningStudy
from sere_autotune.tuning.space import Space


def observations(study: TuningStudy, space: Space) -> list[Observation]:
    """Every complete trial that did not crash, at every load level; nothing before the exact trial has ended."""
    if not study.exact_tpot_ms(space):
        return []
    found = []
    for trial in study.complete():
        table = space.table(trial.params)
        for bucket, (level, choice) in enumerate(zip(study.levels(trial), table, strict=False)):
            median, reference = level.latency_ms["tpot"]["p50"], level.reference_tpot_ms
            speed = math.log(reference / median) if reference and median > 0 else math.nan
            found.append(Observation(bucket, choice, level.items, level.losses, level.gains, speed))
    return found
