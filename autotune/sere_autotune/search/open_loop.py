"""How many requests a policy's steps will have where requests come at a rate, and what the policy does to such steps. Pure.

In an open loop as many requests are in flight as come within one request's time in the engine (Little's law), and decode steps are
nearly all of that time. A policy whose steps take half the time therefore has half the requests in a step, and fewer active
experts for that reason too. Let r be the tokens of a policy's step over those of exact routing's, and let exact routing's T, U and s
be the units of the step law T = a + b U + c s (`posterior`), where s counts the slots of a token. Then r is the largest solution of

    r = T(r) = 1 - b (1 - U(r)) - c (1 - r s(r)),  r <= 1

U, s and the moved weight are counted in the recorded calls, thinned to a few sizes, and read off between these; b and c are the
ceiling's. Prompts change nothing: at a given rate they take the same share of the engine's time under every policy. In a closed
loop the number of requests in flight is given, so that r is 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sere_autotune.doctor.finding import Finding, Shares
from sere_autotune.search.replay import Counts, Floats, count
from sere_autotune.trial.routing import Matrix, Routing
from sere_autotune.tuning.space import Choice

# Of the steps that are counted, over exact routing's: straight lines between them are 0.002 of U(1) off at the mean, 0.03 at most.
_SIZES = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)
_ROUNDS = 100  # towards the fixed point, at most


def count_open(
    routing: Routing, similarity: Sequence[Matrix] | None, choices: Sequence[Choice], order: Sequence[int], shares: Shares
) -> Counts:
    """Replay every choice of a bucket on steps of the size that it will itself have; exact routing is choice 0.

    Args:
        routing: as exact routing's steps were.
        similarity, order: as `replay.count` takes them.
        shares: of an exact step, which are b and c.
    """
    thinned = {found.tokens: found for found in map(routing.thinned, _SIZES)}  # few tokens have fewer sizes
    sizes = np.array(list(thinned)) / routing.tokens
    return settled(sizes, [count(found, similarity, choices, order) for found in thinned.values()], shares)


def settled(sizes: Floats, counted: Sequence[Counts], shares: Shares) -> Counts:
    """What every choice does to steps of the size r that it will itself have.

    Args:
        sizes: of the steps that were counted, over exact routing's; ascending, and the last is 1.
        counted: of all choices at each of the sizes.
    """
    exact = counted[-1]
    active, slots, moved = (np.stack([getattr(at, name) for at in counted]) for name in ("active", "slots", "moved"))
    r = np.ones(len(exact.active))
    for _ in range(_ROUNDS):
        saved = 1 - _read(active, sizes, r) / exact.active[0], 1 - r * _read(slots, sizes, r) / exact.slots[0]
        before, r = r, 1 - shares.active * saved[0] - shares.slots * saved[1]
        if np.abs(r - before).max() < 1e-3:
            break
    r = np.maximum(r, sizes[0])  # a step has one token at least
    return Counts(_read(active, sizes, r), _read(slots, sizes, r), _read(moved, sizes, r), r)


def least_size(ceiling: Finding | None) -> float:
    """The size r of steps under S = 1, the fastest that a policy can be; 1 where the ceiling does not tell."""
    if ceiling is None or ceiling.exact_shares is None:
        return 1.0
    load, steps = ceiling.exact_shares.requests, ceiling.figures["steps"]
    exact_ms = next(step["predictedMs"][0] for step in steps if step["exact"] and step["requests"] == load)
    fastest = sorted((step["requests"], step["predictedMs"][0]) for step in steps if step["S"] == 1)
    requests, ms = zip(*fastest, strict=True)
    r = 1.0
    for _ in range(_ROUNDS):
        r = min(1.0, float(np.interp(r * load, requests, ms)) / exact_ms)
    return r


def _read(values: Floats, sizes: Floats, at: Floats) -> Floats:
    """Of `values` [sizes, choices] those of every choice at its own size; beyond the ends what the end has."""
    return np.array([np.interp(size, sizes, column) for size, column in zip(at, values.T, strict=True)])
