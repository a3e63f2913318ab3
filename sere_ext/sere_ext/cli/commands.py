"""The subcommands of `sere` that this package adds: calibrate, similarity, serve, status and apply."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Annotated, cast, get_args

import typer

from sere_ext.contract.errors import UsageError
from sere_ext.contract.similarity import Metric


def register(app: typer.Typer) -> None:
    from sere_ext.cli.similarity import similarity_app

    app.command("calibrate")(calibrate_command)
    app.add_typer(similarity_app, name="similarity")
    passed_on = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command("serve", context_settings=passed_on)(serve_command)
    app.command("status")(status_command)
    app.command("apply")(apply_command)


def calibrate_command(
    model: Annotated[str, typer.Argument(help="Model directory or hub name.")],
    data: Annotated[Path, typer.Option(help="JSONL with text, prompt and answer, or messages; or plain lines.")],
    out: Annotated[Path, typer.Option(help="The similarity file to write (.safetensors).")],
    revision: Annotated[str | None, typer.Option(help="Model revision.", show_default="the newest")] = None,
    metric: Annotated[str, typer.Option(help="frobenius, cosine or cka (linear; small models only).")] = "frobenius",
    sequences: Annotated[int, typer.Option(min=1, help="Texts to use.")] = 400,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of each text.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Texts at a time.")] = 8,
    layers: Annotated[
        str | None, typer.Option(help="A part of the model's layers, e.g. 0-11; added to what --out holds.", show_default="all")
    ] = None,
    device: Annotated[str, typer.Option(help="A torch device, e.g. cpu, cuda or cuda:1.")] = "cpu",
    memory_gib: Annotated[float, typer.Option(min=0.001, help="Memory that running sums may take, GiB.")] = 8.0,
    report: Annotated[Path | None, typer.Option(help="Also write heat maps of the layers (.html).", show_default="none")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metadata as JSON.")] = False,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code of the model's.")] = False,
) -> None:
    """Measure how alike a model's experts are; kinds `sere` and `hybrid` go by the file, and `tune` makes it if none is given.

    Started again after it was stopped, it goes on where it was.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from sere_ext.calibration.run import Options, calibrate
    from sere_ext.cli.similarity import print_similarity, write_report
    from sere_ext.similarity.file import read_similarity

    options = Options(
        metric=parse_metric(metric), sequences=sequences, max_length=max_length, batch=batch, layers=parse_layers(layers),
        device=device, memory_gib=memory_gib,
    )  # fmt: skip
    for path in (out, report):  # before hours are spent
        if path is not None and not path.parent.is_dir():
            raise UsageError(f"cannot write {path}: there is no folder {path.parent}; make it")
    console = Console(stderr=True)
    columns = (TextColumn("calibrating"), BarColumn(), MofNCompleteColumn(), TextColumn("texts"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("calibrating", total=None)
        meta = calibrate(
            model, data, out, options, revision=revision, trust_remote_code=trust_remote_code,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
            note=lambda sentence: console.print(sentence, highlight=False, soft_wrap=True),
        )  # fmt: skip
    similarity = read_similarity(out)
    if report is not None:
        write_report(report, similarity)
    if as_json:
        json.dump(meta.to_json_dict(), sys.stdout)
        print()
        return
    print_similarity(out, similarity, err=True)


def parse_metric(text: str) -> Metric:
    """Raises UsageError for anything but a metric's name."""
    for known in get_args(Metric):
        if text == known:
            return cast(Metric, known)
    raise UsageError(f"--metric {text} is not known; give one of {', '.join(get_args(Metric))}")


def parse_layers(text: str | None) -> tuple[int, int] | None:
    """`3-7` -> (3, 7), `3` -> (3, 3). Raises UsageError for anything else."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
    if first > last:
        raise UsageError(f"--layers {text}: give the first and the last layer, such as 0-11, or one number")
    return first, last


def serve_command(context: typer.Context) -> None:
    """`vllm serve` with live control on; every argument is vLLM's own."""
    from sere_ext.cli.serve import run

    raise typer.Exit(run(context.args))


def status_command(
    url: Annotated[str, typer.Argument(help="The engine, e.g. http://127.0.0.1:8000.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole state as JSON.")] = False,
) -> None:
    """What an engine routes by, read from every rank."""
    from sere_ext.control.client import get_state, render_state

    state = get_state(url)
    typer.echo(json.dumps(state.to_json_dict()) if as_json else render_state(state))


def apply_command(
    url: Annotated[str, typer.Argument(help="The engine, e.g. http://127.0.0.1:8000.")],
    policy: Annotated[str, typer.Argument(help="A policy or SereProfile file, or `exact`.")],
    similarity: Annotated[
        str | None, typer.Option(help="Similarity file, as the API server sees it.", show_default="the one it has")
    ] = None,
    clean: Annotated[bool, typer.Option(help="Drain and drop the prefix cache first, for measuring.")] = False,
) -> None:
    """Change a running engine's policy; the token is taken from SERE_CONTROL_TOKEN."""
    from sere_ext.contract.policy import EXACT_POLICY
    from sere_ext.contract.profile import read_policy_file
    from sere_ext.control.client import put_policy, render_state

    wanted = EXACT_POLICY if policy == "exact" else read_policy_file(policy)
    typer.echo(render_state(put_policy(url, wanted, similarity=similarity, clean=clean)))
