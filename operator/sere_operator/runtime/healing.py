"""How often the same object is put back. Another controller may change it as soon as that is done, for ever.

A Deployment that two programs pull at makes new pods at every pull. So after a few writes that change nothing for good, the
pauses between them double, and one Warning says so. The policy ConfigMap is put back without pauses: that makes no pod, and
what stands in it is what pods route by.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from sere_ext.contract.record import canonical_json
from sere_operator.api import meta
from sere_operator.plan.snapshot import Event, Object, Plan
from sere_operator.runtime.reconciler import Key

FREE = 4  # writes of the same content without a pause
FIRST_PAUSE_S = 30.0
LONGEST_PAUSE_S = 1800.0
PEACE_S = 900.0  # without a write, after which all is forgotten
WITHOUT_PAUSE = ("ConfigMap",)


@dataclass
class _Object:
    """What was last written to one object. Times are monotonic seconds."""

    content: str
    writes: int = 0
    at: float = 0.0
    until: float = 0.0


@dataclass
class Healing:
    """Writes per object, in memory: a new process begins with none."""

    clock: Callable[[], float] = time.monotonic
    _known: dict[tuple[str, str, str], _Object] = field(default_factory=dict)

    def paced(self, key: Key, plan: Plan) -> Plan:
        """The plan without the objects that must wait, and with one Warning for each whose wait has begun now."""
        now, waits, events = self.clock(), [], []
        held: set[tuple[str, str]] = set()
        for name, body in {_name(body): body for body in (*plan.replace, *plan.apply)}.items():
            if name[0] in WITHOUT_PAUSE:
                continue
            known = self._known.get((key[1], *name))
            content = _content(body)
            if known is None or known.content != content or now - known.at > PEACE_S + LONGEST_PAUSE_S:
                known = self._known[key[1], *name] = _Object(content)
            if now < known.until:
                held.add(name)
                waits.append(known.until - now)
                continue
            known.writes, known.at = known.writes + 1, now
            if known.writes >= FREE:
                pause = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** min(known.writes - FREE, 10))
                known.until = now + pause
                words = (
                    f"something else changes {name[0]} {name[1]} as soon as it is put back ({known.writes} times now); it is "
                    f"put back again in {pause:.0f} s. `kubectl get {name[0].lower()} {name[1]} -o yaml --show-managed-fields` "
                    "names who writes it"
                )
                events.append(Event("Warning", "Fighting", words))
        if not held and not events:
            return plan
        return replace(
            plan,
            replace=[body for body in plan.replace if _name(body) not in held],
            apply=[body for body in plan.apply if _name(body) not in held],
            events=[*(event for event in plan.events if not (held and event.reason == "Healed")), *events],
            requeue_after=min([*waits, *([] if plan.requeue_after is None else [plan.requeue_after])], default=None),
        )

    def not_written(self, key: Key, plan: Plan) -> None:
        """What `paced` let through was refused, so nothing was put back."""
        for name in {_name(body) for body in (*plan.replace, *plan.apply)}:
            known = self._known.get((key[1], *name))
            if known is not None:
                known.writes, known.until = max(0, known.writes - 1), 0.0

    def forget(self) -> None:
        """Drop what was not written for long; called now and then by the resync."""
        now = self.clock()
        self._known = {name: known for name, known in self._known.items() if now - known.at < PEACE_S + LONGEST_PAUSE_S}


def _name(body: Object) -> tuple[str, str]:
    return body["kind"], body["metadata"]["name"]


def _content(body: Object) -> str:
    """What was meant to be written: the hash in the object's annotation, else one of the whole."""
    stamped = (body["metadata"].get("annotations") or {}).get(meta.CONFIG_HASH_ANNOTATION)
    return str(stamped or hashlib.sha256(canonical_json(body)).hexdigest())
