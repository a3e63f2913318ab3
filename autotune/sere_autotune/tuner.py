"""One tuning run from its file to its outcome: prepare, rank, certify, write. Goes on where a killed run was."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sere_ext.contract.errors import SimilarityError, UsageError
from sere_ext.contract.policy import Policy
from sere_ext.contract.similarity import language_config, model_config_digest, names_folder, read_meta

from sere_autotune import calibration, planner
from sere_autotune.certify import stage as certify
from sere_autotune.outcome import BudgetExhaustedError, Ending, NearestMiss, Outcome, nearest_miss
from sere_autotune.result import results
from sere_autotune.search import learned
from sere_autotune.search import rank as search
from sere_autotune.search.ladder import MIN_SPEEDUP, Rung, RungResult
from sere_autotune.study.budget import Budget
from sere_autotune.study.ledger import Ledger
from sere_autotune.study.meter import Meter
from sere_autotune.study.run import Engine, Reporter, Run
from sere_autotune.study.study import TuningStudy, fingerprint, forget
from sere_autotune.trial.items import Item, load_items, set_digest, split
from sere_autotune.trial.traffic import Traffic
from sere_autotune.tuning.spec import TuningSpec

EngineFactory = Callable[[TuningSpec, str | None, Callable[[bool], None]], Engine]


@dataclass
class Prepared:
    """Input that was read and found good; nothing was started."""

    spec: TuningSpec
    items: list[Item]
    search: list[Item]
    cert: list[Item]
    config_digest: str
    source: calibration.Source
    plan: planner.Plan

    @property
    def out(self) -> Path:
        return Path(self.spec.out)


def prepare(spec: TuningSpec, only: Policy | None = None) -> Prepared:
    """Read and check all input, and make the plan.

    Args:
        only: the policy to certify, where nothing is to be searched.

    Raises:
        UsageError: a missing or bad file, a similarity artefact of another model, too few items, a dense model.
        PolicyError: `only` keeps more experts than the model's tokens have, or names layers that it does not have.
    """
    spec.check_files()
    items = load_items(spec.accuracy)
    if len(items) < 40:
        raise UsageError(
            f"accuracy.tasks: {len(items)} distinct items are too few to split into search and certification; give 40"
        )
    mine, held_out = split(items, spec.accuracy.search_items)
    config = read_config(spec)
    digest = model_config_digest(config)
    if only is not None:  # before an engine is started for it
        if top_k := experts_per_token(config):
            only.check_model(top_k)
        if layers := language_config(config).get("num_hidden_layers"):
            only.check_layers(range(int(str(layers))), "layers")
    similarity = read_meta(spec.similarity) if spec.similarity else None
    if similarity is not None and similarity.config_digest != digest:
        raise SimilarityError(
            f"{spec.similarity} was made for {similarity.model_name} ({similarity.model_type}, {similarity.num_experts} experts), "
            f"not for {spec.model}; make one with `sere calibrate {spec.model} --data FILE`"
        )
    ledger = Ledger(Path(spec.out))
    known = ledger.known(digest)
    openings = ledger.openings(digest, set_digest(held_out), _study_name(spec, held_out, digest))
    noise, pace = known.get("noise"), known.get("pace", {})
    source = calibration.find(spec, digest, only)
    plan = planner.make_plan(spec, len(items), len(held_out), noise, openings, pace, source=source, searches=only is None)
    return Prepared(spec, items, mine, held_out, digest, source, plan)


def read_config(spec: TuningSpec) -> dict[str, object]:
    """The model's config.json, decoded. Raises UsageError if there is none or it has no experts."""
    from sere_ext.similarity.file import model_config_dict

    if names_folder(spec.model) and not Path(spec.model).exists():
        raise UsageError(f"model: there is no folder {spec.model} (from {Path.cwd()}); check its spelling")
    try:
        config = model_config_dict(spec.model, spec.revision or None)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"model: cannot read the configuration of {spec.model} ({first}); check the name or folder") from error
    merged = language_config(config)
    if not any(merged.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")):
        raise UsageError(f"model: {spec.model} is a dense model ({merged.get('model_type')}): it has no experts to re-route")
    return config


def experts_per_token(config: dict[str, object]) -> int | None:
    """top-k as config.json names it, None where it does not (the engine tells it later)."""
    merged = language_config(config)
    found = next(
        (merged[key] for key in ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k") if key in merged), None
    )
    return found if isinstance(found, int) and found > 0 else None


def _study_name(spec: TuningSpec, cert: Sequence[Item], config_digest: str) -> str:
    return f"{Path(spec.out).resolve()} {fingerprint(spec, set_digest(cert), config_digest)[:19]}"


def tune(
    prepared: Prepared,
    make_engine: EngineFactory,
    report: Reporter,
    *,
    advisory: bool = False,
    fresh: bool = False,
    only: Policy | None = None,
    artefact_limit: int | None = None,
) -> results.Finished:
    """Run, or go on with, one tuning.

    Args:
        make_engine: makes the engine for a spec and similarity path; is told when device time begins and ends.
        advisory: go on without the chance of a certificate; the profile says `certified: false`.
        fresh: forget what `out` holds of an earlier study.
        only: certify this policy and search nothing.
        artefact_limit: bytes that the similarity artefact may have where the result is published.

    Raises:
        CannotCertifyError: refused before anything was spent.
        SereError: broken input, or an engine that does not start.
    """
    spec, out = prepared.spec, prepared.out
    if not prepared.plan.can_certify and not advisory:
        raise planner.CannotCertifyError(prepared.plan.problem)
    if fresh:
        forget(out)
    mark = fingerprint(spec, set_digest(prepared.cert), prepared.config_digest) + (f" {only.digest}" if only else "")
    study = TuningStudy(out, mark)
    budget = Budget.of(spec.search, spec.engine.tensor_parallel_size)
    budget.began = time.monotonic()
    study.restore(budget)
    ledger = Ledger(out)
    try:
        stored = study.get("outcome")
        if stored and Outcome.from_dict(stored).ending is not Ending.BUDGET:
            # What a finished study found does not change; only a spent budget can be raised.
            report.stage("this study has ended; --fresh begins anew", spec.search.trials)
            return results.finish(Run(spec, study, _NoEngine(), budget, Traffic(spec.workload, prepared.items),
                                      prepared.search, prepared.cert, report), Outcome.from_dict(stored))  # fmt: skip
        if prepared.source.origin is calibration.Origin.CALIBRATED:
            report.stage("calibrating", 1)
        similarity = calibration.provide(prepared.source, spec, prepared.search)
        digest = _settle_artefact(study, prepared, similarity, only, artefact_limit) if similarity is not None else None
        if budget.left_s(time.monotonic()) < 10:
            raise BudgetExhaustedError(f"{budget.which(time.monotonic())} is spent; raise it and run the same line again")
        with contextlib.closing(Meter(study, budget)) as meter:
            engine = make_engine(spec, str(similarity) if similarity else None, meter.engine)
            run = Run(spec, study, engine, budget, Traffic(spec.workload, prepared.items), prepared.search, prepared.cert, report)
            run.advisory, run.cert_items, run.alpha = advisory, prepared.plan.cert_items, prepared.plan.alpha
            run.similarity_digest = digest
            try:
                outcome = _run(run, ledger, prepared, only)
            finally:
                engine.stop()
        study.put("outcome", outcome.to_dict())
        return results.finish(run, outcome, similarity)
    finally:
        study.close()


def _settle_artefact(study: TuningStudy, prepared: Prepared, path: Path, only: Policy | None, limit: int | None) -> str:
    """Digest of the artefact that all trials and the certificate use and that is published; it may not change under them.

    Args:
        limit: bytes that it may have where the result is published; None where it is not.

    Raises:
        UsageError: too large, or trials were measured with another one; said before an engine is started.
    """
    before: str | None = study.get("similarity") if study.complete() else None
    if limit is not None:
        settled = before or (only.similarity_digest if only is not None else None)
        calibration.make_publishable(path, prepared.source.origin, limit, settled)
    digest = calibration.checked_digest(path, before, study.out)
    study.put("similarity", digest)
    return digest


def _check_same_engine(study: TuningStudy, key: dict[str, Any]) -> None:
    """What was measured on one device or engine release says nothing about another.

    Raises:
        UsageError: the study has trials of another.
    """
    before = study.get("key")
    key = json.loads(json.dumps(key))  # as it was stored
    if not before or before == key or not study.complete():
        return
    changed = ", ".join(f"{name} was {before.get(name)} and is {key.get(name)}" for name in sorted({*before, *key})
                        if before.get(name) != key.get(name))  # fmt: skip
    raise UsageError(
        f"{study.out} holds trials of another engine: {changed}; go on where they were measured, name another `out`, or add "
        "--fresh to begin anew"
    )


def _run(run: Run, ledger: Ledger, prepared: Prepared, only: Policy | None) -> Outcome:
    """The engine's part. Every ending but a broken engine is an outcome."""
    study = run.study
    run.report.stage("starting the engine", run.spec.search.trials, len(study.complete()))
    try:
        with _timed(run, "start"):
            run.facts = run.engine.start()
        _check_same_engine(study, run.facts.key)
        study.put("key", run.facts.key)
        study.put("topK", run.facts.top_k)
        if only is not None:
            only.check_model(run.facts.top_k)
            if run.facts.layers:
                only.check_layers(run.facts.layers)
            ladder = _probe(run, only)
        else:
            with _timed(run, "search"):
                search.rank(run)
                ladder = learned.freeze_ladder(run)
        ledger.note(prepared.config_digest, noise=learned.noise_discordance(run), pace=study.get("pace"))
        if not ladder and study.get("searchEnded"):
            raise BudgetExhaustedError(f"the search ended with {study.get('searchEnded')}; raise it")
        if not ladder:
            return _infeasible(run, [], [])
        with _timed(run, "certification"):
            chosen, done = certify.certify(run, ladder, ledger, prepared.config_digest)
    except BudgetExhaustedError as error:
        return Outcome(Ending.BUDGET, f"{error}; nothing was certified, exact routing stays", _counts(run), _nearest(run))
    except planner.CannotCertifyError as error:
        return Outcome(Ending.CANNOT_CERTIFY, str(error), _counts(run), _nearest(run))
    if chosen is not None:
        rung, result = ladder[chosen], done[chosen]
        message = (
            f"{rung.describe}: {_ratio_text(run, result)}, {-result.drop * 100:+.2f} points, certified at "
            f"{planner.percent(run.spec.accuracy.confidence)} on {result.items:,} held-out items"
        )
        return Outcome(Ending.CHOSEN, message, _counts(run), chosen=chosen)
    if run.advisory:
        fit = [i for i, r in enumerate(done) if r.verdict != "slo" and r.drop <= run.max_drop]
        if fit:
            index = fit[-1]
            message = f"{ladder[index].describe}: not certified ({done[index].reason}); advisory only"
            return Outcome(Ending.CHOSEN, message, _counts(run), chosen=index, advisory=True)
    return _infeasible(run, ladder, done)


@contextlib.contextmanager
def _timed(run: Run, stage: str) -> Iterator[None]:
    """Add a stage's seconds, over all restarts, to the study."""
    began = time.monotonic()
    try:
        yield
    finally:
        times = dict(run.study.get("seconds", {}))
        times[stage] = times.get(stage, 0.0) + time.monotonic() - began
        run.study.put("seconds", times)


def _probe(run: Run, policy: Policy) -> list[Rung]:
    """A one-rung ladder for a given policy: exact routing and the policy once on search items, for pace and power."""
    frozen = run.study.get("ladder")
    if frozen is not None:
        return [Rung(**rung) for rung in frozen]
    assert run.facts is not None
    run.similarity_digest = policy.similarity_digest or run.similarity_digest
    spec = run.spec.model_copy(update={"search": run.spec.search.model_copy(update={"trials": 1})})
    ranked = dataclasses.replace(run, spec=spec)
    search.rank(ranked)
    items = search.window(run.search, 1, run.spec.search.items_per_trial)
    levels = search.measure(run, policy, items, number=1, seconds=run.spec.search.trial_seconds, reject=False)
    exact = run.study.levels(run.study.complete()[0])
    n = max(1, sum(level.items for level in levels))
    d = (sum(level.losses + level.gains for level in levels) + 0.5) / n
    drop = max(0.0, sum(level.losses - level.gains for level in levels) / n)
    from sere_autotune.trial.measures import objective
    from sere_autotune.trial.stats import power

    chance = power(run.cert_items, d, drop, run.max_drop, run.alpha)
    speed = objective(exact) / objective(levels, [level.latency_ms["tpot"]["p50"] for level in exact])
    # One small probe says little of the drop: the certificate decides, so it is never refused from this.
    rung = Rung(policy.to_json_dict(), policy.describe(), 1.0, min(drop, run.max_drop / 2), d, speed, max(chance, 0.5))
    run.study.put("ladder", [rung.to_dict()])
    return [rung]


def _ratio_text(run: Run, result: RungResult) -> str:
    name = results.headline(run.spec)
    ratio = result.speedup.get(name) or {}
    return f"{ratio.get('value', float('nan')):.2f}x TPOT {name} at {results.condition(run.spec)}"


def _counts(run: Run) -> dict[str, int]:
    complete = run.study.complete()
    crashed = sum(bool(t.user_attrs.get("crash")) for t in complete)
    feasible = sum(all(by <= 0 for by in t.constraints.values()) for t in complete)
    # The names are the operator's (ARCHITECTURE.md): they become status.trials of the SereTuningJob.
    return {
        "scheduled": run.spec.search.trials, "completed": len(complete), "feasible": feasible,
        "infeasible": len(complete) - feasible, "failed": crashed,
    }  # fmt: skip


def _nearest(run: Run) -> NearestMiss | None:
    trials = []
    for trial in run.study.complete():
        policy = Policy.parse(trial.user_attrs["policy"])
        trials.append((policy.describe(), policy.uses_rerouting(), dict(trial.constraints)))
    limits = {f"{metric}.{name}": limit for metric, name, limit in run.spec.slo.limits()}
    return nearest_miss(trials, limits, run.spec.accuracy.max_drop_points)


def _infeasible(run: Run, ladder: Sequence[Rung], done: Sequence[RungResult]) -> Outcome:
    nearest = _nearest(run)
    if done:
        failed = [(rung, result) for rung, result in zip(ladder, done, strict=False)]
        rung, result = failed[-1]
        text = f"{rung.describe}: {result.reason}"
        give = {
            "slo": "the latency limit, or the load",
            "accuracy": "accuracy.maxDropPoints, or more items to tell such a drop from the limit",
        }[result.verdict]
        nearest = NearestMiss(rung.describe, result.verdict, max(0.0, result.upper_bound - run.max_drop), text, give)
    else:
        slow = [t for t in run.study.complete() if all(by <= 0 for by in t.constraints.values())]
        slow = [t for t in slow if Policy.parse(t.user_attrs["policy"]).uses_rerouting()]
        if slow or nearest is None:
            best = min(slow, key=lambda t: t.value or 0.0).user_attrs["describe"] if slow else "no policy"
            text = f"{best} keeps every limit but is not at least {MIN_SPEEDUP - 1:.0%} faster than exact routing"
            nearest = NearestMiss(best, "speed", 0.0, text, "accuracy.maxDropPoints, or the load (larger batches gain more)")
    message = f"nothing is feasible; closest: {nearest.text}; what would have to give: {nearest.give}; exact routing stays"
    return Outcome(Ending.INFEASIBLE, message, _counts(run), nearest)


class _NoEngine:
    """Stands in where a finished study is read again."""

    start_seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("a finished study needs no engine")
