"""How a tuning run ends: five outcomes, each with an exit code and a message of its own. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from sere_ext.contract.errors import ExitCode, SereError

MIN_SPEEDUP = 1.02  # the smallest gain worth having: below it a policy is not worth a certificate, nor a model a search


class Ending(StrEnum):
    """Names as the operator reads them in outcome.json."""

    CHOSEN = "Chosen"
    INFEASIBLE = "Infeasible"
    BUDGET = "BudgetExhausted"
    CANNOT_CERTIFY = "CannotCertify"
    FAILED = "Failed"


EXIT_CODES = {
    Ending.CHOSEN: ExitCode.DONE,
    Ending.INFEASIBLE: ExitCode.INFEASIBLE,
    Ending.BUDGET: ExitCode.BUDGET,
    Ending.CANNOT_CERTIFY: ExitCode.CANNOT_CERTIFY,
    Ending.FAILED: ExitCode.FAILED,
}
_ENDINGS = {code: ending for ending, code in EXIT_CODES.items()}


def ending_of(error: SereError) -> Ending:
    """How a run ends that this error ended."""
    return _ENDINGS.get(ExitCode(error.exit_code), Ending.FAILED)


@dataclass(frozen=True)
class NearestMiss:
    """What came closest without being feasible."""

    policy: str
    limit: str
    by: float
    text: str
    give: str  # what would have to give


@dataclass
class Outcome:
    """The end of a run as the study keeps it; a finished study that is run again ends in the same way."""

    ending: Ending
    message: str
    trials: dict[str, int] = field(default_factory=dict)
    nearest: NearestMiss | None = None
    chosen: int | None = None  # index on the ladder
    advisory: bool = False

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.ending]

    def published(self) -> dict[str, Any]:
        """outcome.json of the result ConfigMap."""
        return {"outcome": self.ending.value, "message": self.message, "exitCode": self.exit_code, "trials": self.trials}


def nearest_miss(
    trials: Sequence[tuple[str, bool, dict[str, float]]], limits: dict[str, float], max_drop_points: float
) -> NearestMiss | None:
    """The re-routing trial whose worst violation is the least.

    Args:
        trials: (policy in words, whether it re-routes, violations by constraint). Latencies are relative, accuracy in points.
        limits: milliseconds by constraint key, e.g. {"tpot.p95": 20.0}.
    """
    best: tuple[float, str, str, float] | None = None
    for policy, reroutes, violations in trials:
        # On one scale: an accuracy violation relative to its limit like the latencies.
        scaled = {k: v / max(max_drop_points, 0.1) if k == "accuracy" else v for k, v in violations.items()}
        key = max(scaled, key=lambda k: scaled[k])
        if scaled[key] > 0 and (best is None or (scaled[key], not reroutes) < (best[0], False)):
            best = (scaled[key], policy, key, violations[key])
    if best is None:
        return None
    _, policy, key, by = best
    if key == "accuracy":
        text = f"{policy} costs {by + max_drop_points:.2f} points, {by:.2f} over the limit of {max_drop_points:g}"
        return NearestMiss(policy, key, by, text, "accuracy.maxDropPoints, or more items to tell drops apart")
    if key == "failures":
        return NearestMiss(policy, key, by, f"{policy} fails {by:.2%} more requests than allowed", "the load")
    metric, name = key.split(".")
    measured = limits[key] * (1 + by)
    text = f"{policy} has {metric.upper()} {name} {measured:.1f} ms, {by:.0%} over the limit of {limits[key]:g} ms"
    return NearestMiss(policy, key, by, text, f"slo.{metric}Ms.{name} ({measured:.1f} ms or more), or the load")
