"""Subcommands of `sere` that this part adds: `calibrate` now; `serve`, `status` and `apply` beside it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command("calibrate")(calibrate_command)


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
