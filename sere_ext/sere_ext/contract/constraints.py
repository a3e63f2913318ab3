"""Rules across the fields of a record, each written once for both who check it: pydantic, and an API server (CEL).

A model lists its rules in `constraints`. Reading a value checks them; the operator's CustomResourceDefinitions carry their
CEL form, so that the API server refuses at `kubectl apply` what a command would refuse later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from pydantic import model_validator

from sere_ext.contract.record import Record, outside_name


@dataclass(frozen=True)
class Constraint:
    """One rule.

    Attributes:
        cel: a CEL expression over `self`, the object as the API server has it, that is true where the rule holds. Written
            for Kubernetes 1.30: no two-variable comprehensions, and every list that it walks has a maximum length.
        message: one sentence that says what to do. The API server shows it where `expression` is empty.
        problem: the same rule for a record that was read: a message, or None where the rule holds.
        expression: a CEL expression that makes the message, such as one that names the wrong value.
        field: the field that the API server's error names, by its outside name; empty: the whole object.
    """

    cel: str
    message: str
    problem: Callable[[Any], str | None]
    expression: str = ""
    field: str = ""


class Constrained(Record):
    """A record whose class lists rules across its fields; a subclass keeps its parents' rules."""

    constraints: ClassVar[tuple[Constraint, ...]] = ()

    @classmethod
    def all_constraints(cls) -> tuple[Constraint, ...]:
        """The rules of the class and of every class that it inherits from, each once."""
        found = [rule for parent in cls.__mro__ for rule in parent.__dict__.get("constraints", ())]
        return tuple(dict.fromkeys(found))

    @model_validator(mode="after")
    def _constraints_hold(self) -> Self:
        for rule in self.all_constraints():
            if problem := rule.problem(self):
                raise ValueError(problem)
        return self


def rule(cel: str, message: str, holds: Callable[[Any], bool], *, field: str = "") -> Constraint:
    """A rule with one fixed message. `holds` says whether it holds for a record."""
    return Constraint(cel, message, lambda record: None if holds(record) else message, field=field)


def exactly_one(first: str, second: str) -> Constraint:
    """Of two optional fields, given by their Python names, exactly one is set."""
    return rule(
        f"has(self.{outside_name(first)}) != has(self.{outside_name(second)})",
        f"give exactly one of {outside_name(first)} and {outside_name(second)}",
        lambda record: (getattr(record, first) is None) != (getattr(record, second) is None),
    )


def at_most_one(first: str, second: str, why: str = "") -> Constraint:
    """Of two optional fields at most one is set. `why` is added to the message."""
    return rule(
        f"!(has(self.{outside_name(first)}) && has(self.{outside_name(second)}))",
        f"give {outside_name(first)} or {outside_name(second)}, not both{why}",
        lambda record: getattr(record, first) is None or getattr(record, second) is None,
    )


def at_least_one(*fields: str) -> Constraint:
    """Of several optional fields at least one is set."""
    names = [outside_name(field) for field in fields]
    return rule(
        " || ".join(f"has(self.{name})" for name in names),
        f"give at least one of {', '.join(names[:-1])} and {names[-1]}",
        lambda record: any(getattr(record, field) is not None for field in fields),
    )
