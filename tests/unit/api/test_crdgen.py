"""The committed CRDs are what the models say, and the converter refuses what a structural schema cannot say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field

from sere_operator.api.crdgen import DEFINITIONS, Definition, render
from sere_operator.api.reference import reference
from sere_operator.api.rules import RULES
from sere_operator.api.schema import SchemaError, structural_schema
from tests.kit import ROOT

CRDS = ROOT / "manifests" / "crd"


@pytest.mark.parametrize("definition", DEFINITIONS, ids=lambda d: d.kind)
def test_committed_crd_is_current(definition: Definition) -> None:
    committed = (CRDS / definition.file_name).read_text()
    assert committed == render(definition), "run `python -m sere_operator.api.crdgen`"


def test_committed_reference_is_current() -> None:
    page = ROOT / "docs" / "resources.md"
    assert page.read_text() == reference(), "run `python -m sere_operator.api.reference`"


def test_no_crd_is_committed_that_is_not_generated() -> None:
    assert {path.name for path in CRDS.glob("sere*.yaml")} == {definition.file_name for definition in DEFINITIONS}


def schemas(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
        for value in schema.values():
            yield from schemas(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from schemas(value)


def test_every_rule_is_used() -> None:
    used = {
        validation["rule"]
        for definition in DEFINITIONS
        for schema in schemas(definition.to_dict())
        for validation in schema.get("x-kubernetes-validations", [])
    }
    unused = {name for name, rules in RULES.items() for rule in rules if rule.rule not in used}
    assert not unused, "rules of models or fields that no CRD holds"


def undescribed(schema: dict[str, Any], path: str) -> Iterator[str]:
    for name, sub in (schema.get("properties") or {}).items():
        if not sub.get("description"):
            yield f"{path}.{name}"
        yield from undescribed(sub, f"{path}.{name}")
    if "items" in schema:
        yield from undescribed(schema["items"], f"{path}[]")


@pytest.mark.parametrize("definition", DEFINITIONS, ids=lambda d: d.kind)
def test_kubectl_explain_has_a_word_on_every_field(definition: Definition) -> None:
    whole = definition.to_dict()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
    assert [field for part in ("spec", "status") for field in undescribed(whole.get(part, {}), part)] == []


class Inner(BaseModel):
    """An inner thing."""

    kind: Literal["only"]


class Outer(BaseModel):
    maybe: Annotated[Inner | None, Field(description="this use of it")] = None
    count: Annotated[int, Field(ge=1, le=3)] = 2
    names: Annotated[tuple[str, ...], Field(max_length=4)] = ()
    by_name: dict[str, float] | None = None
    share: Annotated[float, Field(gt=0.5, lt=1)] = 0.95


def test_references_are_inlined_nulls_flattened_and_constants_become_enums() -> None:
    assert structural_schema(Outer, {}) == {
        "type": "object",
        "properties": {
            "maybe": {
                "type": "object",
                "description": "this use of it",
                "properties": {"kind": {"type": "string", "enum": ["only"]}},
                "required": ["kind"],
            },
            "count": {"type": "integer", "format": "int64", "minimum": 1, "maximum": 3, "description": "Default: 2."},
            "names": {"type": "array", "maxItems": 4, "items": {"type": "string"}},
            "by_name": {"type": "object", "additionalProperties": {"type": "number"}},
            "share": {
                "type": "number",
                "minimum": 0.5,
                "exclusiveMinimum": True,
                "maximum": 1,
                "exclusiveMaximum": True,
                "description": "Default: 0.95.",
                "x-kubernetes-validations": [{"rule": "self > 0.5", "message": "must be above 0.5"}],
            },
        },
    }


class Union(BaseModel):
    field: int | list[int]


class Unbounded(BaseModel):
    field: list[int]


class Unique(BaseModel):
    field: Annotated[set[int], Field(max_length=3)]


class Unknown(BaseModel):
    field: dict[str, Any]


@pytest.mark.parametrize(
    ("model", "told"),
    [
        (Union, "union of 2"),
        (Unbounded, "max_length"),
        (Unique, "uniqueItems"),
        (Unknown, "unknown form"),
    ],
)
def test_what_a_structural_schema_cannot_say_is_refused_with_its_path(model: type[BaseModel], told: str) -> None:
    with pytest.raises(SchemaError, match=f"{model.__name__}.field: .*{told}"):
        structural_schema(model, {})
