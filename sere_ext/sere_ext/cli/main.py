"""The `sere` command. Each part adds its subcommands by the entry-point group `sere.commands`.

A part whose dependencies are not installed is left out with a hint, so that `sere --help` always works. Exit codes are
`sere_ext.contract.errors.ExitCode`; `sere serve` becomes vLLM and ends with vLLM's.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

import typer
from rich.markup import escape

from sere_ext import __version__
from sere_ext.cli.missing import hint, usage_error
from sere_ext.contract.errors import ExitCode, SereError, exit_codes

app = typer.Typer(
    name="sere",
    help=f"SERE expert re-routing for vLLM: calibrate, tune, serve.\n\n{exit_codes(*ExitCode)}",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _version(value: bool) -> None:
    if value:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version.")) -> None:
    """The options of `sere` itself; `main` adds the commands."""


def main() -> None:
    """Entry point of the console script: run a command; an error ends it with one line on stderr and its exit code."""
    missing = []
    for entry in sorted(entry_points(group="sere.commands"), key=lambda e: e.name):
        try:
            entry.load()(app)
        except ModuleNotFoundError as error:
            if (error.name or "sere_").startswith("sere_"):
                raise
            missing.append(str(error.name))
    if missing:
        app.info.epilog = escape(f"Other commands need {hint(missing)}.")
    try:
        try:
            app()
        except ModuleNotFoundError as error:
            raise usage_error(error) from error
    except SereError as error:
        typer.echo(f"sere: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
