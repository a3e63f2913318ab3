"""The monotone model pooled over all trials: what a policy costs and gains, with its uncertainty. Pure (seeded).

Per bucket and kind, with s = 3 (S - 1) / (top_k - 1):

    excess discordance  e = exp(a[kind, bucket] - bS s exp(-bM m) - bR rho)   falls in S and rho, rises in m
    drop                q e                                                    q: net loss per excess discordant item
    log speed-up        g = exp(h[kind, bucket] - cS s exp(-cM m) - cR rho)   falls in S and rho, rises in m

with m = minShare, which acts on what S keeps beyond the first expert: the larger it is, the fewer are kept. How many that are
(cM) and what they were worth (bM) is learnt apart, since those of least weight go first. Both are there only where minShare
is searched.

Discordant items are Poisson with mean n (d0 + e), losses among them binomial. Log speed-ups scatter around g by sigma, which
is learnt too: a few percent on a quiet machine, a third beside noisy neighbours; taken for a few percent there, one lucky
block is believed, and the posterior is so steep that its draws do not mix. The slopes are shared, so 12 trials of 500 items are
enough to rank. Posterior draws come from differential-evolution MCMC (C. ter Braak, Statistics and Computing 16 (2006) 239),
which needs no tuning. Facts page "statistics", section Search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sere_ext.contract.policy import Kind

from sere_autotune.tuning.space import Choice, Table

Floats = NDArray[np.float64]

_CHAINS, _STEPS, _KEPT = 64, 400, 5
_CELLS = 400
_SCALARS = 6  # log bS, log bR, logit q, log cS, log cR, log sigma; then log bM and log cM where minShare is searched


@dataclass(frozen=True)
class Observation:
    """One trial at one load level (bucket), against exact routing there."""

    bucket: int
    choice: Choice
    items: int
    losses: int
    gains: int
    log_speed: float  # log(exact TPOT / this TPOT); nan where it was not measured


Features = tuple[NDArray[np.intp], Floats, Floats, Floats, Floats]  # cell, s, rho, minShare, whether it re-routes


@dataclass(frozen=True)
class _Data:
    """All observations as arrays."""

    features: Features
    n: Floats
    losses: Floats
    gains: Floats
    speed: Floats


class MonotoneModel:
    """Posterior over policies' drop, discordance and speed.

    Args:
        choices: all choices of a bucket, exact first.
        buckets: number of buckets.
        top_k: the model's.
        noise_floor: share of items on which exact routing differs from itself under load, as losses and gains.
    """

    def __init__(self, choices: Sequence[Choice], buckets: int, top_k: int, noise_floor: float) -> None:
        self.choices, self.buckets, self.top_k = list(choices), buckets, top_k
        self.floor = max(noise_floor, 1e-4)
        # Always the three of the default search, so that a seed gives the same draws whichever of them a study names.
        self.kinds = list(dict.fromkeys([Kind.SERE, Kind.TOPK, Kind.OEA, *(c.kind for c in choices if c.kind is not Kind.EXACT)]))
        self._shares = any(choice.share for choice in choices)
        self._scalars = _SCALARS + 2 * self._shares
        self._draws: Floats | None = None
        self._grid = [self._features(bucket, self.choices) for bucket in range(buckets)]

    def fit(self, observations: Sequence[Observation], seed: int) -> None:
        """Draw from the posterior given all trials so far."""
        rng = np.random.default_rng(seed)
        seen = [o for o in observations if o.choice.kind is not Kind.EXACT and o.items > 0]
        data = self._data(seen)
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
        self._draws = np.concatenate(kept)

    # Posterior of every choice of a bucket, [draws, choices].

    def excess(self, bucket: int) -> Floats:
        return self._excess(self.draws, self._grid[bucket])

    def drop(self, bucket: int) -> Floats:
        return self.excess(bucket) * _sigmoid(self.draws[:, 2:3])

    def log_speed(self, bucket: int) -> Floats:
        return self._speed(self.draws, self._grid[bucket])

    @property
    def draws(self) -> Floats:
        if self._draws is None:
            raise RuntimeError("fit the model first")
        return self._draws

    def sample_table(self, max_drop: float, rng: np.random.Generator) -> Table:
        """Thompson sampling: the fastest table that stays within `max_drop` (a share) in one draw from the posterior."""
        draw = int(rng.integers(len(self.draws)))
        x = self.draws[draw : draw + 1]
        drops = np.concatenate([self._excess(x, grid) * _sigmoid(x[:, 2:3]) for grid in self._grid])
        speeds = np.concatenate([self._speed(x, grid) for grid in self._grid])
        return tuple(self.choices[i] for i in best_table(speeds, drops, max_drop))

    def _features(self, bucket: int, choices: Sequence[Choice]) -> Features:
        kinds = np.array([0 if c.kind is Kind.EXACT else self.kinds.index(c.kind) for c in choices])
        s = np.array([3.0 * (c.S - 1) / max(self.top_k - 1, 1) for c in choices])
        rho = np.array([c.rho for c in choices])
        share = np.array([c.share for c in choices])
        alive = np.array([0.0 if c.kind is Kind.EXACT else 1.0 for c in choices])
        return kinds * self.buckets + bucket, s, rho, share, alive

    def _split(self, x: Floats) -> tuple[Floats, Floats]:
        cells = len(self.kinds) * self.buckets
        return x[:, self._scalars : self._scalars + cells], x[:, self._scalars + cells :]

    def _kept(self, x: Floats, s: Floats, share: Floats, scalar: int) -> Floats:
        """What minShare leaves of s."""
        return s * np.exp(-np.exp(x[:, scalar : scalar + 1]) * share) if self._shares else s

    def _excess(self, x: Floats, features: Features) -> Floats:
        cell, s, rho, share, alive = features
        offset = self._split(x)[0][:, cell]
        s = self._kept(x, s, share, _SCALARS)
        return alive * np.exp(np.clip(offset - np.exp(x[:, 0:1]) * s - np.exp(x[:, 1:2]) * rho, -20, 0))

    def _speed(self, x: Floats, features: Features) -> Floats:
        cell, s, rho, share, alive = features
        offset = self._split(x)[1][:, cell]
        s = self._kept(x, s, share, _SCALARS + 1)
        return alive * np.exp(np.clip(offset - np.exp(x[:, 3:4]) * s - np.exp(x[:, 4:5]) * rho, -20, 2))

    # Priors: medians and spreads (log scale) chosen wide; at S = 1 without protection 5 % of items differ, 1.4x speed.
    # bM and cM: near what oea does at S = 2 in docs/policies.md, where minShare 0.5 is half of the way to S = 1 in active experts.
    # sigma: 5 %, within a factor of 2.7 two times of three.
    _MEDIANS = np.array([0.0, 1.0, 0.5, -0.5, 0.0, -3.0, 0.0, 0.3])
    _SPREADS = np.array([0.6, 0.8, 1.0, 0.6, 0.8, 1.0, 0.6, 0.6])

    def _prior_draws(self, rng: np.random.Generator, count: int) -> Floats:
        cells = len(self.kinds) * self.buckets
        n = self._scalars
        scalars = self._MEDIANS[:n] + self._SPREADS[:n] * rng.normal(size=(count, n))
        a = np.log(0.05) + 1.5 * rng.normal(size=(count, cells))
        h = np.log(0.35) + 0.8 * rng.normal(size=(count, cells))
        return np.concatenate([scalars, a, h], axis=1)

    def _log_prior(self, x: Floats) -> Floats:
        a, h = self._split(x)
        n = self._scalars
        found = -0.5 * (((x[:, :n] - self._MEDIANS[:n]) / self._SPREADS[:n]) ** 2).sum(axis=1)
        found -= 0.5 * (((a - np.log(0.05)) / 1.5) ** 2).sum(axis=1) + 0.5 * (((h - np.log(0.35)) / 0.8) ** 2).sum(axis=1)
        for cells, spread in ((a, 0.7), (h, 0.5)):  # buckets of one kind are alike
            by_kind = cells.reshape(len(x), len(self.kinds), self.buckets)
            found -= 0.5 * (((by_kind - by_kind.mean(axis=2, keepdims=True)) / spread) ** 2).sum(axis=(1, 2))
        return np.asarray(found)

    def _data(self, seen: Sequence[Observation]) -> _Data | None:
        if not seen:
            return None
        parts = [self._features(o.bucket, [o.choice]) for o in seen]
        cells, *rest = (np.concatenate([part[i] for part in parts]) for i in range(5))
        n, losses, gains = np.array([(o.items, o.losses, o.gains) for o in seen], dtype=float).T
        s, rho, share, alive = rest
        return _Data((cells, s, rho, share, alive), n, losses, gains, np.array([o.log_speed for o in seen]))

    def _log_posterior(self, x: Floats, data: _Data | None) -> Floats:
        found = self._log_prior(x)
        if data is None:
            return found
        excess = self._excess(x, data.features)
        # Losses and gains as independent Poisson: the same as Poisson discordance with binomial losses.
        q = _sigmoid(x[:, 2:3])
        loss_rate = data.n * (self.floor / 2 + excess * (1 + q) / 2)
        gain_rate = data.n * (self.floor / 2 + excess * (1 - q) / 2)
        found = found + (data.losses * np.log(loss_rate) - loss_rate + data.gains * np.log(gain_rate) - gain_rate).sum(axis=1)
        measured = ~np.isnan(data.speed)
        log_sigma = x[:, 5:6]
        off = (self._speed(x, data.features) - np.nan_to_num(data.speed)) / np.exp(log_sigma)
        # Heavy tails: one block beside a noisy neighbour must not outvote the others.
        return np.asarray(found - (measured * (log_sigma + 2.5 * np.log1p(off**2 / 4))).sum(axis=1))


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(1.0 / (1.0 + np.exp(-x)))


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
