"""Labelled items: reading, judging an answer, and the one split into SEARCH and CERT."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sere_ext.contract.errors import UsageError

from sere_autotune.tuning.spec import AccuracySpec, TaskSpec

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Item:
    """One distinct labelled prompt. `digest` is of the prompt alone: the unit of the split and of every count."""

    digest: str
    prompt: str
    answer: str
    task: TaskSpec

    def correct(self, text: str) -> bool:
        """Whether an answer is right under the task's metric."""
        metric, wanted = self.task.metric, self.answer.strip()
        if metric == "exact":
            return text.strip() == wanted
        if metric == "contains":
            return wanted in text
        if metric == "numeric":
            return _last_number(text) is not None and _last_number(text) == _last_number(wanted)
        found = re.search(self.task.pattern or "", text)
        return found is not None and (found.group(1) if found.groups() else found.group(0)).strip() == wanted


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def read_jsonl(path: str | Path, field: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line. Raises UsageError naming the field and the line."""
    try:
        with Path(path).open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise UsageError(
                        f"{field}: {path} line {number} cannot be read as JSON ({error}); write one object per line"
                    ) from error
                if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
                    raise UsageError(f'{field}: {path} line {number} needs a "prompt" string')
                yield number, record
    except OSError as error:
        raise UsageError(f"{field}: cannot read {path}: {error.strerror}; check the path") from error


def load_items(accuracy: AccuracySpec) -> list[Item]:
    """All tasks' items in the order of their digests, which is the order of a fixed shuffle; repeated prompts once.

    Raises:
        UsageError: a file is missing, a line cannot be read or lacks prompt or answer, or no item is there.
    """
    found: dict[str, Item] = {}
    for index, task in enumerate(accuracy.tasks):
        field = f"accuracy.tasks.{index}.file"
        for number, record in read_jsonl(task.file, field):
            if record.get("answer") is None:
                raise UsageError(f'{field}: {task.file} line {number} needs an "answer"')
            digest = hashlib.sha256(record["prompt"].encode()).hexdigest()[:16]
            found.setdefault(digest, Item(digest, record["prompt"], str(record["answer"]), task))
    if not found:
        raise UsageError(f"accuracy.tasks: no items in {', '.join(task.file for task in accuracy.tasks)}")
    return [found[digest] for digest in sorted(found)]


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
