"""Labelled items: reading, judging an answer, and the one split into SEARCH and CERT."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from sere_autotune.tuning.spec import AccuracySpec, TaskSpec
from sere_ext.contract.answers import right
from sere_ext.contract.errors import UsageError
from sere_ext.contract.records import Message, answer_of, prompt_of, read_rows
from sere_ext.contract.tuning import ItemFields


@dataclass(frozen=True)
class Item:
    """One distinct labelled prompt.

    Attributes:
        digest: of the normalised prompt; the unit of the split and of every count.
        prompt: the text, or the last user's message of a conversation.
        answer: the right one.
        messages: the conversation that is sent by the chat template; () sends the prompt as plain text.
        place: file and line, for messages.
    """

    digest: str
    prompt: str
    answer: str
    task: TaskSpec
    messages: tuple[Message, ...] = field(default=(), hash=False)
    place: str = field(default="", compare=False)

    def correct(self, text: str) -> bool:
        """Whether an answer is right under the task's metric."""
        return right(self.task.metric, self.task.pattern, text, self.answer, self.task.stop)


def load_items(accuracy: AccuracySpec) -> list[Item]:
    """All tasks' items in the order of their digests, which is the order of a fixed shuffle; each unit of evidence once.

    Prompts that differ in case, blanks and punctuation alone are one item, if they want the same answer. Items that
    name the same `group` (questions on one text, variants of one exercise) stand or fall together, so they are no
    independent evidence: the first of them by digest stands for the group.

    Raises:
        UsageError: a file or line that cannot be read, that lacks prompt or answer, or that repeats a prompt with another answer.
    """
    found: dict[str, Item] = {}
    groups, raw = dict[str, str](), dict[str, str]()  # digest -> group, and -> the prompt as it was written
    for index, task in enumerate(accuracy.tasks):
        field = f"accuracy.tasks.{index}.file"
        columns = task.fields or ItemFields()
        for row in read_rows(task.file, field):
            prompt = prompt_of(row, field, columns.prompt)
            messages = prompt.messages or (({"role": "user", "content": prompt.text},) if accuracy.chat else ())
            asked = json.dumps(messages, sort_keys=True) if len(prompt.messages) > 1 else prompt.text
            answer = answer_of(row, field, columns.answer)
            digest = _digest(normalised(asked))
            if digest in found and found[digest].answer != answer and raw[digest] != asked:
                digest = _digest(asked)  # alike in form, and another question all the same
            item = Item(digest, prompt.text, answer, task, messages, row.place)
            known = found.setdefault(digest, item)
            if known.answer != item.answer:
                raise UsageError(
                    f"{field}: {item.place} has the prompt of {known.place} with another answer ({item.answer[:40]!r}, there "
                    f"{known.answer[:40]!r}); remove one of the two lines"
                )
            raw.setdefault(digest, asked)
            if (group := row.values.get("group")) is not None:
                groups.setdefault(digest, f"{index} {group}")
    if not found:
        files = ", ".join(task.file for task in accuracy.tasks)
        raise UsageError(f'accuracy.tasks: no items in {files}; write one on each line, as {{"prompt": "...", "answer": "..."}}')
    kept: list[Item] = []
    seen: set[str] = set()
    for digest in sorted(found):
        group = groups.get(digest)
        if group is None or group not in seen:
            kept.append(found[digest])
        if group is not None:
            seen.add(group)
    return kept


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_BORDER = re.compile(r"""(?<!\w)[.,;:!?"'`()]+|[.,;:!?"'`()]+(?!\w)""")  # never within a word or number: 1.5, 1,000, don't


def normalised(prompt: str) -> str:
    """A prompt without what does not make it another question: case, blanks, and punctuation at the borders of words."""
    return " ".join(_BORDER.sub(" ", prompt).casefold().split())


def search_count(total: int, asked: int | None) -> int:
    """How many items the search may see: a sixth, 500 to 2,000, but never above a third."""
    if asked is not None:
        return min(asked, total - 1)
    return max(1, min(max(total // 6, 500), 2000, total // 3))


def split(items: Sequence[Item], asked: int | None) -> tuple[list[Item], list[Item]]:
    """(SEARCH, CERT). Items come ordered by digest, so this is the same random split for the same items."""
    count = search_count(len(items), asked)
    return list(items[:count]), list(items[count:])


def set_digest(items: Sequence[Item]) -> str:
    """Content address of a set of items, for the ledger of opened CERT sets."""
    return "sha256:" + hashlib.sha256("\n".join(item.digest + item.answer for item in items).encode()).hexdigest()
