"""Whether an answer to a labelled prompt is right: one rule for the tuner, its certificate and the operator's canary. Pure.

Run as a program (`python -m sere_ext.contract.answers`) it judges the JSON on its standard input, a list of the arguments of
`right`, and prints a JSON list of booleans. So a caller can put a limit of time on a regular expression, which may take for ever.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import Literal

AnswerMetric = Literal["exact", "numeric", "regex", "contains"]

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def right(metric: AnswerMetric, pattern: str | None, text: str, answer: str, stop: Sequence[str] = ()) -> bool:
    """Whether `text` answers the prompt rightly.

    exact     the text is the answer, but for white space around it
    contains  the answer is somewhere in the text
    numeric   the last number in the text is the number in the answer; commas between digits do not count
    regex     the first group of `pattern`, found in the text, is the answer (the whole match where it has no group)

    Args:
        pattern: of metric regex, else None.
        text: what the model generated, with or without what follows a stop string.
        answer: the right answer.
        stop: strings that end the text.
    """
    text, wanted = ended(text, stop), answer.strip()
    if metric == "exact":
        return text.strip() == wanted
    if metric == "contains":
        return wanted in text
    if metric == "numeric":
        given, number = last_number(text), last_number(wanted)
        return given is not None and number is not None and float(given) == float(number)
    found = re.search(pattern or "", text)
    return found is not None and ((found.group(1) if found.groups() else found.group(0)) or "").strip() == wanted


def ended(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop strings, as an engine that knows them would have ended it."""
    return text[: min((at for word in stop if word and (at := text.find(word)) >= 0), default=len(text))]


def last_number(text: str) -> str | None:
    """The last number in a text without the commas between its digits; None where the text has no number."""
    found = _NUMBER.findall(text)
    return str(found[-1]).replace(",", "") if found else None


if __name__ == "__main__":
    json.dump([right(*arguments) for arguments in json.load(sys.stdin)], sys.stdout)
