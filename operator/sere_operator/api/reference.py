"""docs/resources.md, generated from the models: `python -m sere_operator.api.reference [FILE]`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sere_operator.api import meta
from sere_operator.api.conditions import ConditionType, Documented, Reason
from sere_operator.api.crdgen import DEFINITIONS, Definition

INTRODUCTION = f"""# The resources

`{meta.API_VERSION}`. Generated from the models by `python -m sere_operator.api.reference`; `kubectl explain sere.spec`
says the same. Samples are in `manifests/samples/`. A field in **bold** must be given where
the object around it is. Units stand in names (`ttftMs` is in
milliseconds, `maxDropPoints` in points, that is percent of items). Defaults are applied by the operator, not stored.
What is wrong is refused by the API server at `kubectl apply`, whether the operator runs or not.
"""

ANNOTATIONS = (
    (meta.OVERRIDE_ANNOTATION, "SereDeployment, pods", "`exact`: the kill switch; set by `kubectl sere exact NAME`"),
    (meta.ROLLBACK_ANNOTATION, "SereDeployment", "digest of a policy to give up; set by `kubectl sere rollback NAME`"),
    (
        meta.APPROVED_ANNOTATION,
        "SereDeployment",
        "digest of a policy to promote where approval is Manual; `kubectl sere approve NAME`",
    ),
    (
        meta.RETUNE_ANNOTATION,
        "SereDeployment",
        "name of the SereTuningJob to run once more, with its whole budget; for another time add `/` and anything new",
    ),
    (meta.POLICY_ANNOTATION, "pods", "digest of the policy that this pod runs; absent: the stable one. Set by the operator"),
    (meta.REFRESH_ANNOTATION, "pods", "a nonce; a change makes the kubelet refresh the policy volume at once"),
    (meta.CONFIG_HASH_ANNOTATION, "children", "of what the operator last applied"),
)


def reference() -> str:
    """The whole page."""
    described: set[str] = set()  # parts of a spec that stand under a resource before
    parts = [INTRODUCTION, *(_resource(definition, described) for definition in DEFINITIONS)]
    parts += [_documented("Conditions", ConditionType), _documented("Reasons", Reason)]
    rows = (f"| `{name}` | {where} | {text} |" for name, where, text in ANNOTATIONS)
    parts.append("\n".join(["## Annotations", "", "| annotation | on | meaning |", "| --- | --- | --- |", *rows, ""]))
    return "\n".join(parts)


def _resource(definition: Definition, described: set[str]) -> str:
    version = definition.to_dict()["spec"]["versions"][0]
    properties = version["schema"]["openAPIV3Schema"]["properties"]
    lines = [f"## {definition.kind}", "", f"{definition.description} Short name `{definition.short_name}`.", ""]
    for part in (part for part in ("spec", "status") if part in properties):
        lines += [f"### {part}", "", "| field | type | meaning |", "| --- | --- | --- |"]
        lines += [*_rows(properties[part], "", described), ""]
        if part == "spec":
            described |= set(properties[part]["properties"])
    return "\n".join(lines)


def _rows(schema: dict[str, Any], prefix: str, described: set[str]) -> Iterator[str]:
    """`described` names top-level fields whose inner ones are not repeated."""
    required = schema.get("required", [])
    for name, field in schema.get("properties", {}).items():
        path = f"{prefix}{name}"
        shown = f"**`{path}`**" if name in required else f"`{path}`"
        known = not prefix and name in described and "properties" in field.get("items", field)
        meaning = _escaped(field.get("description", "")).rstrip(".") + (". As above." if known else "")
        yield f"| {shown} | {_type(field)} | {meaning} |"
        if not known:
            yield from _rows(field.get("items", field), f"{path}[]." if "items" in field else f"{path}.", set())


def _type(field: dict[str, Any]) -> str:
    if "enum" in field:
        return " or ".join(f"`{value}`" for value in field["enum"])
    if "anyOf" in field:
        return "quantity"
    match field.get("type"):
        case "array":
            return f"list of at most {field['maxItems']}"
        case "object" if isinstance(values := field.get("additionalProperties"), dict):
            return f"map to {_type(values)}"
        case "integer" | "number" if "minimum" in field and "maximum" in field:
            return f"{field['type']}, {_number(field['minimum'])} to {_number(field['maximum'])}"
        case other:
            return str(other)


def _number(value: float) -> str:
    return f"{int(value):,}" if float(value).is_integer() else f"{value:g}"


def _documented(title: str, members: type[Documented]) -> str:
    rows = (f"| `{member.value}` | {_escaped(member.doc)} |" for member in members)
    return "\n".join([f"## {title}", "", "| name | meaning |", "| --- | --- |", *rows, ""])


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/resources.md")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(reference())
