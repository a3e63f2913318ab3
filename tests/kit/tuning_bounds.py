"""Every bound of what a tuning run is told, taken from the models: values at it and beyond it, as cases for whoever checks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from sere_operator.api.tuning import SereTuningJobSpec
from tests.kit import ROOT

SAMPLE = ROOT / "manifests" / "samples" / "tuned.yaml"
PARTS = ("engine", "slo", "accuracy", "tuning")  # of a SereTuningJob's spec, that end up in tuning.yaml
Place = tuple[str | int, ...]


@dataclass(frozen=True)
class Case:
    """One value of one field of a SereTuningJob's spec."""

    place: Place
    value: Any
    fits: bool

    def __str__(self) -> str:
        return f"{'.'.join(map(str, self.place))} {'fits' if self.fits else 'refuses'} {str(self.value)[:40]}"

    def spec(self) -> dict[str, Any]:
        """The tuned sample's spec as a SereTuningJob's, with the value in its place."""
        whole = base_spec()
        if self.place[-1] == "concurrency" or "concurrency" in self.place:
            whole["tuning"]["workload"]["load"] = {"concurrency": [1]}
        here: Any = whole
        for part, following in zip(self.place, self.place[1:], strict=False):
            if isinstance(here, dict) and part not in here:
                here[part] = [] if isinstance(following, int) else {}
            if isinstance(here, list) and not here:
                here.append({"minTokens": 1} if "buckets" in self.place else None)
            here = here[part]
        last = self.place[-1]
        if isinstance(here, list) and not here:
            here.append(self.value)
        here[last] = self.value
        return whole


def base_spec() -> dict[str, Any]:
    """The tuned sample as a SereTuningJob's spec."""
    spec = yaml.safe_load(SAMPLE.read_text())["spec"]
    return {key: copy.deepcopy(spec[key]) for key in ("model", *PARTS)}


def tuning_yaml(job: dict[str, Any]) -> dict[str, Any]:
    """What tuning.yaml says with the same values, without any model in between."""
    tuning, accuracy = job["tuning"], job["accuracy"]
    tasks = accuracy.get("tasks", [])
    files = [{"file": "items.jsonl", **{k: v for k, v in task.items() if k not in ("uri", "configMap")}} for task in tasks]
    search = {key: tuning[key] for key in ("trials", "deviceHours", "rungs", "policies") if key in tuning}
    return {
        "model": "m",
        "engine": {key: value for key, value in job["engine"].items() if key not in ("image", "env", "shutdown")},
        "slo": job["slo"],
        "accuracy": {**accuracy, "tasks": files},
        "workload": tuning["workload"],
        "search": {**tuning.get("search", {}), **search},
        "certify": tuning.get("certify", {}),
    }


def cases() -> Iterator[Case]:
    """Two cases for each bound of a number, a list's length or a choice of words: the last value that fits, the next that does not."""
    schema = SereTuningJobSpec.model_json_schema(by_alias=True)
    for part in PARTS:
        yield from _cases(schema["properties"][part], schema["$defs"], (part,))


_NOT_SHARED = {
    "image",
    "env",
    "resources",
    "volumes",
    "storage",
    "similarity",
    "uri",
    "configMap",
    "dataset",
    "podTemplate",
    "shutdown",
}


def _cases(schema: dict[str, Any], defs: dict[str, Any], place: Place) -> Iterator[Case]:
    options = [one for one in schema.get("anyOf", [schema]) if one.get("type") != "null"]
    schema = options[0]
    if "$ref" in schema:
        schema = defs[schema["$ref"].rsplit("/", 1)[1]]
    if schema.get("type") == "object":
        for name, inner in schema["properties"].items():
            if name not in _NOT_SHARED:
                yield from _cases(inner, defs, (*place, name))
    elif schema.get("type") in ("integer", "number"):
        step = 1 if schema["type"] == "integer" else 1e-3
        for name, sign in (("inimum", -1), ("aximum", 1)):
            inclusive, exclusive = schema.get("m" + name), schema.get("exclusiveM" + name)
            if inclusive is not None:
                yield from (Case(place, inclusive, True), Case(place, inclusive + sign * step, False))
            elif exclusive is not None:
                yield from (Case(place, exclusive - sign * step, True), Case(place, exclusive, False))
    elif "enum" in schema or "const" in schema:
        yield Case(place, "none-of-these", False)
    elif schema.get("type") == "array":
        if schema.get("minItems"):
            yield Case(place, [], False)
        yield from _cases(schema["items"], defs, (*place, 0))


def flags() -> Iterator[Case]:
    """Flags that are set otherwise, in every form that vLLM's parser takes, and some that only look like one."""
    place = ("engine", "extraArgs")
    from sere_ext.contract.engine_flags import OWNED_FLAGS

    for flag in OWNED_FLAGS:
        least = "--x" if flag.startswith("--") else "-x"
        for form in (flag, f"{flag}=1", flag.replace("-", "_").replace("__", "--", 1), flag[: max(len(least), len(flag) - 1)]):
            if form.startswith("-"):
                yield Case(place, [form], False)
    for form in ("--additional-config.sere.policy", "--no-disable-log-stats", "--port 1", "--dtype float32", "--a=$(HF_TOKEN)"):
        yield Case(place, [form], False)
    for form in (
        "--model-impl=vllm",
        "--port-offset",
        "--enforce-eager",
        '--compilation-config={"a": 1}',
        "-pp=2",
        "-cc.mode=3",
        "x",
    ):
        yield Case(place, [form], True)
