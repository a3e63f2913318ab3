"""What a run will cost and whether it can succeed, before anything is spent. Pure: no engine is started."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sere_autotune.calibration import Source
from sere_autotune.study.ledger import spent_alpha
from sere_autotune.study.schema import Pace
from sere_autotune.trial.stats import items_needed, largest_difference, smallest_limit
from sere_autotune.tuning.space import S_STEPS
from sere_autotune.tuning.spec import SearchSpec, TuningSpec, flag_value
from sere_autotune.words import percent

ASSUMED_START_S = 60.0  # of an engine, until one was seen
ASSUMED_TRUE_DROP = 0.3  # share of the limit that a good policy truly costs
WARMUP_RESIDENCES = 3  # discarded at the start of each block
_CEILING_S = 60.0  # that finding the ceiling takes where the budget allows it,
_CEILING_SHARE = 0.03  # and the share of the budget that it may take;
_LEAST_CEILING_S = 5.0  # with less than this the search begins at once
SWITCH_S = 0.5  # of a live change of the policy
LEAST_CANDIDATES = 3  # of a ladder where the budget is small: it may be raised, and a ladder stays as it is
LOAD_PAIRS = 3  # of blocks that confirm the most load
_LOAD_PROBES = 3  # blocks that find it, as a rule
_LOAD_BLOCK = 0.25  # of certify.blockSeconds, least length of a block of either
LEAST_TRIALS_TO_ORDER = 16  # of a search that puts the layers in order first, which takes as long as one or two of them


@dataclass(frozen=True)
class Need:
    """How many items certify the limit, if exact routing and the policy differ on a given share of them (`discordance`)."""

    discordance: float
    true_zero: int | None
    true_some: int | None  # at ASSUMED_TRUE_DROP of the limit


@dataclass(frozen=True)
class Plan:
    """The plan that `--dry-run` prints (`plan_text`)."""

    limit: float  # share
    confidence: float
    alpha: float
    items: int
    cert_items: int
    search_items: int
    source: Source
    noise: float | None  # discordance of exact against exact last time
    needs: list[Need] = field(default_factory=list)
    most_zero: float | None = None  # largest discordance at which the items kept certify a policy that costs nothing,
    most_some: float | None = None  # and one that truly costs ASSUMED_TRUE_DROP of the limit; None: at none
    smallest: float | None = None  # share that the items could certify at the least discordance in question
    openings: int = 0
    can_certify: bool = True
    problem: str = ""
    ceiling_s: float = 0.0
    search_s: float = 0.0
    certify_s: float = 0.0
    most_load_s: float = 0.0
    start_s: float = 0.0
    least_s: float = 0.0  # of a run that certifies one candidate after no more trials than exact routing's
    trials: int = 0
    rungs: int = 0
    pace_known: bool = False
    notes: list[str] = field(default_factory=list)  # on settings that work and are hardly meant

    @property
    def smallest_points(self) -> float | None:
        """`smallest` as people are told it."""
        return _points_up(self.smallest)

    def to_dict(self) -> dict[str, Any]:
        return {
            "maxDropPoints": round(self.limit * 100, 6), "confidence": self.confidence, "alpha": self.alpha, "items": self.items,
            "certItems": self.cert_items, "noiseFloor": self.noise, "canCertify": self.can_certify, "problem": self.problem,
            "similarity": self.source.to_dict(),
            "needs": [{"discordance": n.discordance, "trueDropZero": n.true_zero, "trueDropSome": n.true_some} for n in self.needs],
            "smallestLimitPoints": self.smallest_points,
            "notes": self.notes, "openings": self.openings, "trials": self.trials, "rungs": self.rungs,
            "seconds": {"start": self.start_s, "ceiling": self.ceiling_s, "search": self.search_s, "certification": self.certify_s, "mostLoad": self.most_load_s},
        }  # fmt: skip


def make_plan(
    spec: TuningSpec,
    items: int,
    cert_items: int,
    noise: float | None,
    openings: int,
    pace: Pace | None,
    *,
    source: Source,
    searches: bool = True,
    warning: str | None = None,
) -> Plan:
    """Judge whether the limit can certify, and estimate the time.

    Args:
        items: distinct labelled items.
        cert_items: how many of them are kept for certification.
        noise: discordant share of exact against exact, from an earlier study; None if never measured.
        openings: earlier studies that opened the most opened one of the held-out items.
        pace: of an earlier study on this model, None before the first.
        source: where the similarity artefact comes from.
        searches: False where a given policy is certified and nothing is searched.
        warning: about the items, to be shown with the plan.
    """
    limit = spec.accuracy.max_drop_points / 100
    alpha = spent_alpha(spec.accuracy.alpha, openings)
    usable = min(cert_items, spec.certify.items or cert_items)
    levels, start_s = len(spec.workload.load.levels), pace.start_s if pace else ASSUMED_START_S
    candidates = planned_candidates(spec, pace) if searches else 1
    grid: Sequence[float] = (noise, 0.05) if noise is not None else (0.01, 0.02, 0.05)
    needs = []
    if limit > 0:
        needs = [
            Need(d, items_needed(d, 0.0, limit, alpha), items_needed(d, ASSUMED_TRUE_DROP * limit, limit, alpha)) for d in grid
        ]
    most_zero, most_some = (largest_difference(usable, drop * limit, limit, alpha) for drop in (0.0, ASSUMED_TRUE_DROP))
    least = noise if noise is not None else 0.0
    smallest = smallest_limit(usable, least, alpha)
    problem = _problem(spec, limit, usable, least, alpha, smallest)
    return Plan(
        limit=limit, confidence=spec.accuracy.confidence, alpha=alpha, items=items, cert_items=usable,
        search_items=items - cert_items, source=source, noise=noise, needs=needs, most_zero=most_zero, most_some=most_some, smallest=smallest, openings=openings,
        can_certify=not problem, problem=problem,
        start_s=start_s, least_s=start_s + estimated_trial_seconds(spec, pace) + candidate_seconds(spec, pace, levels), trials=spec.search.trials if searches else 0,
        ceiling_s=ceiling_seconds(budget_seconds(spec)) if searches else 0.0,
        rungs=candidates, search_s=search_seconds(spec, pace) if searches else 0.0, certify_s=candidates * candidate_seconds(spec, pace, levels) + edges_seconds(spec, pace),
        most_load_s=most_load_seconds(spec, pace), pace_known=pace is not None,
        notes=([warning] if warning else []) + (_notes(spec, items - cert_items, pace) if searches else []),
    )  # fmt: skip


def _points_up(share: float | None) -> float | None:
    """A share in points, rounded up to hundredths: a limit that is told can be given."""
    return None if share is None else math.ceil(round(share * 10_000, 6)) / 100


def _problem(spec: TuningSpec, limit: float, usable: int, least: float, alpha: float, smallest: float | None) -> str:
    points = f"{spec.accuracy.max_drop_points:g}"
    if limit <= 0:
        return (
            f"a limit of {points} points cannot be certified by any number of items, since no finite sample shows a drop of "
            "exactly nothing; allow a drop (maxDropPoints 0.5 or more), or serve exact routing"
        )
    if smallest is not None and smallest <= limit:
        return ""
    needed = items_needed(least, 0.0, limit, alpha)
    wider = "no limit" if smallest is None else f"{_points_up(smallest):g} points"
    return (
        f"{usable:,} held-out items cannot certify a limit of {points} points at {percent(spec.accuracy.confidence)}: "
        f"{needed:,} would be needed even by a policy that costs nothing, and {wider} is the least that these can; "
        "give more items, widen accuracy.maxDropPoints, or add --advisory to tune without a certificate"
    )


def _notes(spec: TuningSpec, search_items: int, pace: Pace | None) -> list[str]:
    """Sentences on settings that work and are hardly meant."""
    found = []
    most = flag_value(spec.engine.extra_args, "--max-num-seqs")
    highest = max(spec.workload.load.levels)
    if most and most.isdigit() and highest > int(most):
        found.append(f"concurrency {highest} is above --max-num-seqs {most}: requests queue, and no step has more than {most}")
    per_trial = spec.search.items_per_trial
    if per_trial > search_items:
        found.append(f"itemsPerTrial {per_trial:,} is above the {search_items:,} search items: every trial uses all of them")
    if pace and (fits := int(pace.rate_per_s * spec.search.trial_seconds)) < min(per_trial, search_items):
        found.append(
            f"at the last run's {pace.rate_per_s:.2g} answers per second a trial of {spec.search.trial_seconds:g} s judges {fits:,} "
            f"items, not {min(per_trial, search_items):,}; raise search.trialSeconds for surer trials"
        )
    if spec.search.trials == 1:
        found.append("trials 1 is exact routing alone, so no policy is searched; give 2 or more")
    return found


def budget_seconds(spec: TuningSpec) -> float:
    """How long an engine may run for search.deviceHours, in seconds."""
    return spec.search.device_hours * 3600 / spec.engine.tensor_parallel_size


def ceiling_seconds(left_s: float) -> float:
    """Seconds that finding the ceiling may take where the budget has so many left; 0 where they are too few for it."""
    found = min(_CEILING_S, _CEILING_SHARE * left_s)
    return found if found >= _LEAST_CEILING_S else 0.0


def estimated_trial_seconds(spec: TuningSpec, pace: Pace | None, blocks: int = 1) -> float:
    """Estimated time of one trial at all load levels, in seconds.

    Args:
        blocks: in which its items are measured, each with a warm-up of its own.
    """
    trial = spec.search.trial_seconds
    if pace and pace.rate_per_s:
        trial = min(trial, spec.search.items_per_trial / pace.rate_per_s + blocks * WARMUP_RESIDENCES * pace.residence_s)
    return (trial + blocks * SWITCH_S) * len(spec.workload.load.levels)


def seeks_order(search: SearchSpec) -> bool:
    """Whether a search measures which layers should get the larger S first: it tries a fraction of S, and often enough."""
    fractions = search.layer_groups and (search.s_values is None or any(S % 1 for S in search.s_values))
    return fractions and search.trials >= LEAST_TRIALS_TO_ORDER


def search_seconds(spec: TuningSpec, pace: Pace | None) -> float:
    """Estimated time of all search trials at all load levels, and of putting the layers in order, in seconds."""
    order = (
        estimated_trial_seconds(spec, pace, S_STEPS) if seeks_order(spec.search) else 0.0
    )  # a part of a trial's items for each quarter
    return spec.search.trials * estimated_trial_seconds(spec, pace) + order


def candidate_seconds(spec: TuningSpec, pace: Pace | None, levels: int, items: int = 0) -> float:
    """Estimated time of certifying one candidate, in seconds: all pairs of blocks, of which exact routing takes a third longer.

    Args:
        items: held-out items that all blocks together are to hold; 0 for no more than the shortest blocks hold.
    """
    residence = pace.residence_s if pace else 0.0
    block = max(spec.certify.block_seconds, spec.certify.block_residences * residence)
    if pace and pace.rate_per_s:
        block = max(block, items / (spec.certify.pairs * levels) / (1.33 * pace.rate_per_s))
    return spec.certify.pairs * levels * (2.33 * block + 2 * (WARMUP_RESIDENCES * residence + SWITCH_S))


def edges_seconds(spec: TuningSpec, pace: Pace | None) -> float:
    """Estimated time of asking the chosen candidate at the edges of its buckets, two of each load level, in seconds."""
    return 2 * estimated_trial_seconds(spec, pace)


def planned_candidates(spec: TuningSpec, pace: Pace | None, items: int = 0) -> int:
    """Candidates that the ladder may have: as many as half of the budget certifies, at least LEAST_CANDIDATES, at most search.rungs.

    A finer ladder ends nearer to the limit, but only where it is walked to its end.
    """
    each_s = candidate_seconds(spec, pace, len(spec.workload.load.levels), items)
    paid = int(budget_seconds(spec) / 2 / each_s)
    return min(spec.search.rungs, max(LEAST_CANDIDATES, paid))


def load_waves(spec: TuningSpec, residence_s: float) -> int:
    """How many requests each place of a load answers in a block of the closing bisection, after one that warms it up.

    A whole number: a request more than fills the places would make the block longer by its whole time.
    """
    return max(1, round(_LOAD_BLOCK * spec.certify.block_seconds / residence_s))


def most_load_seconds(spec: TuningSpec, pace: Pace | None) -> float:
    """Estimated time of finding and confirming the most load, in seconds; 0 where it is not asked for."""
    block = _LOAD_BLOCK * spec.certify.block_seconds
    if pace and pace.residence_s:
        block = (1 + load_waves(spec, pace.residence_s)) * pace.residence_s
    return (_LOAD_PROBES + 2 * LOAD_PAIRS) * (block + SWITCH_S) if spec.certify.most_load else 0.0


def block_requests(spec: TuningSpec, rate: float, residence_s: float, labelled_share: float, needed: int) -> int:
    """Requests of a certification block.

    Long enough for the faster of the two routings (`rate` requests/s) to fill blockSeconds and blockResidences, and enough in all
    blocks together for `needed` labelled items.
    """
    seconds = max(spec.certify.block_seconds, spec.certify.block_residences * residence_s)
    blocks = spec.certify.pairs * len(spec.workload.load.levels)
    return max(math.ceil(seconds * rate), math.ceil(needed / blocks / labelled_share), 2)
