"""`sere operator ...`, added to the `sere` command where the operator's dependencies are installed."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import typer


def register(app: typer.Typer) -> None:
    """Entry point of the group `sere.commands`.

    Raises:
        ModuleNotFoundError: kopf or kubernetes is not installed; `sere --help` then names the extra. They are looked
            for, not imported: that would cost every `sere` command over a second.
    """
    for needed in ("kopf", "kubernetes"):
        if find_spec(needed) is None:
            raise ModuleNotFoundError(f"No module named {needed!r}", name=needed)

    operator = typer.Typer(help="The Kubernetes operator.", no_args_is_help=True)

    @operator.command("run")
    def run() -> None:
        """Run the operator until a signal ends it. Settings are environment variables; the chart sets them."""
        import_module("sere_operator.runtime.main").main()

    @operator.command("crds")
    def crds() -> None:
        """Print the CustomResourceDefinitions, for `kubectl apply --server-side -f -`."""
        from sere_operator.api.crdgen import DEFINITIONS, render

        typer.echo("---\n".join(render(definition) for definition in DEFINITIONS), nl=False)

    app.add_typer(operator, name="operator")
