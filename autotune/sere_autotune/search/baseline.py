"""Whether the evaluation can tell anything: exact routing must answer well enough to have something to lose. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from sere_autotune.trial.items import Item
from sere_autotune.trial.measures import Answer
from sere_ext.contract.errors import CannotCertifyError

# Exact routing must be right on this many times the accuracy limit, so that losing the limit is losing a tenth of what is
# right at most; half of all items is always enough.
_TIMES_THE_LIMIT = 10
_ENOUGH = 0.5
_SHOWN = 3
_LONGEST = 80


def check_baseline(
    answers: Mapping[str, Answer], items: Sequence[Item], max_drop: float, which: str = "search items"
) -> str | None:
    """Refuse an evaluation that exact routing fails, whatever the cause: a metric, column, stop string or template.

    Where exact routing is right on few items, a policy that breaks the model has next to nothing to lose, and any policy
    would be certified.

    Args:
        answers: exact routing's, by item digest.
        items: among which those were asked.
        max_drop: the accuracy limit, a share.
        which: what the items are, for the sentence.

    Returns:
        A warning where exact routing is right on less than half, else None.

    Raises:
        CannotCertifyError: exact routing is right on too few items, or on no more than one constant answer would be.
    """
    asked = [item for item in items if item.digest in answers]
    if why := too_bad({item.digest: answers[item.digest].correct for item in asked}, asked, max_drop, which):
        raise CannotCertifyError(
            f"{why}. {_examples(answers, asked)} Check metric, pattern, maxTokens, stop and the items' answers, then begin anew "
            "with --fresh"
        )
    right = sum(answers[item.digest].correct for item in asked)
    if right < _ENOUGH * len(asked):
        return f"{_share(right, len(asked), which)}, less than half: check metric, pattern, maxTokens and stop. {_examples(answers, asked)}"
    return None


def too_bad(right: Mapping[str, bool], items: Sequence[Item], max_drop: float, which: str = "search items") -> str:
    """Why exact routing answers too badly for a drop to mean something; empty where it does not.

    Args:
        right: whether exact routing is right, by item digest.
        items: those that were asked, all of them among `right`.
        max_drop: the accuracy limit, a share.
        which: what the items are, for the sentence.
    """
    if not items:
        return ""
    count = sum(right[item.digest] for item in items)
    least = min(_TIMES_THE_LIMIT * max_drop, _ENOUGH)
    constant, times = Counter(item.answer.strip() for item in items).most_common(1)[0]
    if count < least * len(items):
        return (
            f"{_share(count, len(items), which)}; a limit of {max_drop * 100:g} points can be shown where it is right on {least:.0%} or "
            "more, since a policy cannot lose what is not there"
        )
    if len(items) >= 20 and times > 1 and count <= times:
        return (
            f"{_share(count, len(items), which)}, and always answering {constant[:_LONGEST]!r} would be right on {times:,}: these items "
            "cannot tell a policy that breaks the model from one that does not"
        )
    return ""


def _share(right: int, asked: int, which: str) -> str:
    return f"exact routing is right on {right:,} of {asked:,} {which} ({right / asked:.1%})"


def _examples(answers: Mapping[str, Answer], asked: Sequence[Item]) -> str:
    """Three items that were answered wrong, with the wanted and the given answer."""
    wrong = [item for item in asked if not answers[item.digest].correct][:_SHOWN]
    shown = [
        f"{_short(item.prompt, tail=True)} wants {_short(item.answer)} and got {_short(answers[item.digest].text)}"
        for item in wrong
    ]
    return f"For example: {'; '.join(shown)}." if shown else ""


def _short(text: str, *, tail: bool = False) -> str:
    if len(text) > _LONGEST:
        text = "..." + text[-_LONGEST:] if tail else text[:_LONGEST] + "..."
    return repr(text)
