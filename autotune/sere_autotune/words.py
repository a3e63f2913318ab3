"""Shares, times, intervals and what a trial is over, as people read them."""

from __future__ import annotations

from collections.abc import Sequence


def percent(share: float) -> str:
    """A share in [0, 1] in percent: `95%`, and `97.5%` where that is what was asked for."""
    return f"{round(share * 100, 6):g}%"


def bracketed(low: float | None, high: float | None) -> str:
    """An interval behind its value: ` [1.63, 1.81]`; nothing where it has no limits."""
    return f" [{low:.2f}, {high:.2f}]" if low is not None and high is not None else ""


def duration(seconds: float) -> str:
    """A time, rounded to its first digits: `1.1 h`, `4 min`, `30 s`."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 100:
        return f"{seconds / 60:.0f} min"
    return f"{seconds:.0f} s"


def about(seconds: float) -> str:
    """An estimated time: `about 4 min`."""
    return f"about {duration(seconds)}"


def over_limits(broken: Sequence[str], items: int) -> str:
    """Which limits a trial is over. Its few items only rank policies, so the limit of accuracy comes with what one answer weighs.

    Args:
        broken: keys of the limits, such as `tpot.p95`; at least one.
        items: that the trial's accuracy was compared on.
    """
    words = [key for key in broken if key != "accuracy" or not items]
    if "accuracy" in broken and items:
        answer = 100 / items
        words.append(f"accuracy on {items:,} items, where one answer is {answer:.2f} points; a trial only ranks")
    return f"over the limit of {', '.join(words)}"


def no_harm(losses: int, gains: int, items: int, harmed: bool) -> str:
    """What a harm check saw, in answers: so few certify nothing, and points would look like the certificate's.

    Args:
        losses: answers that exact routing has right and the policy wrong; `gains` are the reverse.
        harmed: whether they show a loss over the limit.
    """
    shown = "shown to lose more than the limit" if harmed else "no harm shown"
    return f"{losses:,} of {items:,} answers lost, {gains:,} gained: {shown}"


def screened(active: Sequence[float], *, recorded: bool) -> str:
    """What counting says of all policies before any of them was tried.

    Args:
        active: mean active experts of a layer and step at the first load level, exact routing's first.
        recorded: whether the engine's own steps were counted on, and not steps with the skew of published models.
    """
    exact, *others = active
    least, most = f"{min(others):.1f}", f"{max(others):.1f}"
    policies = "1 policy" if len(others) == 1 else f"{len(others):,} policies"
    steps = "recorded steps of exact routing" if recorded else "assumed steps, since this engine does not record its own"
    found = least if least == most else f"{least} to {most}"
    return f"counted on {steps}: {policies} with {found} active experts a layer, exact routing {exact:.1f}"
