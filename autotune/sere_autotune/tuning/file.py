"""tuning.yaml: reading it, laying flags over it, and writing it out with every default."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sere_autotune.tuning.spec import TuningSpec
from sere_ext.contract.errors import UsageError
from sere_ext.contract.validation import explain

_NEVER_FOLDED = 1_000_000  # characters of a line; pyyaml breaks longer ones at a blank


def load_spec(path: str | Path | None, overrides: dict[tuple[str, ...], Any] | None = None) -> TuningSpec:
    """Read a tuning file and lay the flags over it.

    Args:
        path: tuning.yaml, or None where everything is given by flags.
        overrides: values by path in the file, e.g. {("search", "trials"): 12}.

    Raises:
        UsageError: the file is missing or cannot be read as YAML, or one sentence per wrong field.
    """
    raw = {} if path is None else read_mapping(path)
    for keys, value in (overrides or {}).items():
        _put(raw, keys, value)
    try:
        return TuningSpec.model_validate(raw)
    except ValidationError as error:
        given = f"{path} and flags" if path and overrides else path or "flags alone, without -f tuning.yaml"
        raise UsageError(f"{given}: {explain(error, TuningSpec)}") from error


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The content of a tuning file, none of its fields checked.

    Raises:
        UsageError: the file is missing, or is no mapping in YAML.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"cannot read the tuning file {path}: {getattr(error, 'strerror', 'it is no text')}; README.md has one to begin with"
        ) from error
    except yaml.YAMLError as error:
        raise UsageError(f"{path} cannot be read as YAML ({yaml_problem(error)}); correct that place") from error
    if not isinstance(raw, dict):
        raise UsageError(f"{path} must be a mapping with `model`, `slo` and `accuracy`")
    return raw


def yaml_problem(error: yaml.YAMLError) -> str:
    """A YAML error on one line, where pyyaml's own text has five: `line 3, column 5: mapping values are not allowed here`."""
    mark, what = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error).splitlines()[0]
    return f"line {mark.line + 1}, column {mark.column + 1}: {what}" if mark else str(what)


# A flag of one of these fields removes what the file says of the fields after it, which exclude it, instead of clashing.
_RIVALS: dict[tuple[str, ...], list[tuple[str, ...]]] = {
    ("similarity",): [("calibrate",)],
    ("calibrate", "data"): [("similarity",)],
    ("workload", "load", "concurrency"): [("workload", "load", "requestsPerSecond"), ("workload", "load", "arrivals")],
    ("workload", "load", "requestsPerSecond"): [("workload", "load", "concurrency")],
}


def _put(raw: dict[str, Any], keys: tuple[str, ...], value: Any) -> None:
    for rival in _RIVALS.get(keys, []):
        place: Any = raw
        for key in rival[:-1]:
            place = place.get(key) or {}
        place.pop(rival[-1], None)
    place = raw
    for key in keys[:-1]:
        if not isinstance(place.get(key), dict):
            place[key] = {}
        place = place[key]
    place[keys[-1]] = value


def to_yaml(spec: TuningSpec) -> str:
    """The file with every default filled in, as `--dry-run --yaml` prints it, each value on one line."""
    return yaml.safe_dump(spec.model_dump(mode="json", by_alias=True, exclude_none=True), sort_keys=False, width=_NEVER_FOLDED)
