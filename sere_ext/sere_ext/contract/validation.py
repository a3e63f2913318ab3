"""What is wrong with a file or an HTTP body, as sentences that say what to do."""

from __future__ import annotations

import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

_NEAR = 0.6  # likeness from 0 to 1 at which one word may be a slip for another; difflib's own choice
# What a value of another type should have been, without how the reader tried to turn it into one.
_PLAIN = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
}


@dataclass(frozen=True)
class Missing:
    """What to give where a field without a description is left out, to complete "is missing; give ..."."""

    wanted: str


def explain(error: ValidationError, model: type[BaseModel], where: str = "") -> str:
    """Pydantic's problems as short sentences with the field's path: `buckets.0.rho: ... (got 7)`.

    Args:
        model: what was read; a mistyped field is compared with its fields.
        where: put before every path: with "spec", `spec.buckets.0.rho: ...`.
    """
    problems = error.errors()
    places = [problem["loc"] for problem in problems]
    parts = []
    for problem in problems:
        place = problem["loc"]
        if problem["type"] == "too_short" and any(len(p) > len(place) and p[: len(place)] == place for p in places):
            continue  # pydantic counts only the good members of a list, and reports a bad member by itself already
        path = ".".join(str(part) for part in ((where,) if where else ()) + place)
        message = _sentence(problem, model)
        parts.append(f"{path}: {message}" if path else message)
    return "; ".join(parts)


def _sentence(problem: Any, model: type[BaseModel]) -> str:
    kind, given = problem["type"], problem.get("input")
    if kind == "extra_forbidden":
        known = sorted(_known(model, problem["loc"]))
        meant = did_you_mean(str(problem["loc"][-1]), known)
        return "unknown field" + (meant or f"; remove it, or use one of {', '.join(known)}" if known else "; remove it")
    if kind == "missing":
        return f"is missing; give {_wanted(_fields(model, problem['loc']))}"
    if kind == "json_invalid":
        return f"cannot be read as JSON ({problem['ctx']['error']}); correct that place"
    shown = f" (got {given!r})" if isinstance(given, int | float | str) else ""
    if kind in ("model_type", "model_attributes_type"):
        fields = ", ".join(sorted(_known(model, (*problem["loc"], ""))))
        return "must be an object" + (f" with fields of {fields}" if fields else "") + shown
    if kind in _PLAIN:
        return f"Input should be {_PLAIN[kind]}{shown}"
    message = problem["msg"].removeprefix("Value error, ")
    message = re.sub(r"<\w+\.\w+: ('[^']*')>", r"\1", message)  # a member of an enumeration, by its value
    message = message.replace("valid tuple", "list").replace("Tuple", "the list").replace(" after validation", "")
    words = re.findall(r"'([^']*)'", problem["ctx"]["expected"]) if kind in ("enum", "literal_error") else []
    return message + shown + did_you_mean(str(given), words)


def _wanted(fields: Sequence[FieldInfo]) -> str:
    """What to give for a field that is missing: by its `Missing`, else its description."""
    marks = [mark.wanted for field in fields for mark in field.metadata if isinstance(mark, Missing)]
    return next(iter([*marks, *(field.description for field in fields if field.description)]), "it")


def did_you_mean(given: str, known: Sequence[str]) -> str:
    """`; did you mean trials?`, or nothing where no known word is near."""
    likeness = {word: SequenceMatcher(None, given.lower(), word.lower()).ratio() for word in known}
    best = max(likeness.values(), default=0.0)
    near = [word for word in known if likeness[word] == best]
    return f"; did you mean {' or '.join(near)}?" if best >= _NEAR else ""


def _known(model: type[BaseModel], place: tuple[str | int, ...]) -> set[str]:
    """The fields of the object around `place`, by their names in JSON."""
    return {field.alias or name for m in _around(model, place) for name, field in m.model_fields.items()}


def _fields(model: type[BaseModel], place: tuple[str | int, ...]) -> list[FieldInfo]:
    """The fields at `place`: one, or one of each of several models that may stand there."""
    return [f for m in _around(model, place) for name, f in m.model_fields.items() if place[-1] in (f.alias, name)]


def _around(model: type[BaseModel], place: tuple[str | int, ...]) -> list[type[BaseModel]]:
    """The models that may stand around `place`."""
    here = [model]
    for part in place[:-1]:
        if isinstance(part, str):
            fields = [f for m in here for name, f in m.model_fields.items() if part in (f.alias, name)]
            here = [inner for field in fields for inner in _models(field.annotation)]
    return here


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _models(inner)
