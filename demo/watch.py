"""What a person sees while the tuner works: its own lines, and below them one live line with the experts that a step touches."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from sere_autotune.progress import AT_WORK

_SAID = 50  # characters of the last line that the live line repeats
BAR = 32  # characters that stand for all experts of a layer
LEGEND = "█ active with the policy, ░ active under exact routing alone, · not active"


def pairs(value: Any) -> Iterator[tuple[float, float]]:
    """Every (active experts as the router chose, as the policy let them be used) in a decoded JSON value, in order."""
    if isinstance(value, dict):
        before, after = value.get("active_before"), value.get("active_after")
        if before is not None and after is not None:
            yield float(before), float(after)
        for inner in value.values():
            yield from pairs(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from pairs(inner)


def active_experts(journal: str) -> tuple[float, float] | None:
    """The last measurement in a study's journal that a policy changed: mean experts per layer and step, before and after.

    Args:
        journal: JSON values, one a line; a last line that is still being written is left out.
    """
    for line in reversed(journal.splitlines()):
        try:
            found = [pair for pair in pairs(json.loads(line)) if pair[1] < pair[0]]
        except json.JSONDecodeError:
            continue
        if found:
            return found[-1]
    return None


class Watch:
    """Prints what a process says and keeps the live line under it, with what its bar's parts are.

    Without a terminal the line is printed as soon as there is one and then at the end of each stage, where it has changed. A stage
    ends where the process prints a line that is not indented.

    Args:
        journal: of the study, read again at most once a second.
        experts: of one layer.
        minutes: that the whole is expected to take.
    """

    def __init__(self, console: Console, journal: Path, experts: int, minutes: float) -> None:
        self.console, self.journal, self.experts, self.minutes = console, journal, experts, minutes
        self.began = time.monotonic()
        self._read_at, self._printed = 0.0, ""
        self._said, self._said_at = "", self.began  # the process's last line
        self._found: tuple[float, float] | None = None

    def line(self, *, now: bool = False) -> str:
        """Active experts as figures and a bar; empty before a policy was measured.

        Args:
            now: read the journal also where it was read less than a second ago.
        """
        if now or time.monotonic() - self._read_at > 1:
            self._read_at = time.monotonic()
            self._found = active_experts(self.journal.read_text()) if self.journal.exists() else None
        if self._found is None:
            return ""
        before, after = self._found
        full, kept = (round(BAR * part / self.experts) for part in (before, after))
        bar = "█" * kept + "░" * (full - kept) + "·" * (BAR - full)
        return f"active experts per layer and step of {self.experts}: {before:.1f} exact -> {after:.1f} with the policy  {bar}"

    def follow(self, process: subprocess.Popen[str]) -> int:
        """Forward the lines of ``process`` until it ends; its exit status."""
        assert process.stdout is not None
        live = Live(get_renderable=self._clock, console=self.console, refresh_per_second=2, transient=True)
        with live if self.console.is_terminal else nullcontext():
            for text in process.stdout:
                if self.console.is_terminal and text.strip().startswith(AT_WORK):
                    continue  # the live line counts the seconds
                self._said, self._said_at = text.strip() or self._said, time.monotonic()
                if not text[0].isspace() or not text.strip():
                    self._show(now=True)
                self.console.print(text.rstrip("\n"), markup=False, highlight=False, soft_wrap=True)
                if not self._printed:
                    self._show()
            self._show(now=True)
        return process.wait()

    def _show(self, *, now: bool = False) -> None:
        """Print the line where there is no terminal and it says something new."""
        if self.console.is_terminal or (line := self.line(now=now)) in ("", self._printed):
            return
        if not self._printed:
            self.console.print(LEGEND, markup=False, soft_wrap=True)
        self._printed = line
        self.console.print(line, markup=False, soft_wrap=True)

    def _clock(self) -> Text:
        gone = (time.monotonic() - self.began) / 60
        left = f"about {self.minutes - gone:.0f} to go" if gone < self.minutes else "longer than expected"
        line = self.line()
        said = self._said if len(self._said) <= _SAID else f"{self._said[: _SAID - 3]}..."
        since = f"; {time.monotonic() - self._said_at:.0f} s since: {said}" if said else ""
        return Text("\n".join(filter(None, (line, LEGEND if line else "", f"{gone:.1f} minutes gone, {left}{since}"))))
