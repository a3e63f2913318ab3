"""What earlier studies leave for later ones, beside their folders: opened CERT sets, noise floors, measured pace.

A CERT set that was opened before is no longer fresh, so a later study on it spends less: alpha / 2^j for the j-th
earlier study. Kept in `sere-ledger.json` in the folder above `out`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sere_autotune.study.schema import Pace


class Ledger:
    """One JSON file, changed under an advisory lock and replaced as a whole."""

    def __init__(self, out: Path) -> None:
        self.path = out.resolve().parent / "sere-ledger.json"

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self.path.read_text())
            return found if isinstance(found, dict) else {}
        except (OSError, ValueError):
            return {}

    @contextlib.contextmanager
    def _changed(self) -> Iterator[dict[str, Any]]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            content = self._read()
            yield content
            partial = self.path.with_suffix(".part")
            partial.write_text(json.dumps(content, indent=1) + "\n")
            os.replace(partial, self.path)

    def openings(self, model: str, cert: str, study: str) -> int:
        """How many other studies opened this CERT set for this model before."""
        seen = self._read().get("opened", {}).get(f"{model} {cert}", [])
        return seen.index(study) if study in seen else len(seen)

    def open(self, model: str, cert: str, study: str) -> int:
        """Note that `study` opens the set, once however often it is resumed. Returns the earlier openings."""
        with self._changed() as content:
            seen = content.setdefault("opened", {}).setdefault(f"{model} {cert}", [])
            if study not in seen:
                seen.append(study)
            return int(seen.index(study))

    def known(self, model: str) -> tuple[float | None, Pace | None]:
        """The last study's discordant share of exact against exact and its pace, for a model; None where there was no study."""
        found = self._read().get("models", {}).get(model) or {}
        pace = found.get("pace")
        return found.get("noise"), Pace(**pace) if pace else None

    def note(self, model: str, noise: float, pace: Pace | None) -> None:
        with self._changed() as content:
            content.setdefault("models", {})[model] = {"noise": noise, "pace": asdict(pace) if pace else None}


def spent_alpha(alpha: float, openings: int) -> float:
    """alpha / 2^j: what may be spent on a CERT set that j earlier studies opened."""
    return alpha / 2.0**openings
