"""One rule of right and wrong for answers to labelled prompts."""

from __future__ import annotations

import pytest

from sere_ext.contract.answers import AnswerMetric, right
from sere_ext.contract.errors import ProfileError
from sere_ext.contract.profile import Profile

from .test_profile import manifest


@pytest.mark.parametrize(
    ("metric", "pattern", "text", "answer", "expected"),
    [
        ("exact", None, " 42\n", "42", True),
        ("exact", None, "421", "42", False),
        ("exact", None, "", "42", False),
        ("contains", None, " The capital of France is Paris.", "Paris", True),
        ("contains", None, " paris", "Paris", False),
        ("numeric", None, "so it is 1,042", "1042", True),
        ("numeric", None, "41 or 42 or 43", "42", False),
        ("numeric", None, "none", "42", False),
        ("numeric", None, "none", "none", False),
        ("regex", r"is (\w+)", "It is Paris.", "Paris", True),
        ("regex", r"\d+", "about 42 of them", "42", True),
        ("regex", r"is (\w+)", "Paris", "Paris", False),
        ("regex", r"x(y)?", "x", "y", False),
    ],
)
def test_right(metric: AnswerMetric, pattern: str | None, text: str, answer: str, expected: bool) -> None:
    assert right(metric, pattern, text, answer) is expected


def test_what_follows_a_stop_string_does_not_count() -> None:
    assert right("exact", None, "42\nQ: next", "42", ("\n", "Q:"))
    assert not right("contains", None, "no\n\nParis", "Paris", ("\n\n",))
    assert not right("exact", None, "42\nQ: next", "42")


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ({"metric": "regex"}, "metric regex needs pattern"),
        ({"pattern": "a"}, "pattern is for metric regex only"),
        ({"metric": "regex", "pattern": "("}, "no regular expression"),
    ],
)
def test_a_prompt_that_cannot_be_judged_is_refused(prompt: dict[str, str], says: str) -> None:
    body = manifest()
    body["spec"] = {**body["spec"], "goldenPrompts": [{"prompt": "q", "answer": "a", **prompt}]}  # type: ignore[dict-item]
    with pytest.raises(ProfileError, match=says):
        Profile.parse(body)
