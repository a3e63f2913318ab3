"""What a person sees while it runs: a live table on stderr with the time left; plain lines where there is no terminal."""

from __future__ import annotations

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


class Progress:
    """Draws stages and trials; hands a plain form of the same to `publish` (the result ConfigMap)."""

    def __init__(self, console: Console, title: str, publish: Callable[[dict[str, Any]], None] | None = None) -> None:
        self.console, self.title, self._publish = console, title, publish
        self.rows: list[dict[str, Any]] = []
        self.now, self.left_s, self.name = "", 0.0, ""
        self.done = 0  # trials of before a restart, until they are drawn again
        self.began = time.monotonic()
        self._live: Live | None = None

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self._live = Live(get_renderable=self._draw, console=self.console, refresh_per_second=2, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def stage(self, name: str, total: int, done: int = 0) -> None:
        self.name, self.done, self.now = name, max(done, self.done), ""
        if self._live is None:
            self.console.print(f"{name}" + (f" ({done} of {total} done before)" if done else ""), highlight=False, soft_wrap=True)
        self._tell()

    def trial(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self._live is None:
            self.console.print(self._row_text(row), highlight=False, soft_wrap=True)
        self._tell()

    def step(self, text: str, left_s: float) -> None:
        self.now, self.left_s = text, left_s
        if self._live is None:
            left = f", {about(left_s)} left" if left_s > 0 else ""
            self.console.print(f"  {text}{left}", highlight=False, soft_wrap=True)
        self._tell()

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
        gone = time.monotonic() - self.began
        left = f", {about(self.left_s)} left" if self.left_s > 0 else ""
        return Group(table, Text(f"{self.name}   {self.now}   {gone:.0f} s gone{left}"))
