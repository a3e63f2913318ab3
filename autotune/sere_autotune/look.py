"""`sere doctor`, and the engine's part of a dry run: a ceiling for what tuning could gain, in one sentence."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from sere_autotune.doctor.finding import NOTHING, Finding
from sere_autotune.doctor.measure import SECONDS, Work, examine
from sere_autotune.outcome import MIN_SPEEDUP
from sere_autotune.trial.load import Request
from sere_autotune.trial.traffic import dataset_requests, synthetic_requests
from sere_autotune.tuning.file import load_spec
from sere_autotune.tuning.spec import Served, WorkloadSpec
from sere_ext.contract.errors import ExitCode, UsageError, exit_codes
from sere_ext.contract.tuning import EngineOptions
from sere_ext.contract.validation import explain

HELP = f"""Tell in about a minute what tuning could gain here at most, before hours are spent on it.

Starts the engine, times decode steps while each token keeps all, some and one of its experts, and ends in one sentence. It measures no accuracy.

{exit_codes(ExitCode.DONE, ExitCode.FAILED, ExitCode.BAD_INPUT, ExitCode.INFEASIBLE, ExitCode.STOPPED)}
It ends with 0 too where it cannot tell."""

_PLAIN_TOKENS = 32  # of a prompt where nothing is known of the workload
# Prompts where nobody gives any: random tokens would be routed unlike text.
_TEXTS = (
    "The ferry leaves at seven in the morning and reaches the island before noon, unless the wind turns to the north.",
    "Write a function that returns the longest word of a sentence, and explain how it treats words of the same length.",
    "In 1869 the two halves of the railway met in the desert, and a telegraph sent the news to both coasts at once.",
    "A train covers 240 kilometres in three hours. How long does it take for the next 400 if it slows down by a tenth?",
    "My grandmother kept bees behind the house, and every August we carried the heavy frames into the cool kitchen.",
    "Compare a binary heap with a sorted list when items arrive one by one and only the smallest is ever taken out.",
    "The cell membrane lets water pass freely, while ions need channels that open and close under the cell's control.",
    "Please translate this letter into French, keep its friendly tone, and leave the names of the streets as they are.",
    "Prices rose faster than wages for the third year, so that families bought less meat and repaired their shoes.",
    "Three friends share a bill of 87 euros so that the eldest pays twice as much as each of the others. What does each pay?",
    "Rain fell on the harbour all night, and by dawn the nets on the quay were grey and heavy as sleeping animals.",
    "List the steps for replacing the chain of a bicycle, and say which of them need a special tool.",
)
_PROMPTS = 256

WithEngine = Annotated[
    bool,
    typer.Option("--with-engine", help="With --dry-run: also start the engine for about a minute, as `sere doctor` does."),
]


@dataclass(frozen=True)
class Engine:
    """What `sere doctor` starts: as much of a tuning file as an engine needs (`Served`)."""

    model: str
    revision: str
    engine: EngineOptions
    out: str  # of the engine's log

    @classmethod
    def of(cls, spec: Served, out: str) -> Engine:
        return cls(spec.model, spec.revision, spec.engine, out)


def doctor_command(
    context: typer.Context,
    model: Annotated[str | None, typer.Argument(help="Model name or folder.", show_default="that of --file")] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="tuning.yaml, whose model, engine and workload are taken.", show_default="flags alone"),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="File of prompts: items, ShareGPT or messages.", show_default="plain English")
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option("--prompt-tokens", min=1, help="Length of prompts, with --answer-tokens.", show_default="32")
    ] = None,
    answer_tokens: Annotated[
        int | None,
        typer.Option(
            "--answer-tokens",
            min=2,
            help="Length of answers; with --data the longest.",
            show_default="unknown: prompts' share is left out",
        ),
    ] = None,
    concurrency: Annotated[str, typer.Option("--concurrency", help='Requests at once, one number or more: "[4, 16]".')] = "16",
    revision: Annotated[str, typer.Option("--revision", help="Model revision.", show_default="the newest")] = "",
    tensor_parallel_size: Annotated[int, typer.Option("--tensor-parallel-size", min=1, help="Devices that share the model.")] = 1,
    max_model_len: Annotated[
        int | None, typer.Option("--max-model-len", min=8, help="Longest prompt and answer, tokens.", show_default="the model's")
    ] = None,
    extra_args: Annotated[
        str, typer.Option("--engine-extra-args", help="Further arguments of `vllm serve`, a list in YAML.")
    ] = "[]",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
    seconds: Annotated[float, typer.Option("--seconds", min=1, help="Time for measuring, the engine's start apart.")] = SECONDS,
    as_json: Annotated[bool, typer.Option("--json", help="Print all figures as JSON on standard output.")] = False,
) -> None:
    from sere_autotune.prepare import prepare, read_config
    from sere_autotune.trial.traffic import Traffic

    if (model is None) == (file is None):
        raise UsageError("name a model, or a tuning file with -f, and not both")
    if file is not None:
        _refuse_beside_a_file(context)
        prepared = prepare(load_spec(file, {}))
        work = prepared.work(Traffic(prepared.spec.workload, prepared.items))
    else:
        assert model is not None
        arguments = [*_list("--engine-extra-args", extra_args), *(["--trust-remote-code"] if trust_remote_code else [])]
        options = {"tensorParallelSize": tensor_parallel_size, "maxModelLen": max_model_len, "extraArgs": arguments}
        engine = Engine(model, revision, _valid(EngineOptions, {k: v for k, v in options.items() if v is not None}), "")
        workload = _workload(data, prompt_tokens, answer_tokens, _list("--concurrency", concurrency))
        config = read_config(engine)
        work = Work(engine, workload, _requests(workload), data is not None, config)
    finding = look(work, seconds)
    sys.stdout.write((json.dumps(finding.to_dict(), indent=2) if as_json else finding.sentence) + "\n")
    if finding.verdict == NOTHING:
        raise typer.Exit(ExitCode.INFEASIBLE)


def _refuse_beside_a_file(context: typer.Context) -> None:
    """Raise UsageError for an option that the tuning file has a field for."""
    for option in context.command.params:
        source = context.get_parameter_source(option.name or "")
        if source is not None and source.name == "COMMANDLINE" and option.name not in ("file", "seconds", "as_json"):
            raise UsageError(f"{option.opts[0]} stands in the tuning file; leave it out with -f, or change it there")


def look(work: Work, seconds: float = SECONDS) -> Finding:
    """Start the engine, find the ceiling, stop the engine. Its log lies in a temporary folder, which stays where it failed.

    Raises:
        SereError: the engine does not start, with the sentence of why.
    """
    from sere_autotune.progress import Progress
    from sere_autotune.trial import warm

    console = Console(stderr=True, highlight=False)
    folder = tempfile.mkdtemp(prefix="sere-doctor-")
    engine = warm.WarmEngine(Engine.of(work.spec, folder), None)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a plain kill stops the engine as Ctrl-C does
    try:
        with Progress(console, f"the ceiling of {work.spec.model}") as progress:
            progress.stage("starting the engine", 1)
            facts = engine.start()
            progress.stage("timing decode steps", 1)
            finding = examine(engine, facts, work, MIN_SPEEDUP, seconds, lambda text: progress.step(text, 0.0))
    finally:
        engine.stop()
        warm.shut_ray()
        signal.signal(signal.SIGTERM, before)
    shutil.rmtree(folder, ignore_errors=True)
    return finding


def _workload(data: Path | None, prompt_tokens: int | None, answer_tokens: int | None, levels: list[Any]) -> WorkloadSpec:
    given: dict[str, Any] = {"load": {"concurrency": levels}}
    if data is not None:
        if prompt_tokens is not None:
            raise UsageError("--prompt-tokens is for made-up prompts; leave it out with --data")
        given |= {"dataset": str(data), **({"datasetMaxTokens": answer_tokens} if answer_tokens else {})}
    elif (prompt_tokens is None) != (answer_tokens is None):
        raise UsageError("give both --prompt-tokens and --answer-tokens, or neither")
    elif prompt_tokens is not None:
        given |= {"synthetic": {"inputTokens": prompt_tokens, "outputTokens": answer_tokens}}
    return _valid(WorkloadSpec, given)


def _requests(workload: WorkloadSpec) -> list[Request]:
    """Prompts of the file, of the wanted length, or of plain English."""
    if workload.dataset is not None:
        return dataset_requests(workload)
    if workload.synthetic is not None:
        return synthetic_requests(workload, _TEXTS)
    count = len(_TEXTS)
    texts = [" ".join(_TEXTS[(i * (1 + i // count) + j) % count] for j in range(3)) for i in range(_PROMPTS)]
    return [Request(f"{i}. {text}", 2, ignore_eos=True, cut_tokens=_PLAIN_TOKENS) for i, text in enumerate(texts)]


def _list(flag: str, text: str) -> list[Any]:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f'{flag}: {text} is no list in YAML, such as "[a, b]"') from error
    return value if isinstance(value, list) else [value]


def _valid(kind: type[Any], values: dict[str, Any]) -> Any:
    from pydantic import ValidationError

    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise UsageError(explain(error, kind)) from error
