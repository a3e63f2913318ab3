"""What a run leaves behind: profile.json (a SereProfile), summary.json, report.html, and the lines on the screen."""

from __future__ import annotations

import datetime
import json
import os
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sere_ext.contract.policy import Policy
from sere_ext.contract.profile import (
    AccuracyEvidence,
    Evidence,
    GoldenPrompt,
    Paired,
    Profile,
    ProfileKey,
    ProfileSpec,
    Ratio,
    SimilarityRef,
)

from sere_autotune.calibration import checked_digest
from sere_autotune.outcome import Ending, Outcome
from sere_autotune.planner import percent
from sere_autotune.result.report import render
from sere_autotune.search.ladder import Rung, RungResult
from sere_autotune.search.learned import noise_floor
from sere_autotune.study.run import Run
from sere_autotune.study.study import TuningStudy
from sere_autotune.trial.measures import Answer
from sere_autotune.tuning.spec import TuningSpec, engine_options

GOLDEN_PROMPTS = 24


@dataclass
class Finished:
    """A run's end, for the command line and the publisher."""

    outcome: Outcome
    summary: dict[str, Any]
    profile: dict[str, Any] | None = None
    similarity: Path | None = None  # the artefact that the chosen policy needs


def headline(spec: TuningSpec) -> str:
    """The TPOT statistic that is shown first: the strictest percentile that is limited, else the mean."""
    named = [name for metric, name, _ in spec.slo.limits() if metric == "tpot"]
    return named[-1] if named else "mean"


def condition(spec: TuningSpec) -> str:
    """What every comparison of the run holds equal."""
    load = spec.workload.load
    if load.concurrency and len(load.concurrency) > 1:
        return "equal concurrency " + ", ".join(map(str, load.concurrency))
    return load.condition(load.levels[0])


def finish(run: Run, outcome: Outcome, similarity: Path | None = None) -> Finished:
    """Write all files of a finished run. The same study gives the same content again."""
    out = run.study.out
    profile = None
    if similarity is None and (out / "similarity.safetensors").exists():
        similarity = out / "similarity.safetensors"
    elif similarity is None and run.spec.similarity:
        similarity = Path(run.spec.similarity)
    if outcome.chosen is not None:
        profile = build_profile(run, outcome, similarity)
        profile.write(out / "profile.json")
    else:
        (out / "profile.json").unlink(missing_ok=True)  # of an earlier run: never a policy that this run did not choose
    summary = build_summary(run, outcome, profile)
    write(out / "summary.json", json.dumps(summary, indent=2) + "\n")
    write(out / "report.html", render(summary))
    used = similarity if profile is not None and profile.spec.similarity is not None else None
    return Finished(outcome, summary, profile.to_json_dict() if profile else None, used)


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(path.suffix + ".part")
    partial.write_text(text)
    os.replace(partial, path)


def rung_results(run: Run) -> list[tuple[Rung, RungResult | None]]:
    ladder = [Rung(**rung) for rung in run.study.get("ladder", [])]
    found: list[tuple[Rung, RungResult | None]] = []
    for index, rung in enumerate(ladder):
        stored = run.study.get(f"rung.{index}")
        found.append((rung, RungResult(**stored) if stored else None))
    return found


def _paired(result: RungResult, metric: str, name: str, limit: float | None) -> Paired:
    return Paired(exact=result.latency_ms["exact"][metric][name], chosen=result.latency_ms["chosen"][metric][name], limit=limit)


def build_profile(run: Run, outcome: Outcome, similarity: Path | None) -> Profile:
    """The SereProfile of the chosen rung.

    Raises:
        UsageError: the similarity artefact is no longer the one that was certified.
    """
    assert outcome.chosen is not None
    rung, result = rung_results(run)[outcome.chosen]
    assert result is not None
    spec, study = run.spec, run.study
    policy = Policy.parse(rung.policy)
    limits = {metric: (name, limit) for metric, name, limit in spec.slo.limits()}
    name = headline(spec)
    noise = noise_floor(run)
    spent = study.get("spent", {})

    def optional(metric: str) -> Paired | None:
        return _paired(result, metric, *limits[metric]) if metric in limits else None

    def ratio(statistic: str) -> Ratio:
        found = result.speedup[statistic]
        blocks = f"TPOT {statistic}, {condition(spec)}"
        return Ratio(value=found["value"], low=found["low"], high=found["high"], pairs=found["pairs"], condition=blocks)

    evidence = Evidence(
        certified=result.verdict == "passed" and not outcome.advisory,
        tpot_ms=_paired(result, "tpot", name, limits.get("tpot", (name, None))[1]),
        tpot_mean_ms=_paired(result, "tpot", "mean", None),
        ttft_ms=optional("ttft"),
        e2el_ms=optional("e2el"),
        speedup=ratio(name),
        speedup_mean=ratio("mean"),
        accuracy=AccuracyEvidence(
            exact=result.exact_accuracy,
            chosen=result.chosen_accuracy,
            items=result.items,
            max_drop_points=spec.accuracy.max_drop_points,
            confidence=1 - result.alpha,
            drop_points=result.drop * 100,
            upper_bound_points=result.upper_bound * 100,
            p_value=result.p_value,
            discordant_share=(result.losses + result.gains) / max(result.items, 1),
            noise_floor=noise["differ"],
        ),
        active_experts=(
            Paired(exact=result.active_before, chosen=result.active_after)
            if result.active_before is not None and result.active_after is not None
            else None
        ),
        rung=outcome.chosen + 1,
        rungs=len(rung_results(run)),
        trials=len(study.complete()),
        device_hours=spent.get("deviceSeconds", 0.0) / 3600,
        workload=_workload(spec),
        study=str(study.get("fingerprint", "")),
        created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )
    reference = None
    if policy.needs_similarity() and similarity is not None:
        digest = checked_digest(similarity, study.get("similarity"), study.out)
        reference = SimilarityRef(uri=similarity.resolve().as_uri(), digest=digest)
    body = ProfileSpec(
        policy=policy,
        key=ProfileKey.model_validate(study.get("key")),
        similarity=reference,
        evidence=Evidence.model_validate(rounded(evidence.to_json_dict())),
        golden_prompts=golden(run),
    )
    return Profile(metadata={"name": policy.digest}, spec=body)


def rounded(value: Any) -> Any:
    """Floats to five significant digits, all the way down: people read a profile, and nothing was measured finer."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _workload(spec: TuningSpec) -> str:
    source = "accuracy items"
    if spec.workload.dataset:
        source = Path(spec.workload.dataset).name
    elif spec.workload.synthetic:
        source = f"synthetic {spec.workload.synthetic.input_tokens}/{spec.workload.synthetic.output_tokens} tokens"
    return f"{source}, {condition(spec)}"


def golden(run: Run) -> tuple[GoldenPrompt, ...]:
    """Search items that exact routing answers right, for the canary."""
    answers: dict[str, Answer] = run.study.exact_answers(0)
    right = [item for item in run.search if item.digest in answers and answers[item.digest].correct]
    return tuple(
        GoldenPrompt(prompt=item.prompt, answer=item.answer, max_tokens=min(item.task.max_tokens, 512))
        for item in right[:GOLDEN_PROMPTS]
    )


def tried(study: TuningStudy) -> list[dict[str, Any]]:
    """Every complete trial, as the summary tells it."""
    trials = []
    for trial in study.complete():
        levels = study.levels(trial)
        items = sum(level.items for level in levels)
        trials.append({
            "number": trial.number, "policy": trial.user_attrs.get("describe", ""), "digest": trial.user_attrs.get("digest"),
            "tpotMs": trial.value, "items": items,
            "accuracy": sum(level.accuracy for level in levels) / len(levels) if levels else None,
            "dropPoints": 100 * sum(level.losses - level.gains for level in levels) / items if items else 0.0,
            "differShare": sum(level.differ for level in levels) / items if items else 0.0,
            "violations": dict(trial.constraints), "feasible": all(by <= 0 for by in trial.constraints.values()),
            "crash": trial.user_attrs.get("crash"), "stopped": next((lv.stopped for lv in levels if lv.stopped), None),
            "seconds": trial.user_attrs.get("seconds"), "levels": [level.to_dict() for level in levels],
        })  # fmt: skip
    return trials


def build_summary(run: Run, outcome: Outcome, profile: Profile | None) -> dict[str, Any]:
    """Everything that the report shows, as plain JSON."""
    study, spec = run.study, run.spec
    rungs = []
    for index, (rung, result) in enumerate(rung_results(run)):
        verdict = result.verdict if result else "not run"
        rungs.append({"rung": index + 1, **rung.to_dict(), "result": result.to_dict() if result else None, "verdict": verdict})
    spent = study.get("spent", {})
    return {
        "outcome": outcome.ending.value, "exitCode": outcome.exit_code, "message": outcome.message, "advisory": outcome.advisory,
        "nearestMiss": outcome.to_dict()["nearest"], "chosenRung": None if outcome.chosen is None else outcome.chosen + 1,
        "model": spec.model, "condition": condition(spec), "headline": headline(spec),
        "limits": [{"metric": m, "statistic": n, "limitMs": limit} for m, n, limit in spec.slo.limits()],
        "accuracy": {"maxDropPoints": spec.accuracy.max_drop_points, "confidence": spec.accuracy.confidence,
                     "searchItems": len(run.search), "certItems": len(run.cert), "alpha": study.get("alpha"),
                     "earlierOpenings": study.get("openings")},
        "noiseFloor": noise_floor(run), "trials": tried(study), "counts": outcome.trials, "ladder": rungs,
        "searchEnded": study.get("searchEnded"), "ladderEnded": study.get("ladderEnded"),
        "spent": {"deviceHours": spent.get("deviceSeconds", 0.0) / 3600, "wallSeconds": spent.get("wallSeconds", 0.0)},
        "seconds": study.get("seconds", {}), "pace": study.get("pace"),
        "budget": {"deviceHours": spec.search.device_hours, "wallMinutes": spec.search.wall_minutes, "trials": spec.search.trials},
        "profile": profile.to_json_dict() if profile else None, "out": str(study.out), "serve": serve_line(spec, study.out),
    }  # fmt: skip


def lines(summary: dict[str, Any]) -> str:
    """The closing lines, as the engineer reads them."""
    report = f"Report   {Path(summary['out']) / 'report.html'}"
    hours = f"{summary['spent']['deviceHours']:.2f} device-hours"
    if summary["chosenRung"] is None:
        word = {
            Ending.INFEASIBLE: "Nothing feasible", Ending.BUDGET: "Budget spent", Ending.CANNOT_CERTIFY: "Cannot certify",
        }.get(Ending(summary["outcome"]), "Failed")  # fmt: skip
        miss = summary["nearestMiss"]
        found = [f"{word}   {len(summary['trials'])} trials, {hours}", f"  {summary['message']}"]
        if miss and summary["outcome"] != Ending.INFEASIBLE.value:
            found += [f"  closest so far   {miss['text']}", f"  would have to give   {miss['give']}"]
        return "\n".join([*found, *_not_taken(summary), report])
    rung = summary["ladder"][summary["chosenRung"] - 1]
    result, name = rung["result"], summary["headline"]
    ratio = result["speedup"][name]
    low_high = f" [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio["low"] is not None else ""
    limit = {(row["metric"], row["statistic"]): row["limitMs"] for row in summary["limits"]}
    found = [
        f"Chosen   {rung['describe']}       rung {summary['chosenRung']} of {len(summary['ladder'])}, {hours}",
        f"            {'exact':<11}{'chosen':<11}limit",
    ]
    shown = [("tpot", name), *(key for key in limit if key != ("tpot", name))]
    for metric, statistic in shown:
        exact, chosen = (result["latency_ms"][arm][metric][statistic] for arm in ("exact", "chosen"))
        bound = limit.get((metric, statistic))
        extra = f"{ratio['value']:.2f}x{low_high} at {summary['condition']}, {ratio['pairs']} pairs" if metric == "tpot" else ""
        left = f"{metric.upper()} {statistic}"
        found.append(f"{left:<11} {exact:>6.1f} ms  {chosen:>6.1f} ms  {f'{bound:g} ms' if bound else '':<9} {extra}".rstrip())
    accuracy = summary["accuracy"]
    sure = "NOT certified (advisory)" if summary["advisory"] else f"certified at {percent(accuracy['confidence'])}"
    found.append(
        f"accuracy    {result['exact_accuracy']:>7.2%}    {result['chosen_accuracy']:>7.2%}    -{accuracy['maxDropPoints']:<8g} "
        f"{sure} on {result['items']:,} held-out items"
    )
    if result["active_before"] is not None:
        found.append(
            f"experts     {result['active_before']:>6.1f}     {result['active_after']:>6.1f}              active per layer and step"
        )
    if rung["describe"] not in {trial["policy"] for trial in summary["trials"]}:
        found.append(f"Picked   by a model of all {len(summary['trials'])} trials, none of which was this policy")
    return "\n".join([*found, *_not_taken(summary), report, f"Serve    {summary['serve']}"])


def serve_line(spec: TuningSpec, out: Path) -> str:
    """The command that serves the profile by the engine that it was measured on."""
    command = shlex.join(["sere", "serve", spec.model, *engine_options(spec)])
    return f"SERE_PROFILE={shlex.quote(str(out / 'profile.json'))} {command}"


def _not_taken(summary: dict[str, Any]) -> list[str]:
    others = []
    for rung in summary["ladder"]:
        if rung["rung"] == summary["chosenRung"]:
            continue
        reason = rung["result"]["reason"] if rung["result"] else "not run, the ladder had ended"
        if rung["result"] and rung["verdict"] == "passed":
            reason = "passed too, slower"
        others.append(f"rung {rung['rung']}, {rung['describe']}: {reason}")
    return ["Not taken   " + "; ".join(others)] if others else []
