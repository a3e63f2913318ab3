"""What a run leaves behind in its folder: profile.json, summary.json and report.html."""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sere_autotune.certify import most_load
from sere_autotune.outcome import Outcome
from sere_autotune.result.profile import build_profile, condition, headline
from sere_autotune.result.report import render
from sere_autotune.search.learned import noise_floor
from sere_autotune.study.run import Run
from sere_autotune.study.schema import (
    CEILING,
    LADDER,
    LADDER_ENDED,
    MOST_LOAD,
    OPENING,
    PACE,
    SEARCH_ENDED,
    SECONDS,
    SPENT,
    Candidate,
    Spent,
    Verdict,
    verdict_key,
)
from sere_autotune.study.study import TuningStudy
from sere_autotune.trial.measures import objective
from sere_autotune.tuning.spec import TuningSpec, engine_options
from sere_ext.contract.files import write_whole
from sere_ext.contract.policy import EXACT
from sere_ext.contract.profile import Profile


@dataclass
class Finished:
    """A run's end, for the command line and the publisher."""

    outcome: Outcome
    summary: dict[str, Any]
    profile: dict[str, Any] | None = None
    similarity: Path | None = None  # the artefact that the chosen policy needs


def finish(run: Run, outcome: Outcome, similarity: Path | None = None) -> Finished:
    """Write all files of a finished run. The same study gives the same content again."""
    out = run.study.out
    profile = None
    if similarity is None and (out / "similarity.safetensors").exists():
        similarity = out / "similarity.safetensors"
    elif similarity is None and run.spec.similarity:
        similarity = Path(run.spec.similarity)
    if outcome.chosen is not None:
        ladder = candidates(run)
        candidate, verdict = ladder[outcome.chosen]
        assert verdict is not None
        number = outcome.chosen + 1
        profile = build_profile(run, candidate, verdict, number, len(ladder), similarity, advisory=outcome.advisory)
        profile.write(out / "profile.json")
    else:
        (out / "profile.json").unlink(missing_ok=True)  # of an earlier run: never a policy that this run did not choose
    summary = build_summary(run, outcome, profile)
    write_whole(out / "summary.json", json.dumps(_without_nan(summary), indent=2) + "\n")
    write_whole(out / "report.html", render(summary))
    used = similarity if profile is not None and profile.spec.similarity is not None else None
    return Finished(outcome, summary, profile.to_json_dict() if profile else None, used)


def _without_nan(value: Any) -> Any:
    """The same with None for figures that were not measured: JSON has no NaN, and few readers take it."""
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def candidates(run: Run) -> list[tuple[Candidate, Verdict | None]]:
    """The ladder with the verdicts so far; None for a candidate that was not measured to the end."""
    ladder = run.study.get(LADDER) or []
    return [(candidate, run.study.get(verdict_key(index))) for index, candidate in enumerate(ladder)]


def tried(study: TuningStudy) -> list[dict[str, Any]]:
    """Every complete trial, as summary.json lists it."""
    trials, complete = [], study.complete()
    exact = next((study.levels(trial) for trial in complete if trial.user_attrs.get("digest") == EXACT), [])
    exact_tpot_ms = [level.latency_ms["tpot"]["p50"] for level in exact]
    for trial in complete:
        levels = study.levels(trial)
        items = sum(level.items for level in levels)
        trials.append({
            "number": trial.number, "policy": trial.user_attrs.get("describe", ""), "digest": trial.user_attrs.get("digest"),
            "tpotMs": trial.value, "firstLoadTpotMs": objective(levels[:1], exact_tpot_ms) if levels else None, "items": items,
            "accuracy": sum(level.accuracy for level in levels) / len(levels) if levels else None,
            "dropPoints": 100 * sum(level.losses - level.gains for level in levels) / items if items else 0.0,
            "differShare": sum(level.differ for level in levels) / items if items else 0.0,
            "violations": dict(trial.constraints), "feasible": all(by <= 0 for by in trial.constraints.values()),
            "crash": trial.user_attrs.get("crash"), "stopped": next((lv.stopped for lv in levels if lv.stopped), None),
            "seconds": trial.user_attrs.get("seconds"), "slots": trial.user_attrs.get("slots", []), "levels": [level.to_dict() for level in levels],
        })  # fmt: skip
    return trials


def build_summary(run: Run, outcome: Outcome, profile: Profile | None) -> dict[str, Any]:
    """Everything that the report shows, as plain JSON."""
    study, spec = run.study, run.spec
    ladder = []
    for index, (candidate, verdict) in enumerate(candidates(run)):
        word = verdict.verdict if verdict else "not run"
        result = verdict.to_dict() if verdict else None
        ladder.append({"number": index + 1, **candidate.to_dict(), "result": result, "verdict": word})
    opening, pace, ceiling = study.get(OPENING), study.get(PACE), study.get(CEILING)
    spent = study.get(SPENT) or Spent()
    return {
        "outcome": outcome.ending.value, "exitCode": outcome.exit_code, "message": outcome.message, "advisory": outcome.advisory,
        "nearestMiss": asdict(outcome.nearest) if outcome.nearest else None, "chosen": None if outcome.chosen is None else outcome.chosen + 1,
        "model": spec.model, "condition": condition(spec), "headline": headline(spec),
        "limits": [{"metric": m, "statistic": n, "limitMs": limit} for m, n, limit in spec.slo.limits()],
        "accuracy": {"maxDropPoints": spec.accuracy.max_drop_points, "confidence": spec.accuracy.confidence,
                     "searchItems": len(run.search), "certItems": len(run.cert), "alpha": opening.alpha if opening else None,
                     "earlierOpenings": opening.earlier if opening else None},
        "noiseFloor": asdict(noise_floor(run)), "ceiling": ceiling.to_dict() if ceiling else None, "trials": tried(study), "counts": outcome.trials, "ladder": ladder,
        "mostLoad": _most_load(study) if outcome.chosen is not None else None,
        "searchEnded": study.get(SEARCH_ENDED) or None, "ladderEnded": study.get(LADDER_ENDED),
        "spent": {"deviceHours": spent.device_s / 3600, "wallSeconds": spent.wall_s},
        "seconds": study.get(SECONDS) or {}, "pace": pace.to_dict() if pace else None,
        "budget": {"deviceHours": spec.search.device_hours, "wallMinutes": spec.search.wall_minutes, "trials": spec.search.trials},
        "profile": profile.to_json_dict() if profile else None, "out": str(study.out), "serve": serve_line(spec, study.out),
    }  # fmt: skip


def _most_load(study: TuningStudy) -> dict[str, Any] | None:
    """What the closing bisection found, with its sentence; None where it was not asked for or has not ended."""
    found = study.get(MOST_LOAD)
    return None if found is None else {**asdict(found), "times": found.times, "sentence": most_load.sentence(found)}


def serve_line(spec: TuningSpec, out: Path) -> str:
    """The command that serves the profile by the engine that it was measured on."""
    command = shlex.join(["sere", "serve", spec.model, *engine_options(spec)])
    return f"SERE_PROFILE={shlex.quote(str(out / 'profile.json'))} {command}"
