"""What all trials together say of every choice: its drop, its discordance and its speed, each with its uncertainty. Pure (seeded).

Speed. A step takes T = a + b U + c s, with U the active experts and s the slots of a step that the choice was counted to have
(`replay`, and in an open loop `open_loop`). With exact routing's T, U and s as units, a bucket has two unknowns, the shares b and c of an exact step, so its
posterior is a grid:

    log speed-up  g = -log(1 - b (1 - U) - c (1 - s)),  b, c >= 0,  b + c < 1

Measured log speed-ups scatter around g by sigma, which is on the grid too: a few percent on a quiet machine, a third beside
noisy neighbours.

Accuracy. Per bucket and kind, with m the counted share of router weight that moves to another expert or to none:

    excess discordance  e = D / (1 + exp(-(A[kind, bucket] + B[kind] log(m / 0.2) - R rho)))   bends at D; rho acts where it is used
    drop                q e                                                                  q: net loss per excess discordant item

No model follows the formula, so every choice that was measured has a factor f of its own on e, log-normal with mean 1: what was
measured of a choice then counts for more than what the formula says of it, and a wrong formula spoils less of what is said of
the others. Discordant items are Poisson with mean n (d0 + f e), losses among them binomial. Posterior draws come from
differential-evolution MCMC (C. ter Braak, Statistics and Computing 16 (2006) 239), which needs no tuning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sere_autotune.search.replay import Counts
from sere_autotune.tuning.space import Choice
from sere_ext.contract.policy import Kind

Floats = NDArray[np.float64]

_CHAINS, _STEPS, _KEPT = 64, 400, 5
_CELLS = 400
_BEND = 0.6  # D: of all items, those that can differ
_MOVED = 0.2  # weight moved at which the prior of A holds; about S = 2 of 8
_GRID = 26  # values of b and of c between 0 and 1
_SCATTER = np.geomspace(0.02, 0.4, 8)  # sigma
# Medians and spreads (log scale for B and R, logit for q) chosen wide: 2 % of items differ where a fifth of the weight moves.
_A, _A_SPREAD, _A_BUCKETS = -3.4, 1.6, 0.7
_SCALARS = np.array([[0.5, 0.8], [0.7, 0.8]])  # logit q, log R
_B, _B_SPREAD = np.log(2.0), 0.4
# What a choice's own excess may be, times the formula's: values with mean 1 and their weights.
_OWN_SPREAD = 0.5
_nodes, _weights = np.polynomial.hermite_e.hermegauss(7)
_OWN, _OWN_WEIGHTS = np.exp(_OWN_SPREAD * _nodes - _OWN_SPREAD**2 / 2), _weights / _weights.sum()


@dataclass(frozen=True)
class Observation:
    """One trial at one load level (bucket), against exact routing there."""

    bucket: int
    choice: Choice
    items: int
    losses: int
    gains: int
    log_speed: float  # log(exact TPOT / this TPOT); nan where it was not measured


@dataclass(frozen=True)
class _Data:
    """All observations of each measured pair of bucket and choice, as arrays."""

    where: tuple[NDArray[np.intp], NDArray[np.intp]]  # bucket, choice
    n: Floats
    losses: Floats
    gains: Floats


class PolicyModel:
    """Posterior over policies' drop, discordance and speed.

    Args:
        choices: all choices of a bucket, exact first.
        counts: per bucket what `replay.count` says of them.
        noise_floor: share of items on which exact routing differs from itself under load, as losses and gains.
    """

    def __init__(self, choices: Sequence[Choice], counts: Sequence[Counts], noise_floor: float) -> None:
        self.choices, self.buckets = list(choices), len(counts)
        self.floor = max(noise_floor, 1e-4)
        # Where every kind was given up, a kind without choices stands in.
        self.kinds = list(dict.fromkeys(c.kind for c in self.choices if c.kind is not Kind.EXACT)) or [Kind.TOPK]
        self._index = {choice: i for i, choice in enumerate(self.choices)}
        self._alive = np.array([c.kind is not Kind.EXACT for c in self.choices])
        self._kind = np.array([self.kinds.index(c.kind) if c.kind is not Kind.EXACT else 0 for c in self.choices])
        self._rho = np.array([c.rho for c in self.choices])
        self._moved = np.stack([np.log(np.maximum(c.moved, 1e-5) / _MOVED) for c in counts])
        # Of exact routing's active experts and slots of a step, the shares that each choice saves, [buckets, 2, choices].
        self._saved = np.stack([[1 - c.active / c.active[0], 1 - c.size * c.slots / c.slots[0]] for c in counts])
        self._draws: Floats | None = None
        self._factors: Floats = np.ones((self.buckets, 1, 1))
        self._speeds: list[Floats] = []

    def fit(self, observations: Sequence[Observation], seed: int) -> None:
        """Draw from the posterior given all trials so far."""
        rng = np.random.default_rng(seed)
        seen = [o for o in observations if o.choice.kind is not Kind.EXACT]
        data = self._data([o for o in seen if o.items > 0])
        self._draws = self._sample(data, rng)
        self._factors = self._draw_factors(data, rng)
        self._speeds = [self._fit_speed(b, [o for o in seen if o.bucket == b], rng) for b in range(self.buckets)]

    # Posterior of every choice of a bucket, [draws, choices].

    def excess(self, bucket: int) -> Floats:
        every = np.arange(len(self.choices))
        return self._factors[bucket] * self._excess(self.draws, np.full(len(every), bucket), every)

    def drop(self, bucket: int) -> Floats:
        return self.excess(bucket) * _sigmoid(self.draws[:, :1])

    def log_speed(self, bucket: int) -> Floats:
        b, c = self._speeds[bucket].T[:, :, None]
        saved = self._saved[bucket]
        return np.asarray(-np.log(np.maximum(1 - b * saved[0] - c * saved[1], 1e-3)))

    @property
    def draws(self) -> Floats:
        if self._draws is None:
            raise RuntimeError("fit the model first")
        return self._draws

    # Speed.

    def _fit_speed(self, bucket: int, seen: Sequence[Observation], rng: np.random.Generator) -> Floats:
        """As many draws (b, c) as the accuracy has."""
        steps = (np.arange(_GRID) + 0.5) / _GRID
        b, c = (grid.ravel() for grid in np.meshgrid(steps, steps, indexing="ij"))
        inside = b + c < 1
        b, c = b[inside], c[inside]
        at = np.array([self._index[o.choice] for o in seen if not np.isnan(o.log_speed)], dtype=int)
        measured = np.array([o.log_speed for o in seen if not np.isnan(o.log_speed)])
        saved = self._saved[bucket][:, at]
        predicted = -np.log(np.maximum(1 - b[:, None] * saved[0] - c[:, None] * saved[1], 1e-3))
        off = (predicted - measured)[:, None, :] / _SCATTER[:, None]
        # Heavy tails: one block beside a noisy neighbour must not outvote the others. Sigma: 5 %, give or take.
        score = -(np.log(_SCATTER)[:, None] + 2.5 * np.log1p(off**2 / 4)).sum(axis=2) - 0.5 * (np.log(_SCATTER / 0.05)) ** 2
        weight = np.exp(score - score.max()).ravel()
        drawn = rng.choice(len(weight), size=len(self.draws), p=weight / weight.sum()) // len(_SCATTER)
        jitter = (rng.random((2, len(drawn))) - 0.5) / _GRID
        return np.stack([b[drawn], c[drawn]], axis=1) + jitter.T

    # Accuracy. A state x is (logit q, log R, log B [kinds], A [kinds * buckets]).

    def _split(self, x: Floats) -> tuple[Floats, Floats]:
        n = len(_SCALARS)
        return x[:, n : n + len(self.kinds)], x[:, n + len(self.kinds) :]

    def _excess(self, x: Floats, bucket: NDArray[np.intp], choice: NDArray[np.intp]) -> Floats:
        slopes, offsets = self._split(x)
        kind = self._kind[choice]
        bend = offsets[:, kind * self.buckets + bucket] + np.exp(slopes[:, kind]) * self._moved[bucket, choice]
        return np.asarray(self._alive[choice] * _BEND * _sigmoid(bend - np.exp(x[:, 1:2]) * self._rho[choice]))

    def _prior_draws(self, rng: np.random.Generator, count: int) -> Floats:
        kinds = len(self.kinds)
        scalars = _SCALARS[:, 0] + _SCALARS[:, 1] * rng.normal(size=(count, len(_SCALARS)))
        slopes = _B + _B_SPREAD * rng.normal(size=(count, kinds))
        offsets = _A + _A_SPREAD * rng.normal(size=(count, kinds, 1)) + _A_BUCKETS * rng.normal(size=(count, kinds, self.buckets))
        return np.concatenate([scalars, slopes, offsets.reshape(count, -1)], axis=1)

    def _log_prior(self, x: Floats) -> Floats:
        slopes, offsets = self._split(x)
        found = -0.5 * (((x[:, : len(_SCALARS)] - _SCALARS[:, 0]) / _SCALARS[:, 1]) ** 2).sum(axis=1)
        found -= 0.5 * (((slopes - _B) / _B_SPREAD) ** 2).sum(axis=1)
        by_kind = offsets.reshape(len(x), len(self.kinds), self.buckets)
        mean = by_kind.mean(axis=2)
        found -= 0.5 * (((mean - _A) / np.hypot(_A_SPREAD, _A_BUCKETS / np.sqrt(self.buckets))) ** 2).sum(axis=1)
        found -= 0.5 * (((by_kind - mean[:, :, None]) / _A_BUCKETS) ** 2).sum(axis=(1, 2))  # buckets of one kind are alike
        return np.asarray(found)

    def _sample(self, data: _Data | None, rng: np.random.Generator) -> Floats:
        state = self._prior_draws(rng, _CHAINS)
        score = self._log_posterior(state, data)
        size = state.shape[1]
        kept = []
        for step in range(_STEPS):
            first = (np.arange(_CHAINS) + rng.integers(1, _CHAINS, _CHAINS)) % _CHAINS
            second = (np.arange(_CHAINS) + rng.integers(1, _CHAINS, _CHAINS)) % _CHAINS
            scale = 1.0 if step % 10 == 0 else 2.38 / np.sqrt(2 * size)
            proposal = state + scale * (state[first] - state[second]) + rng.normal(0, 0.02, state.shape)
            new = self._log_posterior(proposal, data)
            taken = np.log(rng.random(_CHAINS)) < new - score
            state[taken], score[taken] = proposal[taken], new[taken]
            if step >= _STEPS // 2 and step % (_STEPS // 2 // _KEPT) == 0:
                kept.append(state.copy())
        return np.concatenate(kept)

    def _data(self, seen: Sequence[Observation]) -> _Data | None:
        if not seen:
            return None
        cells: dict[tuple[int, int], Floats] = {}
        for o in seen:
            at = o.bucket, self._index[o.choice]
            cells[at] = cells.get(at, np.zeros(3)) + np.array([o.items, o.losses, o.gains])
        bucket, choice = np.array(list(cells)).T
        n, losses, gains = np.array(list(cells.values())).T
        return _Data((bucket, choice), n, losses, gains)

    def _log_posterior(self, x: Floats, data: _Data | None) -> Floats:
        found = self._log_prior(x)
        if data is None:
            return found
        likely = self._likely(x, data) + np.log(_OWN_WEIGHTS)
        return np.asarray(found + np.logaddexp.reduce(likely, axis=2).sum(axis=1))

    def _likely(self, x: Floats, data: _Data) -> Floats:
        """Log likelihood of what was seen of each measured choice under each value of its factor, [draws, measured, values]."""
        excess, q = self._excess(x, *data.where)[:, :, None] * _OWN, _sigmoid(x[:, :1])[:, :, None]
        n, losses, gains = data.n[:, None], data.losses[:, None], data.gains[:, None]
        # Losses and gains as independent Poisson: the same as Poisson discordance with binomial losses.
        loss_rate = n * (self.floor / 2 + excess * (1 + q) / 2)
        gain_rate = n * (self.floor / 2 + excess * (1 - q) / 2)
        return np.asarray(losses * np.log(loss_rate) - loss_rate + gains * np.log(gain_rate) - gain_rate)

    def _draw_factors(self, data: _Data | None, rng: np.random.Generator) -> Floats:
        """[buckets, draws, choices]: each draw's factor f of a choice; 1 where the choice was never measured."""
        found = np.ones((self.buckets, len(self.draws), len(self.choices)))
        if data is not None:
            score = self._likely(self.draws, data) + np.log(_OWN_WEIGHTS)
            drawn = (score + rng.gumbel(size=score.shape)).argmax(axis=2)  # each with the chance that its score gives it
            found[data.where[0], :, data.where[1]] = _OWN[drawn].T
        return found


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(x, -40, 40))))


def best_table(speeds: Floats, drops: Floats, max_drop: float, allowed: NDArray[np.bool_] | None = None) -> list[int]:
    """The choice per bucket that maximises the summed log speed with a mean drop of at most `max_drop`.

    Args:
        speeds: log speed-ups [buckets, choices], 0 for exact (choice 0).
        drops: shares [buckets, choices], 0 for exact.
        allowed: [buckets, choices]; exact is always allowed.

    A knapsack over the buckets with the budget in 400 cells, costs rounded up, so the limit is never passed.
    """
    buckets = len(speeds)
    usable = np.ones(speeds.shape, bool) if allowed is None else allowed.copy()
    usable[:, 0] = True  # exact
    if buckets == 1:
        good = usable[0] & (drops[0] <= max_drop)
        good[0] = True
        return [int(np.argmax(np.where(good, speeds[0], -np.inf)))]

    costs = np.ceil(np.maximum(drops, 0.0) / max(max_drop * buckets, 1e-12) * _CELLS - 1e-9)
    best = np.zeros(_CELLS + 1)  # most log speed by cells spent so far
    chosen: list[NDArray[np.intp]] = []
    for b in range(buckets):
        grown = np.full((speeds.shape[1], _CELLS + 1), -np.inf)
        for i in np.flatnonzero(usable[b] & (costs[b] <= _CELLS)):
            cost = int(costs[b, i])
            grown[i, cost:] = best[: _CELLS + 1 - cost] + speeds[b, i]
        chosen.append(np.argmax(grown, axis=0))
        best = grown.max(axis=0)
    cell, table = int(np.argmax(best)), [0] * buckets
    for b in reversed(range(buckets)):
        table[b] = int(chosen[b][cell])
        cell -= int(costs[b, table[b]])
    return table
