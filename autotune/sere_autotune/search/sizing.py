"""How many held-out items a candidate's certificate uses, declared when the ladder is frozen. Pure."""

from __future__ import annotations

from sere_autotune import planner
from sere_autotune.study.schema import Pace
from sere_autotune.trial.stats import items_needed
from sere_autotune.tuning.spec import TuningSpec

WANTED_POWER = 0.95  # that a candidate whose drop is as predicted is certified, where not all items fit
_SPARE = 0.8  # share of the seconds left that certification may be planned to take


def certificate_size(
    spec: TuningSpec,
    pace: Pace,
    labelled_share: float,
    usable: int,
    *,
    discordance: float,
    drop: float,
    speedup: float,
    alpha: float,
    left_s: float,
    candidates: int,
) -> tuple[int, int]:
    """(distinct items, labelled items of each block) of a certificate.

    Blocks are as long as certify.blockSeconds and blockResidences ask for. They are made longer for all usable items, which
    nearly always certify a good policy, where the budget pays for that; else for the items that certify the predicted
    drop with WANTED_POWER.

    Args:
        labelled_share: of the requests that are sent.
        usable: held-out items that may be used.
        discordance: predicted share of items that only one of the two routings answers right.
        drop: predicted share of items lost.
        left_s: seconds of the budget that are left for all `candidates` together.
    """
    load = spec.workload.load
    blocks = spec.certify.pairs * len(load.levels)
    # The faster routing must fill a block; an open loop's rate is given.
    rate = load.requests_per_second or pace.rate_per_s * max(1.0, speedup)

    def requests(items: int) -> int:
        return planner.block_requests(spec, rate, pace.residence_s, labelled_share, items)

    pause_s = 2 * (planner.WARMUP_RESIDENCES * pace.residence_s + planner.SWITCH_S)
    slower = load.requests_per_second or pace.rate_per_s
    everything_s = blocks * (requests(usable) / rate + requests(usable) / slower + pause_s)
    if candidates * everything_s <= _SPARE * left_s:
        needed = usable
    else:
        needed = min(usable, items_needed(discordance, drop, spec.accuracy.max_drop_points / 100, alpha, WANTED_POWER) or usable)
    per_block = max(1, round(requests(needed) * labelled_share))
    return min(usable, per_block * blocks), per_block
