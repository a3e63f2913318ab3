"""Fields of our children that somebody else keeps changing: put back twice, then left and named once. Pure.

A webhook that rewrites an image's registry, or another controller, would else be fought at every look, for ever.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from sere_operator.plan.snapshot import Event
from sere_operator.plan.times import seconds, stamp

Object = dict[str, Any]

PUT_BACK = 2  # times
FORGET_S = 3600.0  # changes further apart are no contest
MAX_FIELDS = 32


@dataclass
class Contested:
    """What `status.contested` remembers, and what this look adds to it.

    now     seconds since the epoch
    events  one Warning for each field that is left from now on
    """

    now: float
    entries: dict[tuple[str, str], Object] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)

    @classmethod
    def read(cls, status: Object, now: float) -> Contested:
        entries = {(entry["object"], entry["field"]): entry for entry in status.get("contested") or []}
        return cls(now, entries)

    def settle(self, what: str, wrong: Iterable[str]) -> list[str]:
        """Of the fields of one object that are not as wanted, those to put back now; the others are left.

        Args:
            what: the object, such as `Deployment m`.
            wrong: paths of its fields.
        """
        paths = list(wrong)
        old = [key for key, entry in self.entries.items() if key[0] == what and key[1] not in paths and self._old(entry)]
        for key in old:
            del self.entries[key]
        return [path for path in paths if self._put_back(what, path)]

    def _old(self, entry: Object) -> bool:
        return self.now - seconds(entry["at"]) > FORGET_S

    def _put_back(self, what: str, path: str) -> bool:
        entry = self.entries.get((what, path))
        times = int(entry["times"]) if entry is not None else 0
        if times > PUT_BACK:
            return False
        if entry is not None and self._old(entry):
            times = 0
        if len(self.entries) >= MAX_FIELDS and entry is None:
            return True
        self.entries[what, path] = {"object": what, "field": path, "times": times + 1, "at": stamp(self.now)}
        if times < PUT_BACK:
            return True
        words = f"{what}: {path} is changed by somebody else again and again; it is left as it is"
        self.events.append(Event("Warning", "FieldLeft", words))
        return False

    def forget(self, what: str) -> None:
        """What we want of an object has changed, so it is written anew."""
        self.entries = {key: entry for key, entry in self.entries.items() if key[0] != what}

    def told(self) -> list[Object] | None:
        """`status.contested` to be; None: nothing is contested."""
        return list(self.entries.values()) or None
