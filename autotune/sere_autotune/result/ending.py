"""How a run ended, in words: the chosen candidate, or what came closest and what would have to give."""

from __future__ import annotations

from collections.abc import Sequence

from sere_autotune.outcome import MIN_SPEEDUP, Ending, NearestMiss, Outcome, nearest_miss
from sere_autotune.result.profile import condition, headline
from sere_autotune.search.kinds import removed_kinds
from sere_autotune.study.run import Run
from sere_autotune.study.schema import Candidate, Verdict
from sere_autotune.words import bracketed, percent
from sere_ext.contract.policy import Policy

# What would have to give, by the verdict on the candidate that came closest.
_GIVE = {
    "failures": "the load, until the engine answers every request",
    "slo": "the latency limit, or the load",
    "slower": "the load (larger batches gain more), or accuracy.maxDropPoints",
    "undecided": "certify.pairs or search.deviceHours, for more pairs of blocks, or the load (larger batches gain more)",
    "accuracy": "accuracy.maxDropPoints, or more items to tell such a drop from the limit",
    "crashed": "search.policies, to leave that kind out, or the engine's options",
}


def chosen(run: Run, index: int, candidate: Candidate, verdict: Verdict) -> Outcome:
    """The ending with a certificate."""
    name = headline(run.spec)
    ratio, mean = verdict.speedup[name], verdict.speedup["mean"]
    message = (
        f"{candidate.describe}: {ratio.value:.2f}x TPOT {name} at {condition(run.spec)}, shown to be faster (mean {mean.value:.2f}x{bracketed(mean.low, mean.high)}), "
        f"{-verdict.drop * 100:+.2f} points, certified at {percent(run.spec.accuracy.confidence)} on {verdict.items:,} held-out items"
    )
    return Outcome(Ending.CHOSEN, message, counts(run), chosen=index)


def advisory(run: Run, ladder: Sequence[Candidate], verdicts: Sequence[Verdict]) -> Outcome | None:
    """The ending of a run that may go on without a certificate: the last candidate within the limits as measured.

    A candidate that was shown to lose more than the limit at a load, in a task or at an edge is not within them.
    """
    usable = {"passed", "accuracy", "undecided"}
    fit = [
        index
        for index, verdict in enumerate(verdicts)
        if verdict.verdict in usable and verdict.drop <= run.max_drop and not any(part.harmed for part in verdict.parts)
    ]
    if not fit:
        return None
    index = fit[-1]
    message = f"{ladder[index].describe}: not certified ({verdicts[index].reason}); advisory only"
    return Outcome(Ending.CHOSEN, message, counts(run), chosen=index, advisory=True)


def counts(run: Run) -> dict[str, int]:
    complete = run.study.complete()
    crashed = sum(bool(t.user_attrs.get("crash")) for t in complete)
    feasible = sum(all(by <= 0 for by in t.constraints.values()) for t in complete)
    # The names are the operator's (docs/reference.md): they become status.trials of the SereTuningJob.
    return {
        "scheduled": run.spec.search.trials,
        "completed": len(complete),
        "feasible": feasible,
        "infeasible": len(complete) - feasible,
        "failed": crashed,
    }


def nearest(run: Run) -> NearestMiss | None:
    trials = []
    for trial in run.study.complete():
        policy = Policy.parse(trial.user_attrs["policy"])
        trials.append((policy.describe(), policy.uses_rerouting(), dict(trial.constraints)))
    limits = {f"{metric}.{name}": limit for metric, name, limit in run.spec.slo.limits()}
    return nearest_miss(trials, limits, run.spec.accuracy.max_drop_points)


def infeasible(run: Run, ladder: Sequence[Candidate], verdicts: Sequence[Verdict]) -> Outcome:
    """The ending without a policy: what came closest, and what would have to give."""
    slow, gone = _slow(run), removed_kinds(run.study.complete())
    if not verdicts and gone.keys() >= set(run.spec.search.policies):
        causes = "; ".join(f"{kind.value}: {why}" for kind, why in gone.items())
        text = f"the engine refuses or dies of every kind of policy ({causes})"
        miss = NearestMiss("no policy", "crash", 0.0, text, "search.policies, or the engine's options")
    elif verdicts:
        # A candidate that lacks nothing but pairs of blocks came closest; else the last one that failed. One that passed and
        # was not taken follows on the ladder after one that showed harm at an edge, and is no safer.
        missed = [i for i, v in enumerate(verdicts) if v.verdict != "passed"]
        best = next((i for i in missed if verdicts[i].verdict == "undecided"), missed[-1])
        miss = _miss(run, ladder[best], verdicts[best])
    elif slow or (found := nearest(run)) is None:
        name = min(slow)[1] if slow else "no policy"
        text = f"{name} keeps every limit but is not at least {MIN_SPEEDUP - 1:.0%} faster than exact routing"
        miss = NearestMiss(name, "speed", 0.0, text, "accuracy.maxDropPoints, or the load (larger batches gain more)")
    else:
        miss = found
    message = f"nothing is feasible; closest: {miss.text}; what would have to give: {miss.give}; exact routing stays"
    return Outcome(Ending.INFEASIBLE, message, counts(run), miss)


def _miss(run: Run, candidate: Candidate, verdict: Verdict) -> NearestMiss:
    """What a candidate that was measured lacks."""
    give = _GIVE[verdict.verdict]
    by = max(0.0, verdict.upper_bound - run.max_drop)
    return NearestMiss(candidate.describe, verdict.verdict, by, f"{candidate.describe}: {verdict.reason}", give)


def _slow(run: Run) -> list[tuple[float, str]]:
    """(mean TPOT in ms, policy in words) of the re-routing trials that keep every limit."""
    return [
        (trial.value or 0.0, str(trial.user_attrs["describe"]))
        for trial in run.study.complete()
        if all(by <= 0 for by in trial.constraints.values()) and Policy.parse(trial.user_attrs["policy"]).uses_rerouting()
    ]
