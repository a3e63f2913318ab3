"""The law of a decode step, T = a + b U + c s, fitted to waves of several sizes under several numbers S of kept experts. Pure.

T is the time of a step, U the active experts of a MoE layer and s the slots of a MoE layer (tokens times experts that compute
each). Every size has an a of its own (attention, sampling and scheduling); b and c are the same for all sizes, since an
expert's weights and a slot's arithmetic cost what they cost.

Waves come in rounds that hold every cell, a cell being one size under one S. How much faster or slower the machine was in one
round than in another is taken out, and relative deviations of what is left are taken for normal: least squares with weights
1 / T^2, whose coefficients are drawn from a multivariate t distribution with the residuals' degrees of freedom, none below zero.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Cell = tuple[int, int]  # requests of a wave, S

_DRAWS = 8000
_LEAST_DRAWS = 400
_SEED = 0
_LEAST_ROUNDS = 2
_LEAST_SCATTER = 1e-4  # relative; no clock is better
_LEAST_SPREAD = 0.02  # of active experts between two S, relative


class CannotTellError(Exception):
    """The waves allow no statement; the message is the reason, as the end of a sentence."""


@dataclass(frozen=True)
class Sample:
    """One wave of one round."""

    round: int
    batch: int  # requests, which are the tokens of a decode step
    S: int  # experts that each token kept
    step_s: float
    prompt_s: float
    active: float
    slots: float  # of a MoE layer: batch times experts per token

    @property
    def cell(self) -> Cell:
        return self.batch, self.S


@dataclass(frozen=True)
class CellMean:
    """Means over the rounds of one cell, the machine's drift taken out."""

    step_s: float
    prompt_s: float
    active: float
    slots: float


@dataclass(frozen=True)
class StepFit:
    """The fitted law.

    Attributes:
        sizes: requests of the waves, ascending; [n] draws of a stand in this order.
        cells: what was measured.
        a, b, c: draws, [draws, n], [draws] and [draws]; seconds, seconds per active expert, seconds per slot.
        scatter: of a wave's step time around the law, relative.
        rounds: that were used.
    """

    sizes: tuple[int, ...]
    cells: dict[Cell, CellMean]
    a: Floats
    b: Floats
    c: Floats
    scatter: float
    prompt_scatter: float
    rounds: int

    def experts_s(self, active: float, slots: float) -> Floats:
        """Draws of the part of a step that experts take, seconds."""
        return np.asarray(self.b * active + self.c * slots)

    def step_s(self, batch: int, S: int) -> Floats:
        """Draws of the time of a decode step of a cell at its mean active experts and slots, seconds."""
        cell = self.cells[batch, S]
        return self.at(batch, cell.active, cell.slots)

    def at(self, batch: int, active: float, slots: float) -> Floats:
        """Draws of the time of a decode step of a measured size with so many active experts and slots, seconds."""
        return np.asarray(np.maximum(self.a[:, self.sizes.index(batch)] + self.experts_s(active, slots), 1e-9))

    def prompt_s(self, batch: int, S: int) -> Floats:
        """Draws of the time in which the prompts of a wave are computed, seconds."""
        spread = self.prompt_scatter / np.sqrt(self.rounds)
        noise = np.random.default_rng([_SEED, batch, S]).normal(size=len(self.b))
        return np.asarray(self.cells[batch, S].prompt_s * np.exp(spread * noise))


def fit(samples: Sequence[Sample]) -> StepFit:
    """Fit the law.

    Raises:
        CannotTellError: there are too few rounds, or the active experts do not vary.
    """
    kept = _whole_rounds(samples)
    rounds = sorted({sample.round for sample in kept})
    if len(rounds) < _LEAST_ROUNDS:
        raise CannotTellError("too few decode steps could be timed; give it more time, or a smaller load")
    cells = sorted({sample.cell for sample in kept})
    places = {cell: index for index, cell in enumerate(cells)}
    shape = (len(rounds), len(cells))
    steps, prompts, active, slots = (np.zeros(shape) for _ in range(4))
    for sample in kept:
        at = rounds.index(sample.round), places[sample.cell]
        steps[at], prompts[at], active[at], slots[at] = sample.step_s, sample.prompt_s, sample.active, sample.slots
    drift = np.exp((np.log(steps) - np.log(steps).mean(axis=0)).mean(axis=1, keepdims=True))
    steps, prompts = steps / drift, prompts / drift
    if not _varies(cells, active.mean(axis=0)):
        raise CannotTellError(
            f"routing by one expert a token left as many experts active as exact routing ({active.max():.1f}), so the time that an "
            "expert takes cannot be told from the rest of a step"
        )

    sizes = sorted({batch for batch, _ in cells})
    design = np.zeros((steps.size, len(sizes) + 2))
    flat = [(row, column) for row in range(shape[0]) for column in range(shape[1])]
    for line, (row, column) in enumerate(flat):
        design[line, sizes.index(cells[column][0])] = 1.0
        design[line, -2:] = active[row, column], slots[row, column]
    weights = np.repeat(1.0 / steps.mean(axis=0)[None], shape[0], axis=0).ravel()[:, None]
    x, y = design * weights, steps.reshape(-1, 1) * weights
    # Columns are brought to one scale, so that a pseudo-inverse can leave out what the waves do not tell apart.
    scale = np.linalg.norm(x, axis=0)
    inverse = np.linalg.pinv((x / scale).T @ (x / scale), rcond=1e-10)
    best = inverse @ (x / scale).T @ y[:, 0]
    freedom = len(y) - int(np.linalg.matrix_rank(x / scale, tol=1e-5)) - (len(rounds) - 1)
    if freedom < 1:
        raise CannotTellError("too few decode steps could be timed; give it more time, or a smaller load")
    scatter = max(float(np.sqrt(((y[:, 0] - x / scale @ best) ** 2).sum() / freedom)), _LEAST_SCATTER)
    draws = _of_costs((best + _t_draws(inverse * scatter**2, freedom)) / scale)

    apart = np.log(prompts) - np.log(prompts).mean(axis=0)
    prompt_scatter = float(np.sqrt((apart**2).sum() / max(apart.size - len(cells), 1)))
    means = {
        cell: CellMean(*(float(values[:, i].mean()) for values in (steps, prompts, active, slots))) for cell, i in places.items()
    }
    return StepFit(
        tuple(sizes), means, draws[:, :-2], draws[:, -2], draws[:, -1], scatter, max(prompt_scatter, _LEAST_SCATTER), len(rounds)
    )


def _of_costs(draws: Floats) -> Floats:
    """The draws in which nothing costs less than nothing; all of them where the waves leave next to none of those."""
    possible = draws[(draws >= 0).all(axis=1)]
    return possible if len(possible) >= _LEAST_DRAWS else draws


def foretold(samples: Sequence[Sample]) -> dict[int, Floats]:
    """By size what the law says of steps under S = 1 that it was not fitted to; empty where the other S do not make a law.

    Returns:
        draws of seconds, to be held against what was measured: a check of the law itself.
    """
    floor = fit(samples).cells
    try:
        others = fit([sample for sample in samples if sample.S > 1])
    except CannotTellError:
        return {}
    return {
        batch: others.at(batch, floor[batch, 1].active, floor[batch, 1].slots) for batch in others.sizes if (batch, 1) in floor
    }


def _t_draws(covariance: Floats, freedom: int) -> Floats:
    """Draws of a multivariate t distribution around 0, [draws, p]."""
    rng = np.random.default_rng(_SEED)
    normal = rng.multivariate_normal(np.zeros(len(covariance)), covariance, size=_DRAWS, method="eigh")
    return np.asarray(normal / np.sqrt(rng.chisquare(freedom, size=(_DRAWS, 1)) / freedom))


def _whole_rounds(samples: Sequence[Sample]) -> list[Sample]:
    """The samples of rounds that have every cell; sizes that lack a cell in every round are left out before."""
    wanted = {sample.S for sample in samples}
    found: dict[int, set[int]] = defaultdict(set)
    for sample in samples:
        found[sample.batch].add(sample.S)
    good = [sample for sample in samples if found[sample.batch] == wanted]
    by_round: dict[int, set[Cell]] = defaultdict(set)
    for sample in good:
        by_round[sample.round].add(sample.cell)
    every = {sample.cell for sample in good}
    return [sample for sample in good if by_round[sample.round] == every]


def _varies(cells: Sequence[Cell], active: Floats) -> bool:
    """Whether at some size the active experts differ by S."""
    by_size: dict[int, list[float]] = defaultdict(list)
    for (batch, _), mean in zip(cells, active, strict=True):
        by_size[batch].append(float(mean))
    return any(max(means) - min(means) > _LEAST_SPREAD * max(means) for means in by_size.values())
