"""How often a certificate is false: studies simulated through the product's own verdicts, most of them in adverse worlds.

A study is false if it ends with a policy whose true drop is over the limit (`falseCertificates`) or whose true mean TPOT
is not below exact routing's (`falseFaster`). Block by block the answers and latencies are drawn; pairing, tests, ladder,
ledger and baseline check are the product's. Some whole studies run through `tuner.tune` on a planted engine as well.

`make bench-verdicts` writes benchmarks/results/verdicts.json and fails where a share is not shown to be at most 5 %: of all
studies, and of false "faster" in each simulated world in which no policy is faster.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.verdict_worlds import LIMIT, OVER, PAIRS, WORLDS, Policy, World, blocks, outcomes
from sere_autotune.certify.verdict import Rules, judge, walk
from sere_autotune.search.baseline import check_baseline
from sere_autotune.study.ledger import Ledger, spent_alpha
from sere_autotune.study.schema import Verdict
from sere_autotune.trial.items import Item, load_items
from sere_autotune.trial.measures import Answer
from sere_autotune.trial.stats import clopper_pearson
from sere_autotune.tuning.spec import AccuracySpec
from sere_ext.contract.errors import CannotCertifyError
from tests.kit import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "verdicts.json"
ALLOWED = 0.05
ALPHA = 0.05  # of the family of all studies on the same items


def certify(
    rng: np.random.Generator, world: World, names: Sequence[str], alpha: float, answer: Callable[[Policy], Any]
) -> Policy | None:
    """The ladder of one study, as certify/stage.py walks it. Returns the chosen policy."""
    loads = [f"load {index}" for index in range(len(world.loads))]
    rules = Rules([("tpot", "p95", 1000.0)], LIMIT, alpha, 0.0, candidates=len(world.ladder), loads=loads)
    verdicts: list[Verdict] = []
    for policy in world.ladder:
        measured = blocks(rng, world, policy, names, answer(policy), range(PAIRS))
        verdict = judge(measured, rules)
        if verdict.verdict == "undecided":
            more = blocks(rng, world, policy, names, answer(policy), range(PAIRS, 2 * PAIRS))
            verdict = judge([*measured, *more], rules)
        verdicts.append(verdict)
        if walk(verdicts)[1]:
            break
    chosen = walk(verdicts)[0]
    return None if chosen is None else world.ladder[chosen]


def grouped(folder: Path, world: World) -> list[str]:
    """Names of the items that count, as the product reads a file of variants."""
    path = folder / "items.jsonl"
    lines = (json.dumps({"prompt": f"item {i}", "answer": str(i), "group": i // world.group}) + "\n" for i in range(world.items))
    path.write_text("".join(lines))
    return [item.digest for item in load_items(AccuracySpec.model_validate({"tasks": [str(path)]}))]


def simulate(name: str, world: World, studies: int, seed: int) -> dict[str, int]:
    """Counts over the studies of one world; a family of studies on the same items counts as one."""
    count = {"studies": studies, "chosen": 0, "falseCertificates": 0, "falseFaster": 0}
    with tempfile.TemporaryDirectory() as folder:
        names = grouped(Path(folder), world) if world.group > 1 else [f"item{i}" for i in range(world.items)]
        for index in range(studies):
            rng = np.random.default_rng([seed, index, *name.encode()])
            os.environ["XDG_STATE_HOME"] = str(Path(folder) / str(index))
            ledger = Ledger("sha256:simulated", Path(folder) / "out")
            answer = outcomes(rng, world)
            chosen: list[Policy] = []
            for study in range(1 + world.earlier):
                earlier = ledger.open(names, f"{study}") if world.earlier else 0
                found = certify(rng, world, names, spent_alpha(ALPHA, earlier), answer)
                chosen += [found] if found is not None else []
            count["chosen"] += bool(chosen)
            count["falseCertificates"] += any(policy.harmful for policy in chosen)
            count["falseFaster"] += any(not policy.faster for policy in chosen)
    return count


def baseline(studies: int, seed: int) -> dict[str, int]:
    """Evaluations that exact routing fails: a certificate there says nothing, so each that is not refused counts as false."""
    from sere_autotune.tuning.spec import TaskSpec

    count = {"studies": studies, "chosen": 0, "falseCertificates": 0, "falseFaster": 0}
    task = TaskSpec(file="items.jsonl")
    for index in range(studies):
        rng = np.random.default_rng([seed, index])
        share = (0.0, 0.01, 0.05)[index % 3]
        items = [Item(f"{i}", f"item {i}", f"The answer is {i}", task) for i in range(500)]
        answers = {item.digest: Answer(bool(rng.random() < share), item.prompt) for item in items}
        try:
            check_baseline(answers, items, LIMIT)
        except CannotCertifyError:
            continue
        count["chosen"] += 1
        count["falseCertificates"] += 1
    return count


def whole(studies: int, seed: int) -> dict[str, dict[str, int]]:
    """Whole studies through `tuner.tune` on a planted engine: search, ladder, certificate, in three worlds."""
    from tests.kit import planted

    truth = planted.truth
    rows: dict[str, dict[str, int]] = {}
    worlds: dict[str, Callable[[Any], tuple[float, float, float]]] = {
        "whole: as planted": truth,
        "whole: every policy 0.05 points over the limit": (
            lambda policy: (OVER + 0.0024, 0.002, truth(policy)[2]) if policy.buckets else (0.0, 0.0, 1.0)
        ),
        "whole: every policy is slower": (lambda policy: (0.001, 0.001, 0.97) if policy.buckets else (0.0, 0.0, 1.0)),
    }
    for name, world in worlds.items():
        count = {"studies": studies, "chosen": 0, "falseCertificates": 0, "falseFaster": 0}
        for index in range(studies):
            with tempfile.TemporaryDirectory() as folder:
                os.environ["XDG_STATE_HOME"] = folder
                path = Path(folder) / "items.jsonl"
                lines = (json.dumps({"prompt": f"study {seed} {index} item {i}", "answer": str(i)}) + "\n" for i in range(4000))
                path.write_text("".join(lines))
                spec = planted.spec_for(Path(folder) / "out", path, search__seed=index, certify__pairs=PAIRS)
                planted.truth = world  # type: ignore[assignment]
                try:
                    profile = planted.run(spec, planted.PlantedEngine()).profile
                finally:
                    planted.truth = truth
            if profile is None:
                continue
            from sere_ext.contract.policy import Policy as Routing

            lost, gained, speed = world(Routing.parse(profile["spec"]["policy"]))
            count["chosen"] += 1
            count["falseCertificates"] += lost - gained > LIMIT
            count["falseFaster"] += speed <= 1.0
        rows[name] = count
    return rows


WHOLE = {"whole: every policy 0.05 points over the limit": "falseCertificates", "whole: every policy is slower": "falseFaster"}
BASELINE = "exact routing is right on 0 to 5 %"


def at_risk(kind: str) -> set[str]:
    """The worlds in which whatever is chosen is false in that way."""
    if kind == "falseFaster":
        found = {name for name, world in WORLDS.items() if not any(policy.faster for policy in world.ladder)}
    else:
        found = {BASELINE, *(name for name, world in WORLDS.items() if all(policy.harmful for policy in world.ladder))}
    return found | {name for name, way in WHOLE.items() if way == kind}


def summary(rows: dict[str, dict[str, int]]) -> dict[str, Any]:
    """The result: both shares over all studies, and over those in which nothing true can be chosen; and each world's row."""

    def share(kind: str, names: Collection[str]) -> dict[str, Any]:
        studies, count = (sum(rows[name][key] for name in names) for key in ("studies", kind))
        return {"studies": studies, "count": count, "upperLimit": round(clopper_pearson(count, studies)[1], 5)}

    limits = {
        name: {**row, **{f"{kind}UpperLimit": round(clopper_pearson(row[kind], row["studies"])[1], 4) for kind in ("falseCertificates", "falseFaster")}}
        for name, row in rows.items()
    }  # fmt: skip
    kinds = ("falseCertificates", "falseFaster")
    return {
        "allowed": ALLOWED,
        "confidence": 0.95,
        **{kind: share(kind, rows) for kind in kinds},
        "whereNothingTrueCanBeChosen": {kind: share(kind, at_risk(kind) & rows.keys()) for kind in kinds},
        "worlds": limits,
    }


def run(studies: int, whole_studies: int, seed: int, say: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """All worlds.

    Args:
        studies: simulated studies of each world.
        whole_studies: studies through the whole tuner in each of its worlds.
    """
    rows = {}
    for name, world in WORLDS.items():
        families = max(2, studies * world.times // (1 + world.earlier))
        rows[name] = simulate(name, world, families, seed)
        say(f"{name}: {rows[name]}")
    rows[BASELINE] = baseline(studies, seed)
    if whole_studies:
        rows |= whole(whole_studies, seed)
    return summary(rows)


def not_shown(result: dict[str, Any]) -> list[str]:
    """What of a result has an upper limit above ALLOWED: a share over all studies, or false "faster" in a world without any."""
    shares = {kind: result[kind]["upperLimit"] for kind in ("falseCertificates", "falseFaster")}
    alone = {name: result["worlds"][name]["falseFasterUpperLimit"] for name in sorted(at_risk("falseFaster") & WORLDS.keys())}
    return [name for name, limit in (shares | alone).items() if limit > ALLOWED]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--studies", type=int, default=140, help="of each world")
    parser.add_argument("--whole", type=int, default=16, help="whole studies through the tuner, of each of three worlds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    result = run(args.studies, args.whole, args.seed, lambda text: print(text, flush=True))
    result = {"cpuSeconds": round(time.process_time()), "seed": args.seed, **result}
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps({key: result[key] for key in ("cpuSeconds", "falseCertificates", "falseFaster")}, indent=2))
    if above := not_shown(result):
        raise SystemExit(f"not shown to be at most {ALLOWED:.0%}: {', '.join(above)}")


if __name__ == "__main__":
    main()
