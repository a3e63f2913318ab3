"""Where the demo's programs say what they do: standard error, with lines left whole where nobody's screen has to hold them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.text import Text

console = Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say what is waited for: on a terminal below the other lines with the seconds so far, elsewhere in one line at the beginning."""
    began = time.monotonic()

    def line() -> Text:
        return Text(f"waiting for {what}: {time.monotonic() - began:.0f} s", style="dim")

    if not console.is_terminal:
        console.print(f"waiting for {what}", markup=False)
        yield
        return
    with Live(get_renderable=line, console=console, refresh_per_second=2, transient=True):
        yield
