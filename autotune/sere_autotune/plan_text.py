"""The plan of a run in words, as `--dry-run` prints it and every run begins. Pure."""

from __future__ import annotations

import math
import textwrap

from sere_autotune.planner import ASSUMED_TRUE_DROP, Plan, budget_seconds
from sere_autotune.tuning.spec import TuningSpec
from sere_autotune.words import about, percent

_INDENT = 11  # characters of the words before each line


def fitted(text: str, width: int) -> str:
    """The lines of `describe` broken at a screen's width in characters, with what goes on set below what it belongs to."""
    return "\n".join(
        textwrap.fill(line, width, subsequent_indent=" " * _INDENT, break_long_words=False, break_on_hyphens=False)
        for line in text.splitlines()
    )


def describe(plan: Plan, spec: TuningSpec) -> str:
    """What a run will do, how long it takes and whether its items can certify the limit, one line for each finding."""
    notes = [f"Note       {note}" for note in plan.notes]
    similarity = f"Similarity {plan.source.describe(plan.search_items)}"
    return "\n".join([_what(plan, spec), *_time(plan, spec), *_accuracy(plan, spec), similarity, *notes])


def _what(plan: Plan, spec: TuningSpec) -> str:
    kinds = f"{', '.join(spec.search.policies)} in {plan.trials} trial{'s' if plan.trials > 1 else ''}"
    load, slo = spec.workload.load, spec.slo.limits()
    loads = ", ".join(load.condition(level) for level in load.levels)
    limits = ", ".join(f"{metric.upper()} {name} {limit:g} ms" for metric, name, limit in slo)
    return f"Plan       {kinds if plan.trials else 'a certificate for one policy'} of {spec.model} at {loads}; within {limits}"


def _accuracy(plan: Plan, spec: TuningSpec) -> list[str]:
    """What the items are for, and whether those that are kept can certify the limit."""
    lines = [
        f"Accuracy   limit {plan.limit * 100:g} point{'s' if plan.limit != 0.01 else ''} at {percent(plan.confidence)}; "
        f"{plan.items:,} items, {plan.cert_items:,} of them kept for certification"
    ]
    lines.append(f"           {_outlook(plan)}" if plan.can_certify else f"           CANNOT CERTIFY: {plan.problem}")
    if plan.trials:
        per_trial = min(spec.search.items_per_trial, plan.search_items)
        lines.append(
            f"           {plan.search_items:,} others are searched on: exact routing answers all of them and a trial {per_trial:,}; how often "
            f"exact routing differs from itself is asked on {per_trial:,} of them once and on a quarter as many beside each trial"
        )
    if plan.openings:
        lines.append(
            f"           {plan.openings} earlier stud{'ies' if plan.openings > 1 else 'y'} opened these items, so only "
            f"alpha = {plan.alpha:.3g} is left; fresh items restore it"
        )
    for index, need in enumerate(plan.needs):
        if need.true_some is None:
            continue
        if plan.noise is not None and index == 0:
            start = f"exact against exact is taken to differ on {need.discordance:.2%} of items, from last time: "
        else:
            start = f"at {need.discordance:.0%} difference "
        lines.append(
            f"           {start}{need.true_some:,} items certify a policy that truly costs "
            f"{_true_cost(plan)}, {need.true_zero:,} one that costs nothing"
        )
    if plan.smallest is not None:
        lines.append(
            f"           the smallest limit that {plan.cert_items:,} items could certify is {plan.smallest_points:g} points"
            + ("" if plan.noise is not None else ", if no answer differs at all")
        )
    return lines


def _time(plan: Plan, spec: TuningSpec) -> list[str]:
    """How long it takes, in all and in its parts, and what ends it before that."""
    basis = (
        "at the pace of the last run"
        if plan.pace_known
        else "a guess, since the first run shows how many answers a minute brings"
    )
    least = "" if plan.pace_known else "at least "
    total = plan.start_s + plan.ceiling_s + plan.search_s + plan.certify_s + plan.most_load_s
    parts = [f"start {about(plan.start_s)}"]
    if plan.ceiling_s:
        parts.append(f"ceiling {about(plan.ceiling_s)}")
    if plan.trials:
        parts.append(f"search {plan.trials} trial{'s' if plan.trials > 1 else ''} {about(plan.search_s)}")
    parts.append(f"certification of up to {plan.rungs} candidate{'s' if plan.rungs > 1 else ''} {least}{about(plan.certify_s)}")
    if plan.most_load_s:
        parts.append(f"most load {least}{about(plan.most_load_s)}")
    wall = f", {spec.search.wall_minutes:g} minutes on the clock" if spec.search.wall_minutes else ""
    short = total > budget_seconds(spec)
    cut = "; less than the estimate above, so trials or candidates may be cut (search.deviceHours)" if short else ""
    lines = [
        f"Time       {least}{about(total)} in all ({basis}): {'; '.join(parts)}",
        f"Budget     {spec.search.device_hours:g} device-hours{wall}; it is never exceeded{cut}",
    ]
    if budget_seconds(spec) < plan.start_s:
        lines.append(f"           it ends before an engine has started ({about(plan.start_s)}); raise search.deviceHours")
    elif budget_seconds(spec) < plan.least_s:
        hours = plan.least_s * spec.engine.tensor_parallel_size / 3600
        lines.append(
            f"           it pays for no certificate: the engine's start, one trial and one candidate take {least}{about(plan.least_s)}; "
            f"give search.deviceHours {math.ceil(hours * 100) / 100:g} or more"
        )
    return lines


def _true_cost(plan: Plan) -> str:
    return f"{plan.limit * 100 * ASSUMED_TRUE_DROP:.2g} points"


def _outlook(plan: Plan) -> str:
    """Up to which difference the items that are kept certify the limit, and what a difference is."""
    some = f"up to {_at_most(plan.most_some)} for one that" if plan.most_some is not None else "at none for one that"
    return (
        f"this limit can be certified if answers differ little enough: {plan.cert_items:,} items suffice up to {_at_most(plan.most_zero or 0.0)} "
        f"difference for a policy that costs nothing, {some} truly costs {_true_cost(plan)} (difference: items that only one of the "
        "two routings answers right; suffice: with a chance of 80%)"
    )


def _at_most(share: float) -> str:
    """A share in percent, two digits of it and never rounded up: `1.2%` for 0.0129."""
    if share <= 0:
        return "0%"
    places = 1 - math.floor(math.log10(share * 100))
    return f"{math.floor(share * 100 * 10**places) / 10**places:g}%"
