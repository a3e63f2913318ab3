"""What the fitted law says of tuning here: ceilings by batch size, and one sentence. Pure.

No policy computes less than S = 1 does, under which each token keeps its best expert alone: every policy keeps that expert, so
its active experts and its slots are the fewest that can be. The time per output token (TPOT) under exact routing over that under
S = 1 is therefore a ceiling for every policy; accuracy, which nothing is said of here, decides how much of it can be had.

A request of P prompt and G answer tokens sees G - 1 decode steps and, at n requests at once, the prompts of the n requests that
come in its time, so TPOT = T + X / (G - 1) with X the time in which the prompts of n requests are computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sere_autotune.doctor.fit import Floats, StepFit
from sere_autotune.words import percent

_QUANTILES = (0.025, 0.975)
_LITTLE = 1.10  # a ceiling whose upper limit is below this is no reason to tune
_WIDE = 2.0  # an interval whose limits are so many times apart says nothing

GAIN, NOTHING, UNKNOWN = "gain", "nothing", "unknown"


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, draws: Floats) -> Estimate:
        low, high = np.quantile(draws, _QUANTILES)
        return cls(float(np.median(draws)), float(low), float(high))

    def times(self) -> str:
        """As a speed-up: `1.74x [1.66, 1.83]`."""
        return f"{self.value:.2f}x [{self.low:.2f}, {self.high:.2f}]"

    def share(self) -> str:
        """As a share: `82% [79%, 85%]`."""
        return f"{self.value:.0%} [{self.low:.0%}, {self.high:.0%}]"

    def to_list(self) -> list[float]:
        return [self.value, self.low, self.high]


@dataclass(frozen=True)
class Ceiling:
    """The most that any policy can gain with so many requests at once.

    Attributes:
        asked: whether it is a load of the workload.
        tpot: exact / S = 1 of the time per output token, prompts included where the answers' length is known.
        decode: the same of a decode step alone.
        experts: share of an exact decode step that experts take.
        prompts: share of the time per output token that prompts take under exact routing; None where the answers' length is unknown.
    """

    batch: int
    asked: bool
    tpot: Estimate
    decode: Estimate
    experts: Estimate
    prompts: float | None


@dataclass(frozen=True)
class Shares:
    """What active experts and slots take of an exact decode step of so many requests, by the law."""

    requests: int
    active: float
    slots: float


@dataclass(frozen=True)
class Finding:
    """How it ended: GAIN, NOTHING (nothing is to be had) or UNKNOWN, the sentence for people, and all figures as JSON."""

    verdict: str
    sentence: str
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def exact_shares(self) -> Shares | None:
        """Of the workload's first load; None where there is no law, or where that load was not measured."""
        return exact_shares(self.figures)

    def to_dict(self) -> dict[str, Any]:
        return {"verdict": self.verdict, "sentence": self.sentence, **self.figures}


def exact_shares(figures: Mapping[str, Any]) -> Shares | None:
    """What a finding's figures say of an exact decode step at the workload's first load; None where they do not."""
    load = next((found["requests"] for found in figures.get("ceilings", ()) if found["asked"]), None)
    step = next((s for s in figures.get("steps", ()) if s["exact"] and s["requests"] == load), None)
    if step is None or "law" not in figures:
        return None
    law, whole_ms = figures["law"], step["predictedMs"][0]
    active, slots = law["msPerActiveExpert"][0] * step["activeExperts"], law["msPerSlot"][0] * step["slots"]
    return Shares(step["requests"], active / whole_ms, slots / whole_ms)


def cannot_tell(reason: str, figures: dict[str, Any] | None = None) -> Finding:
    return Finding(UNKNOWN, f"cannot tell what tuning could gain here: {reason}", figures or {})


def one_expert() -> Finding:
    """Of a model whose tokens have one expert each."""
    return Finding(NOTHING, "nothing is to be had here: each token has one expert, which every policy keeps; serve exact routing")


def judge(
    fitted: StepFit,
    top_k: int,
    loads: Sequence[int],
    answer_tokens: float | None,
    least: float,
    bytes_per_expert: float | None,
    foretold: Mapping[int, Floats] | None = None,
) -> Finding:
    """Turn the law into a finding.

    Args:
        top_k: experts of a token under exact routing.
        loads: requests at once of the workload.
        answer_tokens: of an answer, mean; None where it is not known: prompts are left out then.
        least: the smallest gain worth having, such as 1.02.
        bytes_per_expert: of an expert's weights in all MoE layers together; None where it is not known.
        foretold: by size, steps under S = 1 as a law says that was fitted without them.
    """
    ceilings = [_ceiling(fitted, top_k, batch, batch in loads, answer_tokens) for batch in fitted.sizes]
    figures = _figures(fitted, top_k, ceilings, answer_tokens, bytes_per_expert)
    figures["foretoldMs"] = {str(batch): Estimate.of(draws * 1e3).to_list() for batch, draws in (foretold or {}).items()}
    asked = [ceiling for ceiling in ceilings if ceiling.asked]
    if not asked:
        sizes = " and ".join(str(load) for load in loads)
        return cannot_tell(f"{sizes} requests never decoded together; give a smaller load, or more KV cache", figures)
    if all(max(ceiling.tpot.high, ceiling.decode.high) < least for ceiling in asked):
        return Finding(NOTHING, _nothing(asked, least), figures)
    wide = [ceiling for ceiling in asked if ceiling.tpot.high > _WIDE * max(ceiling.tpot.low, 1e-3)]
    if wide:
        return cannot_tell(
            f"between {wide[0].tpot.low:.2f}x and {wide[0].tpot.high:.2f}x at {_requests(wide[0].batch)}, since the step times of this "
            f"machine scatter by {fitted.scatter:.0%}; look again when it is quiet",
            figures,
        )
    return Finding(GAIN, _gain(ceilings), figures)


def _ceiling(fitted: StepFit, top_k: int, batch: int, asked: bool, answer_tokens: float | None) -> Ceiling:
    exact, floor = fitted.step_s(batch, top_k), fitted.step_s(batch, 1)
    cell = fitted.cells[batch, top_k]
    experts = np.clip(fitted.experts_s(cell.active, cell.slots) / exact, 0.0, 1.0)
    decode = tpot = Estimate.of(exact / floor)
    prompts = None
    if answer_tokens is not None and answer_tokens > 1:
        extra, less = (fitted.prompt_s(batch, S) / (answer_tokens - 1) for S in (top_k, 1))
        tpot = Estimate.of((exact + extra) / (floor + less))
        prompts = float(np.median(extra / (exact + extra)))
    return Ceiling(batch, asked, tpot, decode, Estimate.of(experts), prompts)


def _figures(
    fitted: StepFit, top_k: int, ceilings: Sequence[Ceiling], answer_tokens: float | None, bytes_per_expert: float | None
) -> dict[str, Any]:
    """The JSON form; times in milliseconds, estimates as [value, low, high]."""
    found: dict[str, Any] = {
        "ceilings": [
            {"requests": c.batch, "asked": c.asked, "tpot": c.tpot.to_list(), "decodeStep": c.decode.to_list(),
             "expertsShare": c.experts.to_list(), "promptsShare": c.prompts}
            for c in ceilings
        ],
        "law": {
            "baseMs": {str(n): Estimate.of(fitted.a[:, i] * 1e3).to_list() for i, n in enumerate(fitted.sizes)},
            "msPerActiveExpert": Estimate.of(fitted.b * 1e3).to_list(),
            "msPerSlot": Estimate.of(fitted.c * 1e3).to_list(),
            "scatter": fitted.scatter, "rounds": fitted.rounds,
        },
        "steps": [
            {"requests": batch, "S": S, "exact": S == top_k, "measuredMs": cell.step_s * 1e3,
             "predictedMs": Estimate.of(fitted.step_s(batch, S) * 1e3).to_list(), "activeExperts": cell.active, "slots": cell.slots,
             "promptsMs": cell.prompt_s * 1e3}
            for (batch, S), cell in fitted.cells.items()
        ],
        "answerTokens": answer_tokens,
        "bytesPerSecond": None,
    }  # fmt: skip
    cost = Estimate.of(fitted.b)
    if bytes_per_expert is not None and cost.low > 0:
        found["bytesPerSecond"] = [bytes_per_expert / cost.value, bytes_per_expert / cost.high, bytes_per_expert / cost.low]
    return found


def _gain(ceilings: Sequence[Ceiling]) -> str:
    ordered = sorted(ceilings, key=lambda c: (not c.asked, c.batch))
    good = [c for c in ordered if c.tpot.high >= _LITTLE]
    little = [c for c in ordered if c.tpot.high < _LITTLE]
    parts = []
    if good:
        parts.append(f"at most {_listed(good)}")
    if little:
        parts.append(f"{'' if good else 'at most '}{_listed(little)}: do not tune for that")
    main = next(c for c in ordered if c.asked)
    shares = f"experts take {main.experts.share()} of a decode step at {_requests(main.batch)}"
    if main.prompts is not None:
        shares += f", prompts {percent(round(main.prompts, 2))} of this workload's time"
    return "; ".join([*parts, shares])


def _nothing(asked: Sequence[Ceiling], least: float) -> str:
    shares = ", ".join(f"{c.experts.share()} at {_requests(c.batch)}" for c in asked)
    return (
        f"nothing is to be had here: at most {_listed(asked)}, less than the {least:g}x that is worth having, since experts take "
        f"{shares} of a decode step; serve exact routing"
    )


def _listed(ceilings: Sequence[Ceiling]) -> str:
    """`1.74x [1.66, 1.83] at 16 requests, 1.31x [1.25, 1.37] at 64`."""
    first, *others = ceilings
    return ", ".join([f"{first.tpot.times()} at {_requests(first.batch)}", *(f"{c.tpot.times()} at {c.batch}" for c in others)])


def _requests(count: int) -> str:
    return f"{count} request{'' if count == 1 else 's'}"
