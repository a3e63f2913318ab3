"""Pydantic model -> structural OpenAPI v3 schema, as a CustomResourceDefinition takes it.

Pydantic writes JSON Schema; an API server wants less: no `$ref`, no `anyOf` with null, no `additionalProperties: false`
beside `properties`, no `const`, no `uniqueItems`, and `exclusiveMinimum` as a boolean beside `minimum`. What cannot be carried over
faithfully raises here rather than being dropped. Descriptions name the defaults, which the operator applies,
not by the server: a stored default would outlive the release that chose it, and GitOps tools would see a difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from sere_operator.api.rules import Rule

_KEPT = (
    "type", "format", "enum", "pattern", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems",
    "maxProperties", "x-kubernetes-int-or-string", "x-kubernetes-preserve-unknown-fields",
    "x-kubernetes-list-type", "x-kubernetes-list-map-keys",
)  # fmt: skip
_REFUSED = ("uniqueItems", "multipleOf", "oneOf", "not", "patternProperties")


class SchemaError(TypeError):
    """A model uses something that no structural schema can say. The message holds the path."""


def structural_schema(model: type[BaseModel], rules: Mapping[str, tuple[Rule, ...]]) -> dict[str, Any]:
    """The schema of one model with everything inlined.

    Args:
        rules: CEL rules, by model name for objects and by `Model.outsideName` for a field.

    Raises:
        SchemaError: for a list without maxItems (the server's cost estimate refuses CEL below it) or an unsayable construct.
    """
    whole = model.model_json_schema(by_alias=True, ref_template="{model}")
    return _Converter(whole.pop("$defs", {}), rules).convert(whole, model.__name__)


class _Converter:
    def __init__(self, defs: dict[str, Any], rules: Mapping[str, tuple[Rule, ...]]) -> None:
        self._defs = defs
        self._rules = rules

    def convert(self, schema: dict[str, Any], path: str) -> dict[str, Any]:
        """The structural form of one schema. `path` is its place, for error messages."""
        beside = {key: value for key, value in schema.items() if key not in ("$ref", "anyOf", "allOf")}
        target = self._without_null(schema, path)
        if "$ref" in target:
            # What stands beside a $ref (a description, a bound) is about this use, so it wins.
            target = {**self._defs[target["$ref"]], **{k: v for k, v in {**target, **beside}.items() if k != "$ref"}, **beside}
        elif target is not schema:
            target = {**target, **beside}
        return self._plain(target, path)

    def _without_null(self, schema: dict[str, Any], path: str) -> dict[str, Any]:
        options = schema.get("anyOf")
        if options is None or schema.get("x-kubernetes-int-or-string"):
            return schema
        some = [option for option in options if option.get("type") != "null"]
        if len(some) != 1:
            raise SchemaError(f"{path}: a union of {len(some)} types; a structural schema takes one")
        return dict(some[0])

    def _plain(self, schema: dict[str, Any], path: str) -> dict[str, Any]:
        for word in _REFUSED:
            if word in schema:
                raise SchemaError(f"{path}: {word} has no structural form; use ge/le, or a CEL rule")
        result = {key: schema[key] for key in _KEPT if key in schema}
        for name in ("minimum", "maximum"):
            if (bound := schema.get("exclusive" + name.capitalize())) is not None:
                result |= {name: bound, "exclusive" + name.capitalize(): True}
        if description := _description(schema):
            result["description"] = description
        if "const" in schema:
            result["enum"] = [schema["const"]]
        if schema.get("x-kubernetes-int-or-string"):
            result.pop("type", None)
            result["anyOf"] = [{"type": "integer"}, {"type": "string"}]
            return result
        match schema.get("type"):
            case "object":
                self._object(schema, result, path)
            case "array":
                self._array(schema, result, path)
            case "integer":
                result["format"] = "int64"
            case "number":
                _number(result)
            case "string" | "boolean":
                pass
            case other:
                raise SchemaError(f"{path}: type {other!r} has no structural form")
        return result

    def _object(self, schema: dict[str, Any], result: dict[str, Any], path: str) -> None:
        name = schema.get("title", "")
        if properties := schema.get("properties"):
            result["properties"] = {}
            for field, sub in properties.items():
                converted = self.convert(sub, f"{path}.{field}")
                _add_rules(converted, self._rules.get(f"{name}.{field}", ()))
                result["properties"][field] = converted
            if required := schema.get("required"):
                result["required"] = required
            _add_rules(result, self._rules.get(name, ()))
        elif isinstance(values := schema.get("additionalProperties"), dict):
            result["additionalProperties"] = self.convert(values, f"{path}[]")
        elif not schema.get("x-kubernetes-preserve-unknown-fields"):
            raise SchemaError(f"{path}: an object of unknown form; name its fields or allow unknown ones explicitly")

    def _array(self, schema: dict[str, Any], result: dict[str, Any], path: str) -> None:
        if "maxItems" not in schema:
            raise SchemaError(f"{path}: a list needs max_length, or the server refuses the CRD for the cost of its rules")
        if "items" not in schema:
            raise SchemaError(f"{path}: a list of one type only")
        result["items"] = self.convert(schema["items"], f"{path}[]")


def _number(result: dict[str, Any]) -> None:
    """Add rules for fractional bounds.

    The server cuts a bound to a whole number where the value is written as one (on 1.34 a value of 0 passes a minimum of 0.001).
    """
    for name, sign, words in (("minimum", ">", "above"), ("maximum", "<", "below")):
        bound, open_end = result.get(name), result.get("exclusive" + name.capitalize(), False)
        if isinstance(bound, float) and not bound.is_integer():
            text = f"must be {words} {bound}" if open_end else f"must be {'at least' if sign == '>' else 'at most'} {bound}"
            _add_rules(result, (Rule(f"self {sign}{'' if open_end else '='} {bound}", text),))


def _add_rules(schema: dict[str, Any], rules: tuple[Rule, ...]) -> None:
    if rules:
        schema["x-kubernetes-validations"] = [*schema.get("x-kubernetes-validations", []), *(rule.to_dict() for rule in rules)]


def _description(schema: dict[str, Any]) -> str:
    """Description with the default named, where it is a plain value and the text does not name it already."""
    text = " ".join(str(schema.get("description", "")).split())
    default = schema.get("x-unset") or schema.get("default")
    if isinstance(default, list) and all(isinstance(one, str | int | float) for one in default):
        default = ", ".join(f"{one:g}" if isinstance(one, float) else str(one) for one in default)
    if "Default:" in text or not isinstance(default, str | int | float | bool) or default == "":
        return text
    shown = str(default).lower() if isinstance(default, bool) else str(default)
    return f"{text.rstrip('.')}. Default: {shown}." if text else f"Default: {shown}."
