"""The worlds of `verdicts.py`: what is true of a ladder's policies, and the answers and latencies that blocks show of it.

Most are adverse: the policies are at the limit of accuracy or not faster, the machine drifts, requests fail, losses come together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sere_autotune.study.schema import MeasuredBlock

LIMIT = 0.01  # of the drop, share of items
PAIRS = 10
REQUESTS = 24  # timed requests of a block, for its latencies
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Policy:
    """The truth about one candidate."""

    drop: float  # share of items
    speed: float = 1.3  # exact / candidate mean TPOT

    @property
    def harmful(self) -> bool:
        return self.drop > LIMIT + 1e-12

    @property
    def faster(self) -> bool:
        return self.speed > 1.0


@dataclass(frozen=True)
class World:
    """What the studies of one row of the table meet."""

    ladder: tuple[Policy, ...]
    items: int = 3000
    gained: float = 0.003  # share of items that a candidate gains beside its losses
    noise: float = 0.08  # standard deviation of a block's log TPOT
    drift: float = 0.0  # of log TPOT from one block to the next
    exact_failures: float = 0.0  # share of exact routing's requests
    correlation: float = 0.0  # standard deviation of the log of a block's loss rate
    loads: tuple[float, ...] = (1.0,)  # weight of the drop at each load level
    group: int = 1  # records that are variants of one question, and named so
    earlier: int = 0  # studies on the same items before, each with the same ladder
    times: int = 1  # as many studies as of another world, where a limit is to be shown of this world alone


OVER = LIMIT + 0.0001  # just over the limit, where a false certificate is likeliest
HARMFUL = (Policy(OVER, 1.2), Policy(OVER, 1.3), Policy(OVER, 1.4))
SAME = (Policy(0.0, 1.0), Policy(0.0, 1.0), Policy(0.0, 1.0))
SAME_WORLD = World(SAME, items=1200, gained=0.0, times=7)  # accuracy always passes, so that speed alone decides
WORLDS: dict[str, World] = {
    "good policies": World((Policy(0.0005, 1.1), Policy(0.0025, 1.25), Policy(0.005, 1.4))),
    "good policies, small gains": World((Policy(0.0, 1.05), Policy(0.0005, 1.08), Policy(0.001, 1.12)), items=2000, times=3),
    "at the limit": World(HARMFUL),
    "at the limit, many answers differ": World(HARMFUL, gained=0.02),
    "half over the limit": World((Policy(0.015), Policy(0.015), Policy(0.02))),
    "no policy is faster": SAME_WORLD,
    "no policy is faster, noisy machine": replace(SAME_WORLD, noise=0.3),
    "policies are slower": World((Policy(0.0, 0.97), Policy(0.0, 0.95), Policy(0.0, 0.9)), times=3),
    "drift of 2 % a block, no policy is faster": replace(SAME_WORLD, drift=0.02),
    "drift of 2 % a block, at the limit": World(HARMFUL, drift=0.02),
    "exact routing fails on 0.5 %": World(HARMFUL, exact_failures=0.005),
    "exact routing fails on 0.05 %": World(HARMFUL, exact_failures=0.0005),
    "answers correlated in blocks": World(HARMFUL, correlation=0.6),
    "five variants of each question": World(HARMFUL, items=15_000, group=5),
    "harm at one load of three": World((Policy(OVER),), loads=(3.0, 0.0, 0.0)),
    "five studies on the same items": World(HARMFUL, earlier=4),
}


def outcomes(rng: np.random.Generator, world: World) -> Callable[[Policy], tuple[Bools, Bools]]:
    """Answers of one study's items: a candidate's answers to them, always the same; fragile items are lost first."""
    n = world.items // world.group
    fragile = rng.random(n)
    right = rng.random(n) < 0.8
    levels = np.repeat(np.tile(np.array(world.loads), PAIRS), -(-n // (PAIRS * len(world.loads))))[:n]
    block = np.repeat(np.arange(PAIRS * len(world.loads)), -(-n // (PAIRS * len(world.loads))))[:n]
    wave = np.exp(rng.normal(0, world.correlation, block.max() + 1) - world.correlation**2 / 2)

    def of(policy: Policy) -> tuple[Bools, Bools]:
        lost = (policy.drop + world.gained) * levels * wave[block]
        return right, np.where(right, fragile >= lost / 0.8, fragile < world.gained / 0.2)

    return of


def blocks(
    rng: np.random.Generator,
    world: World,
    policy: Policy,
    names: Sequence[str],
    answers: tuple[Bools, Bools],
    pairs: Sequence[int],
) -> list[MeasuredBlock]:
    """Both routings' blocks of some pairs. The pairs after the first PAIRS repeat the items."""
    found = []
    levels = len(world.loads)
    per_block = -(-len(names) // (PAIRS * levels))
    clock = 0
    for pair in pairs:
        for level in range(levels):
            start = ((pair % PAIRS) * levels + level) * per_block
            for routing in rng.permutation(["exact", "chosen"]):
                right = answers[routing == "chosen"][start : start + per_block]
                items = list(names[start : start + per_block])
                marks = np.where(right, "1", "0")
                if routing == "exact" and world.exact_failures:
                    marks = np.where(rng.random(len(marks)) < world.exact_failures, "x", marks)
                speed = policy.speed if routing == "chosen" else 1.0
                middle = 20.0 / speed * np.exp(world.drift * clock + rng.normal(0, world.noise))
                times = list(middle * np.exp(rng.normal(0, 0.1, REQUESTS)))
                clock += 1
                found.append(MeasuredBlock(
                    pair, level, str(routing), items, "".join(marks), ["" for _ in items], {"tpot": times, "ttft": times, "e2el": times},
                    10.0, len(items), int((marks == "x").sum()), 16.0,
                ))  # fmt: skip
    return found
