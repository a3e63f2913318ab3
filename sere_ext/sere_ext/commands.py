"""Subcommands of `sere` that this part adds: calibrate, serve, status, apply."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command("calibrate")(calibrate_command)
    passed_on = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command("serve", context_settings=passed_on)(serve_command)
    app.command("status")(status_command)
    app.command("apply")(apply_command)


def calibrate_command(
    model: Annotated[str, typer.Argument(help="Model directory or hub name.")],
    data: Annotated[Path, typer.Option(help="JSONL with text, or prompt and answer; or plain lines.")],
    out: Annotated[Path, typer.Option(help="The similarity file to write (.safetensors).")],
    revision: Annotated[str | None, typer.Option(help="Model revision.")] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Texts to use.")] = 400,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens of each text.")] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="Print the metadata as JSON.")] = False,
) -> None:
    """Measure how alike a model's experts are; `serve` and `tune` need the file for SERE."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from sere_ext.artifact import read_similarity
    from sere_ext.calibrate import calibrate, describe

    console = Console(stderr=True)
    columns = (TextColumn("calibrating"), BarColumn(), MofNCompleteColumn(), TextColumn("texts"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("calibrating", total=None)
        meta = calibrate(
            model, data, out, revision=revision, sequences=sequences, max_length=max_length,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    if as_json:
        json.dump(meta.to_json_dict(), sys.stdout)
        print()
        return
    console.print(describe(meta, read_similarity(out).matrices.values()), highlight=False)
    console.print(
        f"{out}: {len(meta.layers)} layers, {meta.num_experts} experts, {meta.tokens} tokens, {meta.digest}", highlight=False
    )


def serve_command(context: typer.Context) -> None:
    """`vllm serve` with live control on; every argument is vLLM's own."""
    from sere_ext.serve import run

    raise typer.Exit(run(context.args))


def status_command(
    url: Annotated[str, typer.Argument(help="The engine, e.g. http://127.0.0.1:8000.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole state as JSON.")] = False,
) -> None:
    """What an engine routes by, read from every rank."""
    from sere_ext.client import get_state, render_state

    state = get_state(url)
    typer.echo(json.dumps(state) if as_json else render_state(state))


def apply_command(
    url: Annotated[str, typer.Argument(help="The engine, e.g. http://127.0.0.1:8000.")],
    policy: Annotated[str, typer.Argument(help="A policy or SereProfile file, or `exact`.")],
    similarity: Annotated[str | None, typer.Option(help="Similarity file, as the engine's workers see it.")] = None,
    clean: Annotated[bool, typer.Option(help="Drain and drop the prefix cache first, for measuring.")] = False,
) -> None:
    """Change a running engine's policy; the token is taken from SERE_CONTROL_TOKEN."""
    from sere_ext.client import put_policy, render_state
    from sere_ext.policy import EXACT_POLICY
    from sere_ext.settings import read_policy_file

    wanted = EXACT_POLICY if policy == "exact" else read_policy_file(policy)
    typer.echo(render_state(put_policy(url, wanted, similarity=similarity, clean=clean)))
