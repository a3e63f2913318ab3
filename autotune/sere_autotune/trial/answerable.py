"""Items on which no answer could ever be judged right: they can show neither a loss nor a gain. Pure.

Such an item is a fault of its file or of its task's metric, pattern, stop strings or maxTokens, so a run refuses it by file
and line before anything is spent.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from sere_autotune.trial.items import Item
from sere_ext.contract.answers import last_number
from sere_ext.contract.errors import UsageError

Tokens = Callable[[str], int]  # tokens of a text, without special ones

_SHOWN = 40  # characters of an answer that a message shows
# What a group may hold that depends on the text around the group, so that the group alone cannot be tried on an answer.
_LOOKS_AROUND = re.compile(r"\(\?(?:=|!|<=|<!|\(|P=)|\\[1-9B]")


def check_answers(items: Iterable[Item], tokens: Tokens) -> None:
    """Raise UsageError naming the first item by file and line on which no answer could be right, why, and what to do.

    Args:
        tokens: of a text; called only for answers with more bytes than their task's maxTokens.
    """
    wrong = [(item, problem) for item in items if (problem := unanswerable(item, tokens))]
    if wrong:
        item, problem = min(wrong, key=lambda found: _in_file_order(found[0]))
        others = f" ({len(wrong) - 1:,} more lines are like it)" if len(wrong) > 1 else ""
        raise UsageError(f"accuracy.tasks: {item.place} {problem}{others}")


def _in_file_order(item: Item) -> list[tuple[str, int]]:
    """Sorts items by file and line, where they come in the order of their hashes."""
    return [(text, int(number or 0)) for text, number in re.findall(r"(\D*)(\d*)", item.place)]


def unanswerable(item: Item, tokens: Tokens) -> str | None:
    """Why no answer to an item could be right, and what to do, as the end of a sentence; None where one could."""
    task, wanted = item.task, item.answer.strip()
    if not wanted:
        return "has an empty answer; remove the line, or name the column by fields: {answer: ...}"
    shown = repr(wanted if len(wanted) <= _SHOWN else wanted[:_SHOWN] + "...")
    if task.metric == "numeric":
        number = last_number(wanted)
        if number is None:
            return f"wants {shown}, which holds no number for metric numeric; remove the line, or choose another metric"
        wanted = _shortest(number)
    if task.metric == "regex" and task.pattern is not None and not _can_find(task.pattern, wanted):
        return f"wants {shown}, which the pattern {task.pattern!r} can never find; correct the pattern or the line"
    if word := next((word for word in task.stop if word in wanted), None):
        return f"wants {shown}, and the stop string {word!r} would end it before it is whole; correct stop, or remove the line"
    if len(wanted.encode()) > task.max_tokens:
        # A tokenizer may write the same text with a blank before it in fewer tokens.
        needed = min(tokens(wanted), tokens(f" {wanted}"))
        if needed > task.max_tokens:
            return (
                f"wants an answer of {needed:,} tokens, and maxTokens is {task.max_tokens:,}; raise maxTokens, or remove the line"
            )
    return None


def _shortest(number: str) -> str:
    """The shortest way to write a number: without zeros behind its point."""
    return number.rstrip("0").rstrip(".") if "." in number else number


def _can_find(pattern: str, wanted: str) -> bool:
    """Whether what a pattern compares, its first group or else the whole of it, can be the wanted answer.

    True as well where that cannot be told from the group alone.
    """
    compared = first_group(pattern)
    if _LOOKS_AROUND.search(compared):
        return True
    flags = re.compile(pattern).flags
    compared = re.sub(r"^\(\?[aiLmsux]+\)", "", compared)  # flags of the whole pattern, which stand in `flags` now
    try:
        found = re.compile(compared, flags)
    except re.error:
        return True
    return any(found.fullmatch(text) for text in (wanted, f" {wanted}", f"{wanted} ", f"{wanted}\n"))


def first_group(pattern: str) -> str:
    """The source of a regular expression's first capturing group without its parentheses; the whole source where it has none."""
    start, depth, at = None, 0, 0
    while at < len(pattern):
        char = pattern[at]
        if char == "\\":
            at += 1
        elif char == "[":
            at = _end_of_class(pattern, at)
        elif char == "(":
            named = re.match(r"\(\?P<\w+>", pattern[at:])
            if start is None and (named or not pattern.startswith("(?", at)):
                start, depth = at + (named.end() if named else 1), 0
            elif start is not None:
                depth += 1
        elif char == ")" and start is not None:
            if depth == 0:
                return pattern[start:at]
            depth -= 1
        at += 1
    return pattern


def _end_of_class(pattern: str, at: int) -> int:
    """Position of the bracket that ends the character class which begins at `at`. A bracket in first place belongs to it."""
    at += 2 if pattern.startswith("[^", at) else 1
    at += pattern.startswith("]", at)
    while at < len(pattern) and pattern[at] != "]":
        at += 2 if pattern[at] == "\\" else 1
    return at
