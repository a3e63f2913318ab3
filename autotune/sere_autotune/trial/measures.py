"""From timed requests to figures: latency statistics, accuracy pairs, limits kept or broken. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sere_autotune.trial.load import Block, Sent
from sere_ext.contract.errors import UsageError

METRICS = ("tpot", "ttft", "e2el")
STATISTICS = ("mean", "p50", "p90", "p95", "p99")


def values(sent: Sequence[Sent], metric: str) -> NDArray[np.float64]:
    """Milliseconds of every successful request that has the metric, in dispatch order."""
    found = [getattr(s, f"{metric}_ms") for s in sent if s.error is None]
    return np.array([value for value in found if value is not None], dtype=float)


def statistic(samples: NDArray[np.float64], name: str) -> float:
    """`mean` or `pNN` (linear interpolation, as `vllm bench serve`); nan where there is no sample."""
    if not len(samples):
        return float("nan")
    return float(samples.mean()) if name == "mean" else float(np.percentile(samples, float(name[1:])))


@dataclass
class LevelResult:
    """One policy at one load level, as kept in the study."""

    level: int
    requests: int
    seconds: float
    rate: float  # answered requests/s
    residence_s: float
    batch: float
    failures: int
    latency_ms: dict[str, dict[str, float]]
    accuracy: float  # share right of the labelled that were answered
    items: int  # labelled items answered here and by exact routing: those that can be compared
    step_tokens: float | None = None  # tokens of the median step; counted under exact routing alone
    losses: int = 0
    gains: int = 0
    differ: int = 0  # items whose answer text differs from exact routing's
    tokens: float = 0.0  # mean output tokens
    active_before: float | None = None
    active_after: float | None = None
    stopped: str | None = None
    # Exact routing right after, on a part of the same items: the machine's drift, and more of the noise floor.
    reference_tpot_ms: float | None = None  # median
    reference_items: int = 0
    reference_differ: int = 0
    reference_discordant: int = 0
    shared_failures: int = 0  # of `failures`, requests of items that exact routing did not answer either
    first_error: str | None = None  # of the first failed request

    @property
    def drop(self) -> float:
        """Paired estimate, a share; positive is a loss."""
        return (self.losses - self.gains) / self.items if self.items else 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Answer:
    """The answer to an item, and whether it is right."""

    correct: bool
    text: str


@dataclass
class Pairs:
    """Paired outcomes over distinct items, in dispatch order."""

    losses: int = 0
    gains: int = 0
    differ: int = 0
    n: int = 0
    seen: set[str] = field(default_factory=set)

    def add(self, item: str, exact: Answer, chosen: Answer) -> None:
        """Count an item once; a repeat of it is no new evidence."""
        if item in self.seen:
            return
        self.seen.add(item)
        self.n += 1
        self.losses += exact.correct and not chosen.correct
        self.gains += chosen.correct and not exact.correct
        self.differ += exact.text != chosen.text


def answers(sent: Sequence[Sent]) -> dict[str, Answer]:
    """First answer per item, in dispatch order. A failed request is no answer: it leaves the pairs, whichever routing it is of."""
    found: dict[str, Answer] = {}
    for s in sent:
        if s.item is not None and s.correct is not None and s.error is None:
            found.setdefault(s.item, Answer(s.correct, s.text))
    return found


def pair(exact: Mapping[str, Answer], chosen: Mapping[str, Answer]) -> Pairs:
    """Paired counts over the items that both arms answered."""
    pairs = Pairs()
    for item, answer in chosen.items():
        if item in exact:
            pairs.add(item, exact[item], answer)
    return pairs


def summarise(level: int, block: Block, exact: Mapping[str, Answer], timed: str = "all") -> LevelResult:
    """Figures of one block.

    Args:
        exact: exact routing's answers to the same items, to pair with.
        timed: "all", or "unlabelled" where a dataset of its own is the workload whose latency counts.
    """
    chosen = answers(block.sent)
    pairs = pair(exact, chosen)
    measured = [s for s in block.sent if timed == "all" or s.item is None]
    answered = [s for s in block.sent if s.correct is not None]
    return LevelResult(
        level=level,
        requests=len(block.sent),
        seconds=block.seconds,
        rate=len(block.sent) / block.seconds if block.seconds > 0 else 0.0,
        residence_s=block.residence_s,
        batch=block.batch,
        failures=sum(s.error is not None for s in block.sent),
        shared_failures=sum(s.error is not None and s.item is not None and s.item not in exact for s in block.sent)
        if exact
        else 0,
        first_error=next((s.error for s in block.sent if s.error is not None), None),
        latency_ms={m: {name: statistic(values(measured, m), name) for name in STATISTICS} for m in METRICS},
        accuracy=float(np.mean([s.correct for s in answered])) if answered else 0.0,
        items=pairs.n,
        losses=pairs.losses,
        gains=pairs.gains,
        differ=pairs.differ,
        tokens=float(np.mean([s.tokens for s in block.sent])) if block.sent else 0.0,
        stopped=block.stopped,
    )


def drift(level: LevelResult, exact_tpot_ms: float | None) -> float:
    """How much slower than in the exact trial the machine was: exact routing's median TPOT beside this trial over trial 0's."""
    if not exact_tpot_ms or not level.reference_tpot_ms:
        return 1.0
    return level.reference_tpot_ms / exact_tpot_ms


def check_exact(levels: Sequence[LevelResult]) -> None:
    """Refuse to go on from an exact trial that shows nothing.

    Raises:
        UsageError: every request of a load level failed, or none of its answers has the two tokens that TPOT needs.
    """
    for level in levels:
        if level.requests and level.failures == level.requests:
            raise UsageError(f"every request failed: {level.first_error}; mend what it names and run again")
        if level.requests and np.isnan(level.latency_ms["tpot"]["mean"]):
            raise UsageError(
                "no timed answer has two tokens or more, so the time per output token (TPOT), by which policies are compared, is "
                "not defined; raise accuracy.tasks.N.maxTokens, or give workload.dataset with prompts whose answers are longer: "
                "their requests are timed then"
            )


def constraints(
    levels: Sequence[LevelResult],
    limits: Sequence[tuple[str, str, float]],
    max_drop: float,
    max_failures: float,
    exact_tpot_ms: Sequence[float] = (),
    *,
    is_exact: bool = False,
) -> dict[str, float]:
    """Each limit's violation, positive is broken; the same keys for every trial. Relative for latencies, points for the drop.

    A trial none of whose items exact routing answered is undecided, which counts as broken. Requests that fail under exact
    routing as well are no fault of the policy.

    Args:
        exact_tpot_ms: per level median TPOT of the exact trial, to take the machine's drift out of TPOT.
        is_exact: the trial is of exact routing, which loses nothing against itself.
    """
    found = {}
    for metric, name, limit in limits:
        measured = [
            level.latency_ms[metric][name] / (drift(level, _at(exact_tpot_ms, level.level)) if metric == "tpot" else 1.0)
            for level in levels
        ]
        worst = max(measured, default=float("nan"))
        found[f"{metric}.{name}"] = 1.0 if np.isnan(worst) else worst / limit - 1.0
    items = sum(level.items for level in levels)
    drop = sum(level.losses - level.gains for level in levels) / items if items else 0.0
    rejected = any(level.stopped and level.stopped.startswith("accuracy") for level in levels)
    over = (drop - max_drop) * 100
    found["accuracy"] = max(over, 0.01) if rejected or not (items or is_exact) else over
    requests = sum(level.requests for level in levels)
    failures = sum(level.failures - level.shared_failures for level in levels)
    found["failures"] = failures / max(requests, 1) - max_failures
    return found


def objective(levels: Sequence[LevelResult], exact_tpot_ms: Sequence[float] = ()) -> float:
    """Geometric mean over load levels of the mean TPOT, milliseconds, drift taken out. Less is better."""
    logs = [
        np.log(max(level.latency_ms["tpot"]["mean"], 1e-6) / drift(level, _at(exact_tpot_ms, level.level))) for level in levels
    ]
    return float(np.exp(np.mean(logs)))


def _at(values: Sequence[float], index: int) -> float | None:
    return values[index] if index < len(values) else None
