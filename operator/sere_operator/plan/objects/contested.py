"""A child is put back to what is wanted; fields that somebody else keeps changing are left to them and named once. Pure.

A webhook that rewrites an image's registry, or another controller, would else be fought at every reconciliation, for ever. A
Deployment that two programs pull at makes new pods at every pull.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from sere_operator.api import meta
from sere_operator.plan.objects import drift
from sere_operator.plan.snapshot import Event, Plan, Resource
from sere_operator.plan.times import seconds, stamp

Object = dict[str, Any]

PUT_BACK = 2  # times
FORGET_S = 3600.0  # changes further apart are no contest
MAX_FIELDS = 32  # that are remembered one by one
OTHERS = "further fields"  # stands for the fields beyond MAX_FIELDS, all together
HASH = f"metadata.annotations.{meta.CONFIG_HASH_ANNOTATION}"


@dataclass
class Contested:
    """What `status.contested` remembers, and what this reconciliation adds to it.

    now      seconds since the epoch
    edited   whether the resource's spec is another than the one that was carried out last
    applied  hash of the Deployment that the operator applied last, as far as the status tells
    events   one Warning for each field that is left from now on
    """

    now: float
    edited: bool = False
    applied: str | None = None
    entries: dict[tuple[str, str], Object] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)

    @classmethod
    def read(cls, resource: Resource) -> Contested:
        status = resource.status
        entries = {(entry["object"], entry["field"]): entry for entry in status.get("contested") or []}
        edited = status.get("observedGeneration") != resource.generation
        return cls(resource.now, edited, status.get("revision"), entries)

    def settle(self, what: str, wrong: Iterable[str]) -> list[str]:
        """Of the fields of one object that are not as wanted, those to put back now; the others are left.

        Args:
            what: the object, such as `Deployment m`.
            wrong: paths of its fields.
        """
        paths = list(wrong)
        room = MAX_FIELDS - 1 - len(self.entries)
        unknown = [path for path in paths if (what, path) not in self.entries]
        together = set(unknown[max(0, room) :])
        counted = [path for path in paths if path not in together] + ([OTHERS] if together else [])
        gone = [key for key, entry in self.entries.items() if key[0] == what and key[1] not in counted and self._old(entry)]
        for key in gone:
            del self.entries[key]
        put_back = {path for path in counted if self._put_back(what, path)}
        return [path for path in paths if (OTHERS if path in together else path) in put_back]

    def _old(self, entry: Object) -> bool:
        return self.now - seconds(entry["at"]) > FORGET_S

    def _put_back(self, what: str, path: str) -> bool:
        entry = self.entries.get((what, path))
        times = int(entry["times"]) if entry is not None else 0
        if times > PUT_BACK:
            return False
        if entry is not None and self._old(entry):
            times = 0
        if path == OTHERS and entry is None and len(self.entries) >= MAX_FIELDS:
            return False  # another object's further fields have the last place
        self.entries[what, path] = {"object": what, "field": path, "times": times + 1, "at": stamp(self.now)}
        if times < PUT_BACK:
            return True
        words = f"{what}: {path} is changed by somebody else again and again; it is left as it is"
        self.events.append(Event("Warning", "FieldLeft", words))
        return False

    def wanted_anew(self, what: str, live: Object) -> bool:
        """Whether a child lacks our newest hash since we want it otherwise now, not since somebody changed the annotation."""
        found = (live["metadata"].get("annotations") or {}).get(meta.CONFIG_HASH_ANNOTATION)
        as_applied = found is not None and found == self.applied and (what, HASH) not in self.entries
        return self.edited or as_applied

    def forget(self, what: str) -> None:
        """What we want of an object has changed, so it is written anew."""
        self.entries = {key: entry for key, entry in self.entries.items() if key[0] != what}

    def told(self) -> list[Object] | None:
        """`status.contested` to be; None: nothing is contested."""
        return list(self.entries.values()) or None


def keep(plan: Plan, contested: Contested, body: Object, live: Object | None) -> None:
    """Apply one child where it is missing or changed, and take out what does not belong into it; foreign changes are told.

    What somebody else changes again and again is left, but for ConfigMaps, which say what pods run and make none.

    Args:
        body: as wanted, stamped.
        live: as read, None where there is none.
    """
    what = f"{body['kind']} {body['metadata']['name']}"
    always = body["kind"] == "ConfigMap"
    if live is None or (not _same_config(body, live) and (always or contested.wanted_anew(what, live))):
        contested.forget(what)
        if drift.drift(body, live) is not None:
            plan.apply.append(body)
        return
    foreign = drift.without_foreign(body, live)
    wrong = [*drift.drifts(body, live), *(foreign[1] if foreign is not None else [])]
    heal = wrong if always else contested.settle(what, wrong)
    left = set(wrong) - set(heal)
    foreign = drift.without_foreign(body, live, left)
    if foreign is not None:
        plan.replace.append(foreign[0])
        plan.events.append(Event("Normal", "Healed", f"{what}: {_listed(foreign[1])} was taken out"))
    wanted_body = drift.leaving(body, live, left)
    where = list(drift.drifts(wanted_body, live))
    if where:
        plan.apply.append(wanted_body)
        plan.events.append(Event("Normal", "Healed", f"{what}: {_listed(where)} was put back"))


def _listed(paths: list[str]) -> str:
    return ", ".join(paths[:5]) + (f" and {len(paths) - 5} more" if len(paths) > 5 else "")


def _same_config(body: Object, live: Object) -> bool:
    key = meta.CONFIG_HASH_ANNOTATION
    return bool((live["metadata"].get("annotations") or {}).get(key) == body["metadata"]["annotations"][key])
