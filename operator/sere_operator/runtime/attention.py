"""Since when a resource has been reconciled without a gap. What happened in a gap is no evidence against anybody's pods."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from sere_operator.runtime.reconciler import Key

GAP_S = 10.0  # a reconciliation that begins so long after it was due: this process was starved, or the one before failed


@dataclass
class Attention:
    """When each resource was reconciled, in memory: a new process has reconciled nothing yet."""

    clock: Callable[[], float] = time.monotonic
    _since: dict[Key, float] = field(default_factory=dict)
    _due: dict[Key, float] = field(default_factory=dict)

    def begin(self, key: Key) -> float:
        """A reconciliation begins. Returns the seconds for which one has followed the other as planned."""
        now = self.clock()
        if now > self._due.get(key, now) + GAP_S or key not in self._since:
            self._since[key] = now
        self._due[key] = now
        return now - self._since[key]

    def end(self, key: Key, next_s: float | None) -> None:
        """A reconciliation has succeeded; the next is due in `next_s` seconds. None: there will be none."""
        if next_s is None:
            self._since.pop(key, None)
            self._due.pop(key, None)
        else:
            self._due[key] = self.clock() + next_s
