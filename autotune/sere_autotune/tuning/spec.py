"""tuning.yaml as a model: what to tune, under which limits, with which budgets.

Most of it is shared with the SereTuningJob (`sere_ext.contract.tuning`); added here is what the file alone has: paths, the
folder for results, and a few options of the command line. `file.py` reads it, `options.py` makes a flag of every leaf.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, Self

from pydantic import Field, field_validator, model_validator

from sere_ext.contract.constraints import Constrained, at_most_one
from sere_ext.contract.errors import UsageError
from sere_ext.contract.record import Record, Unset
from sere_ext.contract.slo import LatencySlo
from sere_ext.contract.tuning import (
    MAX_TASKS,
    ONE_SOURCE,
    AccuracyLimits,
    BucketEdges,
    CertifySpec,
    EngineOptions,
    LoadSpec,
    Scoring,
    SearchBudget,
    SearchDetails,
    WorkloadShape,
    buckets_fit,
)
from sere_ext.contract.validation import Missing

__all__ = [
    "BucketEdges",
    "LoadSpec",
    "SearchSpec",
    "Served",
    "TaskSpec",
    "TuningSpec",
    "WorkloadSpec",
    "engine_options",
    "flag_value",
]


class CalibrateSpec(Record):
    """How to make the similarity artefact before the search."""

    data: Annotated[str, Field(description="file of calibration prompts"), Unset("the search items with their answers")]


class WorkloadSpec(WorkloadShape):
    """The timed traffic. Without dataset or synthetic it is the accuracy items themselves."""

    constraints: ClassVar = (ONE_SOURCE,)

    dataset: Annotated[
        str | None,
        Field(description="file of prompts, ShareGPT or messages, mixed into the labelled traffic"),
        Unset("the accuracy items alone"),
    ] = None


class SloSpec(LatencySlo):
    """Limits on the latencies of requests and on how many may fail."""

    max_failure_share: Annotated[float, Field(ge=0, le=1, description="share of requests that may fail")] = 0.0


class TaskSpec(Scoring):
    """A file of labelled items, and how their answers are judged."""

    file: Annotated[str, Field(description="JSON lines, a JSON array, or either in gzip, of prompts and answers")]


class AccuracySpec(AccuracyLimits):
    """How much accuracy may be lost, and on what it is measured."""

    tasks: Annotated[
        tuple[TaskSpec, ...],
        Field(
            min_length=1,
            max_length=MAX_TASKS,
            description="files of prompts and answers, each a name or {file, metric, pattern, maxTokens, stop, fields}",
        ),
    ]

    @field_validator("tasks", mode="before")
    @classmethod
    def _file_is_a_task(cls, value: Any) -> Any:
        many = value if isinstance(value, list | tuple) else [value]
        return [{"file": task} if isinstance(task, str) else task for task in many]


class SearchSpec(SearchDetails, SearchBudget):
    """What is searched and what may be spent on it."""

    @field_validator("policies", "min_share", "s_values", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | int | float) else value


class TuningSpec(Constrained):
    """tuning.yaml, whole."""

    constraints: ClassVar = (at_most_one("similarity", "calibrate"),)

    model: Annotated[str, Field(min_length=1, description="model name or folder")]
    revision: Annotated[str, Field(description="model revision"), Unset("the newest")] = ""
    engine: EngineOptions = EngineOptions()
    similarity: Annotated[
        str | None, Field(description="file of `sere calibrate`"), Unset("made where a kind needs it, from calibrate.data")
    ] = None
    calibrate: CalibrateSpec | None = None
    workload: WorkloadSpec = WorkloadSpec()
    slo: Annotated[SloSpec, Missing("a latency limit, such as {tpotMs: {p95: 50}} (--slo-tpot-ms-p95 50)")]
    accuracy: Annotated[AccuracySpec, Missing("labelled items, such as {tasks: [items.jsonl]} (--accuracy-tasks items.jsonl)")]
    search: SearchSpec = SearchSpec()
    certify: CertifySpec = CertifySpec()
    out: Annotated[str, Field(min_length=1, description="folder for the study, profile and report")] = "runs/sere"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if problem := buckets_fit(self.workload.load, self.search):
            raise ValueError(problem)
        return self

    @property
    def trust_remote_code(self) -> bool:
        """Whether code that comes with the model may be run: `--trust-remote-code` in engine.extraArgs."""
        return "--trust-remote-code" in {argument.replace("_", "-") for argument in self.engine.extra_args}

    def input_files(self) -> list[tuple[str, str]]:
        """(field, path) of every file that the tuning reads."""
        found = [(f"accuracy.tasks.{i}.file", task.file) for i, task in enumerate(self.accuracy.tasks)]
        if self.similarity:
            found.append(("similarity", self.similarity))
        if self.calibrate:
            found.append(("calibrate.data", self.calibrate.data))
        if self.workload.dataset:
            found.append(("workload.dataset", self.workload.dataset))
        return found

    def check_files(self) -> None:
        """Raise UsageError naming the first input file that cannot be read."""
        for field, path in self.input_files():
            if not Path(path).is_file():
                raise UsageError(f"{field}: no file at {path}; check the path (it is taken from the folder you are in)")


def flag_value(arguments: Sequence[str], flag: str) -> str | None:
    """The value of a flag among arguments of `vllm serve`, written `--flag value` or `--flag=value`; None: not there."""
    found = None
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.replace("_", "-") == flag:
            found = value if equals else arguments[index + 1] if index + 1 < len(arguments) else ""
    return found


class Served(Protocol):
    """What starts an engine: a tuning file, or as much of one as `sere doctor` needs."""

    @property
    def model(self) -> str: ...
    @property
    def revision(self) -> str: ...
    @property
    def engine(self) -> EngineOptions: ...
    @property
    def out(self) -> str: ...  # folder of the engine's log


def engine_options(spec: Served) -> list[str]:
    """What `vllm serve MODEL` would be given."""
    found = ["--tensor-parallel-size", str(spec.engine.tensor_parallel_size)] if spec.engine.tensor_parallel_size > 1 else []
    if spec.revision:
        found += ["--revision", spec.revision]
    if spec.engine.max_model_len:
        found += ["--max-model-len", str(spec.engine.max_model_len)]
    return [*found, *spec.engine.extra_args]
