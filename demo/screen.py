"""Where the demo's programs say what they do: standard error, with lines left whole where nobody's screen has to hold them."""

from __future__ import annotations

import sys

from rich.console import Console

console = Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())
