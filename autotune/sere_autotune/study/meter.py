"""Charges an engine's time while it runs, so that a tuner killed at any moment, also while its engine starts, has paid for it."""

from __future__ import annotations

import contextlib
import threading
import time

from sere_autotune.study.budget import Budget
from sere_autotune.study.study import TuningStudy
from sere_ext.contract.errors import DiskFullError

BEAT_S = 10.0  # what a kill loses at most


class Meter:
    """Told when an engine's device time begins and ends; meanwhile writes what was spent into the study at every beat."""

    def __init__(self, study: TuningStudy, budget: Budget) -> None:
        self._study, self._budget = study, budget
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def engine(self, running: bool) -> None:
        """Device time begins or ends."""
        self._rest()  # before the budget changes: the beat reads it
        now = time.monotonic()
        if running:
            self._budget.engine_started(now)
        else:
            self._budget.engine_stopped(now)
        with contextlib.nullcontext() if running else contextlib.suppress(DiskFullError):  # an engine must end all the same
            self._study.note_spent(self._budget)
        if running:
            self._stopped.clear()
            self._thread = threading.Thread(target=self._beat, name="meter", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Write down the last time; nothing is written after it."""
        self._rest()
        with contextlib.suppress(DiskFullError):  # whoever closes knows already, or is ending for another reason
            self._study.note_spent(self._budget)

    def _rest(self) -> None:
        if self._thread is not None:
            self._stopped.set()
            self._thread.join()
            self._thread = None

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT_S):
            with contextlib.suppress(DiskFullError):  # the next trial or block raises it in the main thread
                self._study.note_spent(self._budget)
