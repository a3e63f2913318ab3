"""The `sere` command. Each part adds its subcommands by the entry-point group `sere.commands`.

A part whose dependencies are not installed is left out with a hint, so that `sere --help` always works.
Exit codes: 0 done, 1 failed, 2 bad input (nothing was started), 3 nothing feasible, 4 a budget ran out,
5 the items cannot certify the limit.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points

import typer

from sere_ext import __version__
from sere_ext.contract.errors import SereError

app = typer.Typer(
    name="sere",
    help="SERE expert re-routing for vLLM: calibrate, tune, serve.",
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
    """SERE expert re-routing for vLLM: calibrate, tune, serve."""


def main() -> None:
    """Entry point of the console script."""
    for entry in sorted(entry_points(group="sere.commands"), key=lambda e: e.name):
        try:
            entry.load()(app)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("sere_"):
                raise
            app.info.epilog = f"Some commands need `pip install 'sere[{entry.name}]'` ({error.name} is missing)."
    try:
        app()
    except SereError as error:
        typer.echo(f"sere: {error}", err=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
