"""The tree of errors is whole, says who meets each error, and its exit codes and HTTP statuses hold both ways."""

from __future__ import annotations

import ast
import subprocess

import pytest

from sere_ext.contract import errors
from sere_ext.contract.errors import ExitCode, SereError, UsageError, error_of, status_of
from tests.kit import ROOT

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SereError)]
# A mistake in our own types, met while the CRDs are made; an engine that died, which the tuner replaces and never shows; a fit that
# `sere doctor` tells as a sentence of its report.
NOBODYS = {"SchemaError", "EngineGoneError", "CannotTellError"}


def test_every_error_of_the_three_packages_is_in_the_tree() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "sere_ext", "autotune", "operator"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    classes = [
        node.name
        for file in listed
        if file.endswith(".py")
        for node in ast.walk(ast.parse((ROOT / file).read_text()))
        if isinstance(node, ast.ClassDef) and node.name.endswith("Error") and not node.name.startswith("_")
    ]
    assert sorted(classes) == sorted({kind.__name__ for kind in KINDS} | NOBODYS)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_says_who_sees_it_and_who_catches_it(kind: type[SereError]) -> None:
    assert kind.__name__ in (errors.__doc__ or ""), "the tree in the module's docstring"
    assert "Seen by: " in (kind.__doc__ or "")
    assert "Caught by: " in (kind.__doc__ or "")
    assert isinstance(kind.exit_code, ExitCode)
    assert (kind.exit_code is ExitCode.BAD_INPUT) == issubclass(kind, UsageError)


@pytest.mark.parametrize("kind", [kind for kind, _ in errors._STATUS], ids=lambda kind: kind.__name__)
def test_a_refusal_keeps_its_class_over_http(kind: type[SereError]) -> None:
    found = error_of(status_of(kind("why")), kind.__name__, "why")
    assert (type(found), str(found)) == (kind, "why")


def test_a_refusal_without_a_known_name_is_told_by_its_status() -> None:
    assert type(error_of(409, "", "x")) is errors.ConflictError
    assert type(error_of(422, "LaterError", "x")) is errors.PolicyError
    assert type(error_of(500, "", "x")) is SereError
    assert status_of(SereError("x")) == 500
