"""What every stage writes: one log, one JSON file, and one table that is the last thing it prints.

JSON is written after each part, so that a stage that is stopped leaves what it had measured.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.ground import machine
from tests.kit import ROOT

for _folder in (ROOT / "sere_ext", ROOT / "autotune"):
    if str(_folder) not in sys.path:  # the tree as it stands, installed or not
        sys.path.append(str(_folder))

# SERE_BENCH_OUT: the folder that comes back from a machine on which nothing else is kept.
RESULTS = Path(os.environ.get("SERE_BENCH_OUT") or ROOT / "docs" / "benchmarks" / "results")


@dataclass(frozen=True)
class Check:
    """A target and what was measured; `met` is None where nothing was."""

    target: str
    measured: str
    met: bool | None

    def line(self) -> list[str]:
        return [self.target, self.measured, {True: "met", False: "missed", None: "not measured"}[self.met]]


def at_least(target: str, value: float | None, limit: float, unit: str = "") -> Check:
    """`value` >= `limit`; None or NaN is "not measured"."""
    if value is None or math.isnan(value):
        return Check(target, "", None)
    return Check(target, f"{value:.3g}{unit}", value >= limit)


def at_most(target: str, value: float | None, limit: float, unit: str = "") -> Check:
    """`value` <= `limit`; None or NaN is "not measured"."""
    if value is None or math.isnan(value):
        return Check(target, "", None)
    return Check(target, f"{value:.3g}{unit}", value <= limit)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns in line, for a terminal; text ends with a newline."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n" for line in lines
    )


class Report:
    """One run of one stage. `out` is the JSON file; the log stands beside it."""

    def __init__(self, stage: str, out: Path) -> None:
        self.began = time.monotonic()
        self.out = out
        out.parent.mkdir(parents=True, exist_ok=True)
        self._log = out.with_suffix(".log").open("w")
        self.result: dict[str, Any] = {
            "stage": stage,
            "command": shlex.join(["python", _relative(sys.argv[0]), *sys.argv[1:]]),
            "machine": where(),
        }
        self.say(f"{stage}: {self.result['machine']}")

    def seconds(self) -> float:
        """Since the stage began."""
        return time.monotonic() - self.began

    def say(self, text: str) -> None:
        """A line for the log and for stderr."""
        line = f"[{self.seconds():6.1f} s] {text}"
        print(line, file=sys.stderr, flush=True)
        print(line, file=self._log, flush=True)

    def keep(self, **parts: Any) -> None:
        """Add parts to the result and write it."""
        self.result |= parts | {"seconds": self.seconds()}
        self.out.write_text(json.dumps(self.result, indent=1) + "\n")

    def finish(self, head: Sequence[str], rows: Sequence[Sequence[str]], checks: Sequence[Check] = ()) -> None:
        """Write everything and print the one table, targets below it."""
        self.keep(checks=[check.__dict__ for check in checks])
        text = f"\n{self.result['stage']}: {self.result['machine'].get('gpu') or self.result['machine']['cpu']}\n" + table(
            head, rows
        )
        if checks:
            text += "\n" + table(["target", "measured", ""], [check.line() for check in checks])
        text += f"{self.out}\n"
        print(text, flush=True)
        print(text, file=self._log, flush=True)
        self._log.close()


def where() -> dict[str, Any]:
    """`tune.machine`, and the GPU if there is one."""
    found = machine()
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm,clocks.max.mem", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return found
    name, driver, memory, sm, mem = (part.strip() for part in asked.stdout.splitlines()[0].split(","))
    return found | {"gpu": name, "driver": driver, "gpuMemory": memory, "maxClocks": f"SM {sm}, memory {mem}"}


def _relative(path: str) -> str:
    try:
        return str(Path(path).resolve().relative_to(ROOT))
    except ValueError:
        return Path(path).name
