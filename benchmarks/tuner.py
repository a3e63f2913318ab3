"""`make bench-tuner`: whole tuning studies where the truth is known, beside simpler ways to search. Writes JSON.

    python -m benchmarks.tuner [--studies N] [--replayed N] [--rivals NAME ...] [--out FILE]

Every study is `sere_autotune.tuner.tune` itself, from its items to its certificate. Behind its engine stands a made-up model of
`tests/kit/worlds.py`, or the recorded answers of a real one (`tests/kit/replayed.py`; the studies that `--replayed` counts). Regret is the share of the best feasible policy's speed that the study's outcome leaves:
1 - speed / best speed, with exact routing's speed of 1 where nothing is chosen. Rivals get the same trials, items, certificate
and seeds. Random and TPE are tuning without models: Optuna's sampler proposes the trials, and certified are the policies that kept
the limits in them. Bisection and S = 2 search nothing else than one kind.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from scipy import stats as sps

from sere_autotune import tuner
from sere_autotune.prepare import prepare, read_config
from sere_autotune.search import learned
from sere_autotune.search.ladder import Pick
from sere_autotune.search.posterior import PolicyModel
from sere_autotune.study.run import Run
from sere_autotune.trial.items import search_count
from sere_autotune.tuning.space import Choice, Space, Table
from sere_ext.contract.model_config import model_config_digest
from sere_ext.contract.policy import Kind, Policy
from sere_ext.contract.similarity import SimilarityMeta
from sere_ext.similarity.file import write_similarity
from tests.kit import ROOT
from tests.kit.planted import Quiet, spec_for, write_items
from tests.kit.replayed import LAW as REPLAYED
from tests.kit.replayed import Recording, Replayed
from tests.kit.truth import Truth, WorldEngine
from tests.kit.worlds import LAWS, seeded

RESULT = ROOT / "benchmarks" / "results" / "tuner.json"
OURS, RANDOM, TPE, BISECTION, ALWAYS = "ours", "random", "tpe", "bisection", "alwaysS2"
NAMES = (OURS, RANDOM, TPE, BISECTION, ALWAYS)
MAX_DROP = 0.01
WORTH_HAVING = 1.1  # a best feasible speed-up from which a study should end with a policy
ITEMS, TRIALS = 11_000, 24


@dataclass(frozen=True)
class Study:
    """How one study ended."""

    name: str
    law: str
    seed: int
    best: float  # speed-up of the fastest policy that truly keeps the limit
    speed: float  # of the outcome, 1 for exact routing
    drop: float  # of the outcome, a share
    engine_s: float
    policy: str

    @property
    def chosen(self) -> bool:
        return self.policy != "exact"

    @property
    def infeasible(self) -> bool:
        return self.drop > MAX_DROP + 1e-9

    @property
    def regret(self) -> float:
        """An infeasible outcome gained nothing."""
        return 1 - (1.0 if self.infeasible else self.speed) / self.best


class Ground:
    """A folder with what every study reads: the items and a model's configuration."""

    def __init__(self, folder: Path, items: int = ITEMS) -> None:
        self.folder = folder
        self.items = write_items(folder / "items.jsonl", items)
        self.count = 0

    def spec(self, world: Truth, seed: int, trials: int, **changes: Any) -> Any:
        """A tuning file for one study, in an output folder of its own."""
        self.count += 1
        out = self.folder / f"study-{self.count}" / "out"
        artefact = self.folder / f"{world.law}-{world.seed}.safetensors"
        values = {
            "search__policies": ["sere", "topk", "oea"], "search__trials": trials, "search__seed": seed, "slo__tpotMs__p95": 1000,
            "accuracy__maxDropPoints": 100 * MAX_DROP, "search__deviceHours": 1000,
            "certify__pairs": 10, "certify__blockSeconds": 1, "workload__seed": seed,
        }  # fmt: skip
        values["search__minShare"] = list(world.space.shares)
        if world.space.s_values:
            values["search__sValues"] = list(world.space.s_values)
        spec = spec_for(out, self.items, **(values | changes))
        config = self.folder / "model" / "config.json"
        config.write_text(json.dumps({
            "model_type": "qwen3_moe", "num_experts": world.experts, "num_experts_per_tok": world.top_k, "num_hidden_layers": world.layers,
        }))  # fmt: skip
        if not artefact.exists():
            meta = SimilarityMeta(
                model_type="qwen3_moe", model_name="world", config_digest=model_config_digest(read_config(spec)),
                data_digest="sha256:0", tokens=1, layers=tuple(range(world.layers)), num_experts=world.experts,
            )  # fmt: skip
            write_similarity(artefact, meta, dict(enumerate(world.similarity)))
        return spec.model_copy(update={"similarity": str(artefact)})

    def clean(self, spec: Any) -> None:
        shutil.rmtree(Path(spec.out).parent, ignore_errors=True)


def study(ground: Ground, world: Truth, seed: int, name: str, trials: int = TRIALS) -> Study:
    """One whole study of a world."""
    engine = WorldEngine(world, seed)
    if name in (BISECTION, ALWAYS):
        S = 2.0 if name == ALWAYS else bisected(ground, world, seed, trials, engine)
        policy = world.space.policy((Choice(Kind.SERE, S),)) if S < world.top_k else None
        finished = tuned(ground, world, seed, engine, {"search__rungs": 1}, only=policy) if policy else None
    else:
        changes = {"search__trials": trials, "search__sampler": "tpe" if name == TPE else "random"}
        with mock.patch.object(learned, "_picks", measured) if name != OURS else contextlib.nullcontext():
            finished = tuned(ground, world, seed, engine, changes)
    profile = finished.profile if finished is not None else None
    chosen = world.choice_of(Policy.parse(profile["spec"]["policy"])) if profile else Choice(Kind.EXACT)
    return Study(
        name, world.law, seed, world.best(MAX_DROP)[1], 1 / world.time(chosen), world.drop(chosen), engine.seconds,
        f"{chosen.kind.value} {chosen.S:g} {chosen.rho:g}" if profile else "exact",
    )  # fmt: skip


def tuned(ground: Ground, world: Truth, seed: int, engine: WorldEngine, changes: dict[str, Any], only: Any = None) -> Any:
    """Run the product on a world."""
    spec = ground.spec(world, seed, changes.pop("search__trials", TRIALS), **changes)
    state = {"XDG_STATE_HOME": str(Path(spec.out).parent / "state")}  # other studies open the same items

    def make(given: Any, similarity: str | None, on_start: Any) -> WorldEngine:
        on_start(True)
        return engine

    with mock.patch.dict(os.environ, state):
        finished = tuner.tune(prepare(spec, only), make, Quiet(), only=only)
    ground.clean(spec)
    return finished


def measured(run: Run, space: Space, model: PolicyModel) -> list[Pick]:
    """The ladder of a tuner without models: of the policies that kept all limits in their trials, the fastest, slow to fast.

    The predictions that come with each are what its trial measured.
    """
    exact = next(t for t in run.study.complete() if space.table(t.params) == space.exact())
    found: dict[Table, Pick] = {}
    for trial in run.study.complete():
        levels, table = run.study.levels(trial), space.table(trial.params)
        if trial is not exact and levels and levels[0].items and all(by <= 0 for by in trial.constraints.values()):
            level = levels[0]
            drop, differ = (level.losses - level.gains) / level.items, (level.losses + level.gains) / level.items
            found[table] = Pick(table, drop, differ, float(exact.value or 1) / float(trial.value or 1))
    fastest = sorted(found.values(), key=lambda pick: pick.speedup)[-run.spec.search.rungs :]
    return [pick for pick in fastest if pick.speedup > 1]


def bisected(ground: Ground, world: Truth, seed: int, trials: int, engine: WorldEngine) -> float:
    """The least S of kind sere whose measured drop fits half of the limit, by halving; all the trials' items on those few."""
    rng = np.random.default_rng([world.seed, seed, 11])
    steps = sorted({choice.S for choice in world.space.choices() if choice.kind is Kind.SERE})
    first, last = 0, len(steps)
    each = trials * 500 // 5
    while first < last:
        middle = (first + last) // 2
        lost, gained = world.discordance(Choice(Kind.SERE, steps[middle]))
        seen = (rng.binomial(each, lost) - rng.binomial(each, gained)) / each
        engine.seconds += each * 0.02
        first, last = (first, middle) if seen <= MAX_DROP / 2 else (middle + 1, last)
    return steps[first] if first < len(steps) else float(world.top_k)


def summary(studies: list[Study]) -> dict[str, Any]:
    """What the JSON holds."""
    by = {name: [s for s in studies if s.name == name] for name in NAMES if any(s.name == name for s in studies)}
    ours = by[OURS]
    worthwhile = [s for s in ours if s.best >= WORTH_HAVING]
    key = {(s.law, s.seed): s.regret for s in ours}
    paired = {}
    for name, theirs in by.items():
        pairs = [(key[s.law, s.seed], s.regret) for s in theirs if (s.law, s.seed) in key]
        if name != OURS and pairs:
            gain = np.array([b - a for a, b in pairs])
            half = float(sps.t.ppf(0.975, len(gain) - 1) * gain.std(ddof=1) / len(gain) ** 0.5) if len(gain) > 1 else float("nan")
            paired[name] = {"studies": len(gain), "lessRegret": round(float(gain.mean()), 4), "halfWidth95": round(half, 4)}
    bad = sum(s.infeasible for s in ours)
    return {
        "studies": len(ours),
        "worlds": sorted({s.law for s in ours}),
        "meanRegret": {name: round(float(np.mean([s.regret for s in some])), 4) for name, some in by.items()},
        "medianRegret": {name: round(float(np.median([s.regret for s in some])), 4) for name, some in by.items()},
        "regretByWorld": {law: round(float(np.mean([s.regret for s in ours if s.law == law])), 4) for law in sorted({s.law for s in ours})},
        "replayedStudies": sum(s.law == REPLAYED for s in ours),
        "infeasibleShare": round(bad / len(ours), 4),
        "infeasibleUpperLimit": round(float(sps.beta.ppf(0.95, bad + 1, len(ours) - bad)), 4) if bad < len(ours) else 1.0,
        "chosenShare": round(float(np.mean([s.chosen for s in worthwhile])), 4) if worthwhile else None,
        "chosenShares": {name: round(float(np.mean([s.chosen for s in some if s.best >= WORTH_HAVING])), 4) for name, some in by.items()},
        "infeasible": {name: sum(s.infeasible for s in some) for name, some in by.items()},
        "pairedWithOurs": paired,
        "engineSeconds": {name: round(float(np.mean([s.engine_s for s in some]))) for name, some in by.items()},
        "conditions": {"maxDropPoints": 100 * MAX_DROP, "items": ITEMS, "searchItems": search_count(ITEMS, None), "trials": TRIALS},
    }  # fmt: skip


def made_up(first: int, studies: int) -> Iterator[tuple[int, Truth]]:
    """Numbered worlds, their laws by turns."""
    for number in range(studies):
        yield number, seeded(LAWS[number % len(LAWS)], first + number // len(LAWS))


def replayed(first: int, studies: int) -> Iterator[tuple[int, Truth]]:
    """Numbered views of the one recording, each with items of its own."""
    recording = Recording.read() if studies else None
    for number in range(studies):
        assert recording is not None
        yield number, Replayed(recording, first + number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=102, help="whole studies of ours in made-up models")
    parser.add_argument("--replayed", type=int, default=30, help="whole studies of ours on the recorded answers of a real model")
    parser.add_argument("--first", type=int, default=0, help="seed of the first")
    parser.add_argument("--rivals", nargs="*", default=list(NAMES[1:]), choices=NAMES[1:])
    parser.add_argument(
        "--rival-studies",
        type=int,
        default=None,
        help="of each rival, in made-up models and in replayed ones; as many as ours by default",
    )
    parser.add_argument(
        "--with", dest="others", nargs="*", type=Path, default=[], help="results of other seeds to put in with these"
    )
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    began, spent, studies = time.process_time(), 0.0, []
    for other in options.others:
        kept = json.loads(other.read_text())
        spent += kept["cpuSeconds"]
        studies += [Study(**each) for each in kept["each"]]
    with tempfile.TemporaryDirectory() as folder:
        ground = Ground(Path(folder))
        for number, world in itertools.chain(made_up(options.first, options.studies), replayed(options.first, options.replayed)):
            seed = world.seed
            rivals = options.rivals if options.rival_studies is None or number < options.rival_studies else []
            for name in (OURS, *rivals):
                found = study(ground, world, seed, name)
                studies.append(found)
                print(
                    f"{world.law} {seed:3d} {name:9s} {found.policy:14s} {found.speed:.3f}x of {found.best:.3f}x, drop "
                    f"{100 * found.drop:.2f}, regret {found.regret:.3f} ({time.process_time() - began:.0f} s)",
                    file=sys.stderr,
                    flush=True,
                )
            write(options.out, studies, spent + time.process_time() - began)  # what was done by now, should it be stopped
    print(json.dumps(write(options.out, studies, spent + time.process_time() - began), indent=2))


def write(out: Path, studies: list[Study], seconds: float) -> dict[str, Any]:
    """The JSON so far; returns it without the single studies."""
    result = {**summary(studies), "cpuSeconds": round(seconds)}
    out.write_text(json.dumps({**result, "each": [vars(s) for s in studies]}, indent=1) + "\n")
    return result


if __name__ == "__main__":
    main()
