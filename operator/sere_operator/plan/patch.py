"""JSON merge patches (RFC 7386) of a status, and what differs between two. Pure."""

from __future__ import annotations

from typing import Any

Object = dict[str, Any]


def without_none(value: Any) -> Any:
    """`value` without the keys, at any depth, whose value is None. Tuples become lists."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list | tuple) else value


def merge_patch(wanted: Object, live: Object) -> Object | None:
    """The merge patch that turns `live` into `wanted`; None where the two are equal."""
    patch: Object = {}
    for key in {*wanted, *live}:
        new, old = wanted.get(key), live.get(key)
        if new == old:
            continue
        if isinstance(new, dict) and isinstance(old, dict):
            patch[key] = merge_patch(new, old) or {}
        else:
            patch[key] = new
    return patch or None


def merged(live: Object, patch: Object) -> Object:
    """`live` after a JSON merge patch (RFC 7386)."""
    result = dict(live)
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = merged(result[key], value)
        else:
            result[key] = value
    return result


def only_messages(before: Object, after: Object) -> bool:
    """Whether two statuses are the same but for what is written under a key `message`, at any depth."""
    return bool(_without_messages(before) == _without_messages(after))


def _without_messages(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_messages(item) for key, item in value.items() if key != "message"}
    return [_without_messages(item) for item in value] if isinstance(value, list | tuple) else value
