"""Harm at the edges of a policy: a certificate holds at the tuned loads, and the policy also applies to smaller and larger steps.

The smallest and the largest steps that a policy re-routes are where its rule is furthest from what was certified: a small
batch leaves few experts to refill with, a large one frees more slots. In an open loop, where a faster policy has fewer requests in
flight, the smallest steps are those of the fastest one. So the candidate that would be chosen answers search items at
the numbers of requests whose steps have those sizes. Where it is shown to lose more than the limit there, it fails as it would
in the certificate, and the fastest of the safer candidates is asked next. That nothing is shown on so few items certifies
nothing at those loads; it keeps out what breaks there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sere_autotune.certify.accuracy import harm_p, harmed
from sere_autotune.certify.most_load import STEP, TIMES
from sere_autotune.certify.verdict import over_the_limit, walk
from sere_autotune.search.blocks import block, trial_items
from sere_autotune.study.run import Run
from sere_autotune.study.schema import Candidate, Part, Verdict, verdict_key
from sere_autotune.trial.load import Load
from sere_autotune.trial.measures import LevelResult, Pairs, answers, pair
from sere_autotune.words import no_harm
from sere_ext.contract.errors import BudgetExhaustedError, EngineCrashError
from sere_ext.contract.policy import Kind, Policy


def loads(policy: Policy, tuned: Sequence[float], tokens: float, most: int) -> list[int]:
    """Requests at a time whose steps are the smallest and the largest of each bucket that re-routes, without the tuned ones; ascending.

    Args:
        tuned: requests in flight at each load level.
        tokens: of one request in a decode step: 1, and more where drafts are verified.
        most: requests that the engine runs at once; 0 where nobody knows.
    """
    top = most or round(TIMES * max(tuned))
    found: list[int] = []
    taken = list(tuned)
    for bucket in (bucket for table in policy.tables() for bucket in table if bucket.kind is not Kind.EXACT):
        for edge in (-(-bucket.min_tokens // tokens), bucket.max_tokens // tokens):
            load = min(max(1, round(edge)), top)
            if all(max(load / other, other / load) > STEP for other in taken):
                found.append(load)
                taken.append(load)
    return sorted(found)


def without_harm(run: Run, ladder: Sequence[Candidate], verdicts: list[Verdict]) -> int | None:
    """Index of the fastest candidate that passed and shows no harm at its edges; None where there is none.

    Args:
        verdicts: on the first candidates of the ladder; those on candidates that are asked here gain a part for each edge.
    """
    while (index := walk(verdicts)[0]) is not None:
        verdict = verdicts[index]
        if not any(part.kind == "edge" for part in verdict.parts):
            verdict = verdicts[index] = _asked(run, index, Policy.parse(ladder[index].policy), verdict)
            run.study.put(verdict_key(index), verdict)
        if verdict.verdict == "passed":
            return index
    return None


def judged(verdict: Verdict, pairs: Sequence[tuple[int, Pairs]], max_drop: float) -> Verdict:
    """A verdict with what was seen at its edges; it fails where harm is shown at one of them (Holm over all). Pure.

    Args:
        pairs: requests at a time, and the answers there paired with exact routing's.
        max_drop: the accuracy limit, a share.
    """
    tested = {load: harm_p(found.losses, found.gains, found.n, max_drop) for load, found in pairs}
    bad = harmed(tested)
    parts = [
        Part("edge", f"{load} requests at a time", found.n, found.losses, found.gains, tested[load], load in bad)
        for load, found in pairs
    ]
    verdict = replace(verdict, parts=[*verdict.parts, *parts])
    if not bad:
        return verdict
    reason = over_the_limit([part for part in parts if part.harmed])
    return replace(verdict, verdict="accuracy", reason=f"{reason}; search.buckets says to which sizes of a step a policy applies")


def _asked(run: Run, index: int, policy: Policy, verdict: Verdict) -> Verdict:
    """The verdict with the edges of its policy; those that the budget does not pay for are left out, and that is said."""
    exact = run.study.levels(run.study.complete()[0])
    tuned = [level or max(1.0, seen.batch) for level, seen in zip(run.spec.workload.load.levels, exact, strict=True)]
    assert run.facts is not None
    pairs: list[tuple[int, Pairs]] = []
    edges = loads(policy, tuned, _tokens(tuned, exact), run.facts.most_requests)
    if edges:
        run.report.stage(
            f"harm check of candidate {index + 1} where its policy applies too: {' and '.join(map(str, edges))} requests at a time",
            0,
        )
    for number, load in enumerate(edges):
        try:
            found, failed = _answered(run, policy, load, tuned, number)
        except BudgetExhaustedError:  # the certificate was complete before
            run.report.step(f"{load} requests at a time: not asked, since the budget is spent", 0.0)
            continue
        except EngineCrashError as error:
            return replace(verdict, verdict="crashed", reason=f"the engine failed under it at {load} requests at a time: {error}")
        if failed > run.spec.slo.max_failure_share:
            reason = f"{failed:.2%} of requests failed at {load} requests at a time, where the policy applies too, {run.spec.slo.max_failure_share:.2%} allowed"
            return replace(verdict, verdict="failures", reason=reason)
        pairs.append((load, found))
    checked = judged(verdict, pairs, run.max_drop)
    for part in checked.parts[len(verdict.parts) :]:
        run.report.step(f"{part.name}: {no_harm(part.losses, part.gains, part.items, part.harmed)}", 0.0)
    return checked


def _tokens(tuned: Sequence[float], exact: Sequence[LevelResult]) -> float:
    """Tokens of one request in a decode step, from the exact trial's median steps; 1 where they were not counted."""
    counted = [seen.step_tokens / load for load, seen in zip(tuned, exact, strict=True) if seen.step_tokens]
    return max(1.0, sum(counted) / len(counted)) if counted else 1.0


def _answered(run: Run, policy: Policy, load: int, tuned: Sequence[float], number: int) -> tuple[Pairs, float]:
    """A trial's items under the policy at a load, paired with what exact routing answered at the nearest tuned load.

    Args:
        number: of the edge, so that edges have items of their own where there are enough.

    Returns:
        The pairs, without failed requests, and the share of requests that failed.

    Raises:
        BudgetExhaustedError: the budget does not pay for a trial's time, or ran out meanwhile.
        EngineCrashError: the engine died of it twice.
    """
    if run.left_s() < run.spec.search.trial_seconds:
        raise BudgetExhaustedError("the budget does not pay for a harm check")
    nearest = min(range(len(tuned)), key=lambda level: abs(tuned[level] - load))
    items = trial_items(run, number)
    requests = run.traffic.requests(items, offset=number * len(items))
    fillers = run.traffic.requests(items[: max(2 * load, 8)])
    report = block(run, policy, requests, Load(concurrency=load, warmup=load), fillers, run.spec.search.trial_seconds, None)
    run.study.note_spent(run.budget)
    sent = report.block.sent
    failed = sum(request.error is not None for request in sent) / max(1, len(sent))
    return pair(run.study.exact_answers(nearest), answers(sent)), failed
