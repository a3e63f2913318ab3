"""Which held-out items earlier studies opened, for each model; and the noise floor and pace that the last study measured.

An item that was opened before is no longer fresh: whoever tunes again after a look at its result has a second chance. So
each study on items that were opened before may spend less of the significance level, and what all studies together may
spend is the level that is claimed. The ledger counts items, not files, folders or sets: another `out`, `--fresh`,
`sere certify` after `sere tune` and a file with one line more all open the same items again.

There is one ledger per user and model (`weights.model_key`: fine-tunes of one base are models of their own), in `$XDG_STATE_HOME/sere` (`~/.local/state/sere`). Where no such folder can be
written, as in some containers, it lies beside `out`. In a cluster the openings are published as well, and read back there.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from sere_autotune.study.schema import Pace
from sere_ext.contract.errors import PublishError
from sere_ext.contract.files import write_whole

_KEPT = 0.25  # of the level that is left, what a study leaves for the ones after it
_TRIES = 100  # to note an opening, while others write


def state_folder() -> Path:
    """Where a user's programs keep what outlives a run (XDG base directory specification)."""
    named = os.environ.get("XDG_STATE_HOME")
    return (Path(named) if named else Path.home() / ".local" / "state") / "sere"


class Shared(Protocol):
    """Where a cluster keeps the openings, since the files of a tuning pod end with the pod. Keys are short model digests."""

    def read_openings(self, model: str) -> tuple[dict[str, Any], str]:
        """What is noted, and the version that it is of."""
        ...

    def write_openings(self, model: str, content: dict[str, Any], version: str) -> bool:
        """Note it, unless somebody has written since `version`: then nothing is changed, and the answer is False."""
        ...


class Ledger:
    """One JSON file for a model, changed under an advisory lock and replaced as a whole.

    Args:
        model: digest of the model's configuration and weights.
        out: the study's folder, beside which the ledger lies if the user's own folder cannot be written.
        shared: also read from and written to; an opening that cannot be written there raises before any item is opened.
    """

    def __init__(self, model: str, out: Path, shared: Shared | None = None) -> None:
        self._model, self._shared = model.removeprefix("sha256:")[:16], shared
        name = f"openings-{self._model}.json"
        try:
            folder = state_folder()
            folder.mkdir(parents=True, exist_ok=True)
            writable = os.access(folder, os.W_OK)
        except (OSError, RuntimeError):  # a read-only home, or none
            writable = False
        self.path = folder / name if writable else out.resolve().parent / f"sere-{name}"

    def read(self) -> dict[str, Any]:
        """{"studies": {id: earlier openings}, "opened": {item digest: openings}, "noise": ..., "pace": ...}."""
        return self._read()[0]

    def _read(self) -> tuple[dict[str, Any], str]:
        """What is noted here and in the cluster together, and the cluster's version."""
        try:
            found = json.loads(self.path.read_text())
        except (OSError, ValueError):
            found = {}
        mine: dict[str, Any] = found if isinstance(found, dict) else {}
        theirs, version = self._shared.read_openings(self._model) if self._shared is not None else ({}, "")
        opened = dict(theirs.get("opened", {}))
        for item, count in mine.get("opened", {}).items():
            opened[item] = max(count, opened.get(item, 0))
        return {**mine, "studies": {**theirs.get("studies", {}), **mine.get("studies", {})}, "opened": opened}, version

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _write(self, content: dict[str, Any]) -> None:
        write_whole(self.path, json.dumps(content) + "\n")

    def openings(self, items: Sequence[str], study: str | None) -> int:
        """How many other studies opened the most opened one of these items before.

        Args:
            items: digests of the held-out items.
            study: id of the study that asks; None where there is none yet.
        """
        return _openings(self.read(), items, study)

    def open(self, items: Sequence[str], study: str) -> int:
        """Note that `study` opens the items, once however often it is resumed. Returns the earlier openings.

        Runs that open them at the same time are counted one after the other, also where they share nothing but the cluster:
        whoever finds that another one was quicker counts anew.

        Raises:
            PublishError: it cannot be noted in the cluster; no item is opened then.
        """
        with self._locked():
            for _ in range(_TRIES):
                content, version = self._read()
                earlier = _openings(content, items, study)
                studies, opened = content["studies"], content["opened"]
                known = study in studies
                if not known:
                    studies[study] = earlier
                    for item in items:
                        opened[item] = opened.get(item, 0) + 1
                noted = {"studies": studies, "opened": opened}
                if known or self._shared is None or self._shared.write_openings(self._model, noted, version):
                    self._write(content)
                    return earlier
                time.sleep(random.uniform(0.0, 0.5))
        raise PublishError(f"the openings of model {self._model} are changed by others all the time; run this again later")

    def known(self) -> tuple[float | None, Pace | None]:
        """The last study's discordant share of exact against exact and its pace; None where there was no study."""
        found = self.read()
        pace = found.get("pace")
        return found.get("noise"), Pace(**pace) if pace else None

    def note(self, noise: float, pace: Pace | None) -> None:
        """Keep what a study measured, for the plans of later ones."""
        with self._locked():
            self._write({**self.read(), "noise": noise, "pace": asdict(pace) if pace else None})


def _openings(content: dict[str, Any], items: Sequence[str], study: str | None) -> int:
    if study is not None and study in content.get("studies", {}):
        return int(content["studies"][study])
    opened = content.get("opened", {})
    return max((int(opened.get(item, 0)) for item in items), default=0)


def spent_alpha(alpha: float, openings: int) -> float:
    """What a study may spend of the level `alpha` after `openings` earlier studies of the same items.

    Three quarters for the first and a quarter of the one before for each later study; the sum over all studies is `alpha`,
    so that it is also the chance that any of them certifies a policy that breaks the limit.
    """
    return round(alpha * (1 - _KEPT) * _KEPT**openings, 12)
