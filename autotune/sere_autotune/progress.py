"""What a person sees while a run goes on: on a terminal a live table on stderr with the time left, in a log plain lines.

Between two lines of a run there may be a minute: an engine starts, or a block of load is measured. The live table counts those
seconds in its last line; a log gets a line that says what runs and for how long."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sere_autotune.words import about, over_limits

_ROWS = 14
_QUIET_S = 10.0  # without a line in a log, after which one says that the run goes on
_APART_S = 60.0  # between two such lines at least
AT_WORK = "at work for"  # how such a line begins


class Progress:
    """Draws stages and trials; hands a plain form of the same to `publish` (the result ConfigMap).

    Args:
        clock: seconds that only grow.
    """

    def __init__(
        self,
        console: Console,
        title: str,
        publish: Callable[[dict[str, Any]], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console, self.title, self._publish, self._clock = console, title, publish, clock
        self.rows: list[dict[str, Any]] = []
        self.now, self.left_s, self.name = "", 0.0, ""
        self.done = 0  # trials of before a restart, until they are drawn again
        self.began = self._since = clock()  # of the run, and of what it does now
        self._ends: float | None = None  # when the run is expected to end; None where nobody knows
        self._printed, self._beaten = self.began, self.began - _APART_S  # when a log got its last line, and the last of `beat`
        self._live: Live | None = None
        self._over = threading.Event()

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self._live = Live(get_renderable=self._draw, console=self.console, refresh_per_second=2, transient=True)
            self._live.start()
        else:
            self._over.clear()
            threading.Thread(target=self._watch, name="progress", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def stage(self, name: str, total: int, done: int = 0) -> None:
        self.name, self.done, self.now, self._since = name, max(done, self.done), "", self._clock()
        self._print(name + (f" ({done} of {total} done before)" if done else ""))
        self._tell()

    def trial(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self._print(self._row_text(row))
        self._tell()

    def step(self, text: str, left_s: float) -> None:
        self.now, self.left_s, self._since = text, left_s, self._clock()
        self._ends = self._since + left_s if left_s > 0 else None
        self._print(f"  {text}{self._left()}")
        self._tell()

    def beat(self) -> None:
        """Print to a log what runs and for how long, where it got no line for a while and no such line for longer."""
        now = self._clock()
        if self._live is not None or now - self._printed < _QUIET_S or now - self._beaten < _APART_S:
            return
        self._beaten = now
        what = self.now or self.name or "the beginning"
        self._print(f'  {AT_WORK} {now - self._since:.0f} s since "{what}"{self._left()}')

    def _watch(self) -> None:
        while not self._over.wait(1.0):
            with contextlib.suppress(OSError):  # nobody reads the log any more
                self.beat()

    def _print(self, line: str) -> None:
        """A line of a log; a terminal has the live table instead."""
        if self._live is None:
            self._printed = self._clock()
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _left(self) -> str:
        """The time left from now on, in words; empty where it is not known or longer than was expected."""
        left_s = self._ends - self._clock() if self._ends is not None else 0.0
        return f", {about(left_s)} left" if left_s >= 1 else ""

    def snapshot(self) -> dict[str, Any]:
        """progress.json of the result ConfigMap."""
        best = min((r["tpotMs"] for r in self.rows if "tpotMs" in r and not r.get("broken")), default=None)
        return {
            "stage": self.name,
            "now": self.now,
            "trials": max(len(self.rows), self.done),
            "secondsLeft": round(self.left_s),
            "bestTpotMs": best,
        }

    def _tell(self) -> None:
        if self._publish is not None:
            self._publish(self.snapshot())

    @staticmethod
    def _row_text(row: dict[str, Any]) -> str:
        if row.get("crash"):
            return f"  trial {row['number']:>3}  {row['policy']:<42} engine crashed: {row['crash']}"
        broken = f"  {over_limits(row['broken'], row['items'])}" if row["broken"] else ""
        stopped = f"  ({row['stopped']})" if row["stopped"] else ""
        error = f"  first failed request: {row['error']}" if row.get("error") else ""
        points = f"{-row['dropPoints'] + 0.0:+6.2f} points" if row["items"] or row["exact"] else "no items to compare"
        return (
            f"  trial {row['number']:>3}  {row['policy']:<42} TPOT {row['tpotMs']:7.2f} ms  accuracy {row['accuracy']:7.2%}  "
            f"{points}{broken}{stopped}{error}"
        )

    def _draw(self) -> Group:
        judged = max((row["items"] for row in self.rows if "items" in row), default=0)
        caption = (
            f"Trials only rank: on {judged:,} items one answer is {100 / judged:.2f} points. Held-out items decide."
            if judged
            else None
        )
        table = Table(title=self.title, title_justify="left", caption=caption, caption_justify="left", expand=False)
        for name, right in (("trial", True), ("policy", False), ("TPOT ms", True), ("accuracy", True), ("points", True),
                            ("experts", True), ("", False)):  # fmt: skip
            table.add_column(name, justify="right" if right else "left", no_wrap=True)
        for row in self.rows[-_ROWS:]:
            if row.get("crash"):
                table.add_row(str(row["number"]), row["policy"], "", "", "", "", "[red]engine crashed[/red]")
                continue
            # The screen is narrow: what a trial's items can tell stands once, below the table.
            short = over_limits(row["broken"], 0) if row["broken"] else ""
            state = f"[red]{short}[/red]" if short else "[green]feasible[/green]"
            state += f" {escape(row['error'])}" if row.get("error") else ""
            active = f"{row['active']:.1f}" if row.get("active") is not None else ""
            table.add_row(str(row["number"]), row["policy"], f"{row['tpotMs']:.2f}", f"{row['accuracy']:.2%}",
                          f"{-row['dropPoints'] + 0.0:+.2f}", active, state)  # fmt: skip
        now = self._clock()
        here = f"{self.name}: {self.now}" if self.now else self.name
        head = table if self.rows else Text(self.title)
        return Group(head, Text(f"{here}, {now - self._since:.0f} s; {now - self.began:.0f} s in all{self._left()}"))
