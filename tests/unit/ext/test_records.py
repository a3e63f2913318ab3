"""Files of items and texts as they come from other tools: read, or refused with file, line and what to do."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from sere_ext.contract.errors import UsageError
from sere_ext.contract.records import Row, answer_of, conversation_of, prompt_of, read_rows

GOOD = [{"prompt": "été?", "answer": 1}, {"prompt": "b\u2028c\u0085d", "answer": "x"}]
LINES = "\n".join(json.dumps(one, ensure_ascii=False) for one in GOOD)


def write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "items.jsonl"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    "data",
    [
        LINES.encode(),
        LINES.encode("utf-8-sig"),
        LINES.encode("utf-16"),
        LINES.replace("\n", "\r\n\r\n").encode(),
        LINES.replace("\n", "\r").encode(),
        gzip.compress(LINES.encode()),
        json.dumps(GOOD, indent=2).encode(),
        ("\n [" + LINES.replace("\n", ",\n") + "]\n").encode(),
    ],
    ids=["utf-8", "byte order mark", "utf-16", "crlf and blank lines", "cr", "gzip", "array", "array of lines"],
)
def test_the_same_rows_in_any_dress(tmp_path: Path, data: bytes) -> None:
    assert [row.values for row in read_rows(write(tmp_path, data), "tasks")] == GOOD


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (LINES.encode("latin-1", "replace"), "line 1 is no UTF-8 text (byte 0xe9); convert it, if it is Latin-1"),
        (b'{"prompt": "a"}\n' + '{"prompt": "été"}'.encode("latin-1"), "line 2 is no UTF-8 text"),
        (LINES.encode("utf-16-le")[2:] + "é€".encode("utf-16-be"), "it looks like UTF-16 without a byte order mark"),
        (b"PAR1\x15\x04\xff\xfe", "it is a Parquet file; write it as JSON lines"),
        (gzip.compress(LINES.encode())[:-9], "is damaged"),
        (b'{"prompt": "a"}\n{"prompt": "cut \\ud83d"}', r"line 2 holds half of a character (\ud83d)"),
        (b'{"prompt": "a"}\n{"prompt": }', "line 2 cannot be read as JSON"),
        (b'[{"prompt": "a"},\n\n {"prompt": ]', "line 3 cannot be read as JSON"),
        (b'[{"prompt": "a"},\n', "line 2 cannot be read as JSON"),
        (b'{"prompt": "a"}\n"b"', "line 2 is no object; write one like"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_line(tmp_path: Path, data: bytes, told: str) -> None:
    with pytest.raises(UsageError) as refused:
        [*read_rows(write(tmp_path, data), "accuracy.tasks.0.file")]
    assert str(refused.value).startswith("accuracy.tasks.0.file: ") and told in str(refused.value)
    assert refused.value.exit_code == 2 and "\n" not in str(refused.value)


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^data: cannot read .*none: No such file or directory; check the path$"):
        [*read_rows(tmp_path / "none", "data")]


def row(**values: Any) -> Row:
    return Row("f", 7, values)


CHAT = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "r"}]}, {"role": "assistant", "content": "b"}]  # fmt: skip
SHARE = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]


def test_prompts_of_every_shape() -> None:
    assert prompt_of(row(prompt="p"), "w").text == "p"
    assert prompt_of(row(question="q", answer="1"), "w").text == "q"
    assert prompt_of(row(x="q", prompt=None), "w", "x").text == "q"
    last = prompt_of(row(messages=CHAT), "w")
    assert (last.text, len(last.messages)) == ("r", 4)
    first = prompt_of(row(messages=CHAT), "w", first_turn=True)
    assert (first.text, len(first.messages)) == ("q", 2)
    assert prompt_of(row(conversations=SHARE), "w").messages == ({"role": "user", "content": "q"},)
    assert [m["role"] for m in conversation_of(row(conversations=SHARE), "w")] == ["user", "assistant"]


def test_answers_of_every_shape() -> None:
    assert answer_of(row(answer="Half of 84.\n#### 42"), "w") == "42"
    assert answer_of(row(answer=42), "w") == "42"
    assert answer_of(row(label="x"), "w", "label") == "x"
    assert answer_of(row(messages=CHAT), "w") == "b"
    assert answer_of(row(messages=CHAT, answer="c"), "w") == "c"


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"prompt": "  "}, "f line 7 has an empty prompt; remove the line"),
        ({"prompt": 3}, "prompt must be a text or a list of messages"),
        ({"Frage": "x"}, 'needs a "prompt" (its columns: Frage); name yours, as in fields: {prompt: question, answer: answer}'),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "asks nothing"),
        ({"messages": ["q"]}, "a message must be an object"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "needs a role and a text"),
    ],
)
def test_what_asks_nothing_is_named(values: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as refused:
        prompt_of(row(**values), "w")
    assert told in str(refused.value)


@pytest.mark.parametrize("answer", [["a", "b"], True, {"a": 1}, None])
def test_an_answer_that_no_text_can_equal_is_refused(answer: Any) -> None:
    with pytest.raises(UsageError, match="f line 7"):
        answer_of(row(answer=answer), "w")
