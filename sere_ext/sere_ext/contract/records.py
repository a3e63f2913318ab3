"""Files of texts and labelled items as people have them: read, or refused with file, line and what to do.

JSON lines, a JSON array, or either in gzip; UTF-8 with or without a byte order mark, UTF-16 with one. A prompt is a text, or a
conversation in the form of OpenAI (`messages`, role and content) or ShareGPT (`conversations`, from and value).
"""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sere_ext.contract.errors import UsageError

Message = dict[str, str]  # {"role", "content"}

PROMPT_COLUMNS: Final = ("prompt", "question", "instruction", "messages", "conversations")
CONVERSATION_COLUMNS: Final = ("messages", "conversations")
ANSWER_COLUMN: Final = "answer"
_ROLES: Final = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
_MARKED_ANSWER: Final = re.compile(r"^#### *(.+?) *$", re.MULTILINE)  # how GSM8K ends a worked answer
_BREAK: Final = re.compile(r"\r\n|\n|\r")  # not those that str.splitlines knows beside them: JSON strings may hold U+2028
_MARKS: Final = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def described() -> str:
    """The forms in which items are read, as a paragraph for the documentation, which a test compares with this."""
    texts = [f"`{name}`" for name in PROMPT_COLUMNS if name not in CONVERSATION_COLUMNS]
    return (
        "A file of items is JSON lines, one JSON array, or either in gzip; UTF-8, or UTF-16 and UTF-32 with a byte order mark. "
        f"The prompt is the first column that is there of {', '.join(texts)}, else the conversation in {' or '.join(f'`{name}`' for name in CONVERSATION_COLUMNS)} "
        "(`role` and `content` as OpenAI has them, or `from` and `value` as ShareGPT has them) up to its last answer. The right "
        f"answer is the column `{ANSWER_COLUMN}`, else that last answer; of an answer that ends in `#### 42`, as GSM8K's do, it is "
        "what stands behind the mark. Other columns are named by `fields: {prompt: ..., answer: ...}` of the task. "
        f"Roles of ShareGPT are read as {', '.join(f'`{theirs}`: {ours}' for theirs, ours in _ROLES.items())}."
    )


@dataclass(frozen=True)
class Row:
    """One object of a file, and where it stands, for messages."""

    path: str
    line: int
    values: dict[str, Any]

    @property
    def place(self) -> str:
        return f"{self.path} line {self.line}"


@dataclass(frozen=True)
class Prompt:
    """What is asked: `text`, and the conversation that it is the last question of, where the file has one."""

    text: str
    messages: tuple[Message, ...] = ()


def read_text(path: str | Path, where: str) -> str:
    """The text of a file.

    Args:
        where: the field or option that names the file, for messages.

    Raises:
        UsageError: there is no such file, it is damaged, or in an encoding that does not say which.
    """
    try:
        data = Path(path).read_bytes()
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"{where}: {path} is damaged ({error}); copy it again") from error
    except OSError as error:
        raise UsageError(f"{where}: cannot read {path}: {error.strerror}; check the path") from error
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), "utf-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        if data.startswith(b"PAR1"):
            advice = "it is a Parquet file; write it as JSON lines"
        elif data.count(b"\0") > len(data) // 4:
            advice = "it looks like UTF-16 without a byte order mark; convert it: iconv -f UTF-16LE -t UTF-8 FILE > NEW"
        else:
            advice = "convert it, if it is Latin-1 (Windows: CP1252) by: iconv -f LATIN1 -t UTF-8 FILE > NEW"
        raise UsageError(f"{where}: {path} line {line} is no UTF-8 text (byte 0x{data[error.start]:02x}); {advice}") from error


def lines_of(text: str) -> list[str]:
    """The lines of a text, ended by LF, CRLF or CR alone."""
    return _BREAK.split(text)


def read_rows(path: str | Path, where: str) -> Iterator[Row]:
    """Every object of a file of JSON lines or of one JSON array; see `read_text` for `where`.

    Raises:
        UsageError: with file and line, for what cannot be read or is no object.
    """
    text = read_text(path, where)
    pairs = _array(text, path, where) if text.lstrip()[:1] == "[" else _json_lines(text, path, where)
    for line, value in pairs:
        row = Row(str(path), line, value)
        if not isinstance(value, dict):
            raise UsageError(f'{where}: {row.place} is no object; write one like {{"prompt": "...", "answer": "..."}}')
        _check_characters(row, where)
        yield row


def _json_lines(text: str, path: str | Path, where: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines_of(text), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise UsageError(
                    f"{where}: {path} line {number} cannot be read as JSON ({error}); write one object per line, or one array"
                ) from error


def _array(text: str, path: str | Path, where: str) -> Iterator[tuple[int, Any]]:
    decoder = json.JSONDecoder()
    at, line, counted = text.index("[") + 1, 1, 0
    while True:
        at = _skip(text, at, " \t\r\n,")
        if at < len(text) and text[at] == "]":
            return
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, at = decoder.raw_decode(text, at)
        except ValueError as error:
            raise UsageError(f"{where}: {path} line {line} cannot be read as JSON ({error}); correct that place") from error
        yield line, value


def _skip(text: str, at: int, blanks: str) -> int:
    while at < len(text) and text[at] in blanks:
        at += 1
    return at


def _check_characters(row: Row, where: str) -> None:
    """Raise UsageError for half of a character, which JSON can spell (`\\ud83d`) and no text can hold."""
    try:
        json.dumps(row.values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise UsageError(
            f"{where}: {row.place} holds half of a character ({half}), as text does that was cut inside an emoji; remove it"
        ) from error


def prompt_of(row: Row, where: str, column: str | None = None, *, first_turn: bool = False) -> Prompt:
    """What a row asks.

    Args:
        column: name of the prompt's column; None: the first of PROMPT_COLUMNS that is there.
        first_turn: of a conversation take the first question alone, as `vllm bench serve` does of ShareGPT; else everything
            before the last answer.

    Raises:
        UsageError: there is no such column, or it holds neither text nor a conversation.
    """
    name = column or next((known for known in PROMPT_COLUMNS if row.values.get(known) is not None), None)
    value = row.values.get(name) if name else None
    if isinstance(value, str):
        if not value.strip():
            raise UsageError(f"{where}: {row.place} has an empty {name}; remove the line")
        return Prompt(value)
    if isinstance(value, list):
        messages = _conversation(value, row, where)
        ends = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if ends:
            messages = messages[: ends[0] if first_turn else ends[-1]]
        if not messages or messages[-1]["role"] != "user":
            raise UsageError(f"{where}: {row.place} asks nothing: its {name} have no user's message before the answer")
        return Prompt(messages[-1]["content"], tuple(messages))
    if value is not None:
        raise UsageError(f"{where}: {row.place}: {name} must be a text or a list of messages")
    columns = ", ".join(sorted(row.values)) or "none"
    raise UsageError(
        f'{where}: {row.place} needs a "{column or "prompt"}" (its columns: {columns}); name yours, as in '
        "fields: {prompt: question, answer: answer}"
    )


def answer_of(row: Row, where: str, column: str | None = None) -> str:
    """The right answer of a row: the column's text or number, else the last answer of its conversation.

    Of an answer that ends in a line `#### 42`, as GSM8K's do, it is what stands behind the mark.

    Raises:
        UsageError: there is none, or it is neither text nor number.
    """
    value = row.values.get(column or ANSWER_COLUMN)
    if value is None and column is None:
        for name in CONVERSATION_COLUMNS:
            if isinstance(row.values.get(name), list):
                messages = _conversation(row.values[name], row, where)
                value = next((m["content"] for m in reversed(messages) if m["role"] == "assistant"), None)
    if value is None:
        columns = ", ".join(sorted(row.values)) or "none"
        raise UsageError(
            f'{where}: {row.place} needs an "{column or ANSWER_COLUMN}" (its columns: {columns}); name yours, as in '
            "fields: {answer: solution}, or remove the line"
        )
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UsageError(f"{where}: {row.place}: the answer must be one text or number, not {json.dumps(value)[:40]}")
    marked = _MARKED_ANSWER.findall(str(value))
    return marked[-1] if marked else str(value)


def conversation_of(row: Row, where: str) -> tuple[Message, ...]:
    """The whole conversation of a row, answers included; () where it has none."""
    value: list[Any] = next((row.values[name] for name in CONVERSATION_COLUMNS if isinstance(row.values.get(name), list)), [])
    return tuple(_conversation(value, row, where))


def _conversation(value: list[Any], row: Row, where: str) -> list[Message]:
    found = []
    for message in value:
        if not isinstance(message, dict):
            raise UsageError(f"{where}: {row.place}: a message must be an object with role and content")
        role, content = message.get("role") or message.get("from"), message.get("content", message.get("value"))
        if isinstance(content, list):  # parts, of which only texts can be asked here
            texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
            content = "".join(map(str, texts)) if len(texts) == len(content) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise UsageError(f"{where}: {row.place}: a message needs a role and a text as content")
        found.append({"role": _ROLES.get(role, role), "content": content})
    return found
