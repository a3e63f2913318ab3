"""One tuning run from its checked input to its outcome: rank, certify, write, and find the most load. A run goes on where a killed run was."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sere_autotune import calibration
from sere_autotune.certify import closing, most_load
from sere_autotune.certify.stage import certify
from sere_autotune.doctor import measure
from sere_autotune.doctor.finding import NOTHING, Finding
from sere_autotune.outcome import MIN_SPEEDUP, Ending, Outcome
from sere_autotune.planner import ceiling_seconds
from sere_autotune.prepare import Prepared, opened_items
from sere_autotune.result import ending, results
from sere_autotune.search import learned
from sere_autotune.search import rank as search
from sere_autotune.search.given import given_ladder
from sere_autotune.study.budget import Budget
from sere_autotune.study.journal import FULL
from sere_autotune.study.ledger import Ledger, spent_alpha
from sere_autotune.study.meter import Meter
from sere_autotune.study.run import Engine, Reporter, Run
from sere_autotune.study.schema import CEILING, ENGINE, MOST_LOAD, OUTCOME, PACE, SEARCH_ENDED, SECONDS, SIMILARITY
from sere_autotune.study.study import TuningStudy, fingerprint, forget, study_id
from sere_autotune.trial.engine import EngineFacts
from sere_autotune.trial.items import set_digest
from sere_autotune.trial.traffic import Traffic
from sere_autotune.tuning.spec import TuningSpec
from sere_ext.contract.errors import BudgetExhaustedError, CannotCertifyError, DiskFullError, UsageError
from sere_ext.contract.policy import Policy

_LEAST_S = 10.0  # of a budget, with less of which no engine is started
EngineFactory = Callable[[TuningSpec, str | None, Callable[[bool], None]], Engine]


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
        make_engine: makes the engine for a spec and similarity path; it calls the third argument with True when device time begins and with False when it ends.
        advisory: go on without the chance of a certificate; the profile says `certified: false`.
        fresh: forget what `out` holds of an earlier study.
        only: certify this policy and search nothing.
        artefact_limit: bytes that the similarity artefact may have where the result is published.

    Raises:
        CannotCertifyError: refused before anything was spent.
        DiskFullError: there is no room in `out`; what was finished is kept.
        SereError: broken input, or an engine that does not start.
    """
    spec, out = prepared.spec, prepared.out
    if not prepared.plan.can_certify and not advisory:
        raise CannotCertifyError(prepared.plan.problem)
    if fresh:
        forget(out)
    mark = fingerprint(spec, set_digest(prepared.cert), prepared.model) + (f" {only.digest}" if only else "")
    study = TuningStudy(out, mark)
    budget = Budget.of(spec.search, spec.engine.tensor_parallel_size)
    budget.began = time.monotonic()
    study.restore(budget)
    ledger = prepared.ledger
    try:
        stored = study.get(OUTCOME)
        # What a finished study found does not change; only a spent budget can be raised, or a certificate be gone without.
        again = stored and (stored.ending is Ending.BUDGET or (advisory and stored.ending is Ending.CANNOT_CERTIFY))
        settled = stored if stored and not again else None
        if settled and not _seeks_load(study, spec, settled):
            report.stage("this study has ended; --fresh begins anew", spec.search.trials)
            return results.finish(Run(spec, study, _NoEngine(), budget, Traffic(spec.workload, prepared.items),
                                      prepared.search, prepared.cert, report), settled)  # fmt: skip
        if prepared.source.origin is calibration.Origin.CALIBRATED:
            report.stage("calibrating", 1)
        similarity = calibration.provide(prepared.source, spec, prepared.search)
        digest = _settle_artefact(study, prepared, similarity, only, artefact_limit) if similarity is not None else None
        if settled is None and budget.left_s(time.monotonic()) < _LEAST_S:
            raise BudgetExhaustedError(f"{budget.which(time.monotonic())} is spent; raise it and run the same line again")
        with contextlib.closing(Meter(study, budget)) as meter:
            engine = make_engine(spec, str(similarity) if similarity else None, meter.engine)
            run = Run(spec, study, engine, budget, Traffic(spec.workload, prepared.items), prepared.search, prepared.cert, report)
            run.advisory, run.cert_items = advisory, prepared.plan.cert_items
            earlier = ledger.openings(opened_items(spec, prepared.cert), study_id(out))
            run.alpha = spent_alpha(spec.accuracy.alpha, earlier)
            run.similarity, run.similarity_digest = similarity, digest
            engine.limit(run.left_s)
            try:
                outcome = settled or _run(run, ledger, prepared, only)
                study.put(OUTCOME, outcome)
                if _seeks_load(study, spec, outcome):
                    results.finish(run, outcome, similarity)  # so that whoever stops it now has the certified policy
                    _find_most_load(run, outcome)
            finally:
                engine.stop()
        return results.finish(run, outcome, similarity)
    except OSError as error:
        if error.errno in FULL:
            raise DiskFullError(out, error) from error
        raise
    finally:
        study.close()


def _seeks_load(study: TuningStudy, spec: TuningSpec, outcome: Outcome) -> bool:
    """Whether the most load of the chosen policy is still to be measured."""
    certified = outcome.chosen is not None and not outcome.advisory
    return spec.certify.most_load and certified and study.get(MOST_LOAD) is None


def _find_most_load(run: Run, outcome: Outcome) -> None:
    """Measure the most load of the chosen policy. Whatever goes wrong in it leaves the outcome as it is, with a sentence why."""
    assert outcome.chosen is not None
    try:
        if run.left_s() < _LEAST_S:
            raise BudgetExhaustedError(f"{run.budget.which(time.monotonic())} is spent")
        if run.facts is None:
            _start(run)
        with _timed(run, "mostLoad"):
            found = closing.measure(run, outcome.chosen)
    except Exception as error:  # the certificate stands
        found = closing.unmeasured(run, str(error) or type(error).__name__)
    run.study.put(MOST_LOAD, found)
    run.report.step(f"most load: {most_load.sentence(found)}", 0.0)


def _settle_artefact(study: TuningStudy, prepared: Prepared, path: Path, only: Policy | None, limit: int | None) -> str:
    """Digest of the artefact that all trials and the certificate use and that is published; it may not change under them.

    Args:
        limit: bytes that it may have where the result is published; None where it is not.

    Raises:
        UsageError: too large, or trials were measured with another one; raised before an engine is started.
    """
    before = study.get(SIMILARITY) if study.complete() else None
    if limit is not None:
        settled = before or (only.similarity_digest if only is not None else None)
        calibration.make_publishable(path, prepared.source.origin, limit, settled)
    digest = calibration.checked_digest(path, before, study.out)
    study.put(SIMILARITY, digest)
    return digest


def _check_same_engine(study: TuningStudy, key: dict[str, Any]) -> None:
    """What was measured on one device or engine release says nothing about another.

    Raises:
        UsageError: the study has trials of another.
    """
    before = study.get(ENGINE)
    key = json.loads(json.dumps(key))  # as it was stored
    if not before or before == key or not study.complete():
        return
    changed = ", ".join(
        f"{name} was {before.get(name)} and is {key.get(name)}"
        for name in sorted({*before, *key})
        if before.get(name) != key.get(name)
    )
    raise UsageError(
        f"{study.out} holds trials of another engine: {changed}; go on where they were measured, name another `out`, or add "
        "--fresh to begin anew"
    )


def _start(run: Run) -> EngineFacts:
    """Start the engine, which must be the one that the study's trials were measured on."""
    with _timed(run, "start"):
        facts = run.facts = run.engine.start()
    _check_same_engine(run.study, facts.key)
    run.study.put(ENGINE, facts.key)
    return facts


def _run(run: Run, ledger: Ledger, prepared: Prepared, only: Policy | None) -> Outcome:
    """The engine's part. Every ending but a broken engine is an outcome."""
    study = run.study
    run.report.stage("starting the engine", run.spec.search.trials, len(study.complete()))
    try:
        facts = _start(run)
        if only is not None:
            only.check_model(facts.top_k)
            if facts.layers:
                only.check_layers(facts.layers)
            ladder = given_ladder(run, only)
        else:
            with _timed(run, "ceiling"):
                ceiling = _ceiling(run, prepared)
            if ceiling is not None and ceiling.verdict == NOTHING:
                return Outcome(Ending.INFEASIBLE, ceiling.sentence, ending.counts(run))
            with _timed(run, "search"):
                search.rank(run)
                ladder = learned.freeze_ladder(run)
        ledger.note(learned.noise_discordance(run), study.get(PACE))
        if not ladder and (why := study.get(SEARCH_ENDED)):
            raise BudgetExhaustedError(f"the search ended with {why}; raise it")
        if not ladder:
            return ending.infeasible(run, [], [])
        with _timed(run, "certification"):
            chosen, verdicts = certify(run, ladder, ledger)
    except BudgetExhaustedError as error:
        return Outcome(
            Ending.BUDGET, f"{error}; nothing was certified, exact routing stays", ending.counts(run), ending.nearest(run)
        )
    except CannotCertifyError as error:
        return Outcome(Ending.CANNOT_CERTIFY, str(error), ending.counts(run), ending.nearest(run))
    if chosen is not None:
        return ending.chosen(run, chosen, ladder[chosen], verdicts[chosen])
    return (run.advisory and ending.advisory(run, ladder, verdicts)) or ending.infeasible(run, ladder, verdicts)


def _ceiling(run: Run, prepared: Prepared) -> Finding | None:
    """What could be gained at most: measured once in a study, before its first trial, on a small part of the budget.

    Raises:
        BudgetExhaustedError: a budget ran out meanwhile.
    """
    found = run.study.get(CEILING)
    if found is None and not run.study.complete():
        seconds = ceiling_seconds(run.left_s())
        if not seconds:
            return None
        assert run.facts is not None
        run.report.stage("timing decode steps", run.spec.search.trials)
        found = measure.examine(
            run.engine, run.facts, prepared.work(run.traffic), MIN_SPEEDUP, seconds, lambda text: run.report.step(text, 0.0)
        )
        run.study.put(CEILING, found)
        run.study.note_spent(run.budget)
    if found is not None:
        run.report.step(f"ceiling: {found.sentence}", 0.0)
    return found


@contextlib.contextmanager
def _timed(run: Run, stage: str) -> Iterator[None]:
    """Add a stage's seconds, over all restarts, to the study."""
    began = time.monotonic()
    try:
        yield
    finally:
        times = run.study.get(SECONDS) or {}
        run.study.put(SECONDS, {**times, stage: times.get(stage, 0.0) + time.monotonic() - began})


class _NoEngine:
    """Stands in where a finished study is read again."""

    start_seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("a finished study needs no engine")
