"""Which events of a watch only show what the operator itself has just written into a status."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from sere_operator.plan.patch import merged
from sere_operator.plan.snapshot import Object, Resource


@dataclass
class Echoes:
    """For each resource, what it looks like once the operator's last write of its status is done.

    An event is an echo where it shows exactly that. So an edit of the resource, another operator's mark in the status, or any other
    foreign change is none, even where the watch shows it together with the operator's own write.
    """

    _expected: dict[str, Object] = field(default_factory=dict)  # by uid

    def expect(self, resource: Resource, patch: Object) -> None:
        """The status of this resource, as it was read, is about to be changed by a merge patch."""
        body = {**resource.object, "status": merged(resource.status, patch)}
        self._expected[resource.object["metadata"]["uid"]] = _without_bookkeeping(body)

    def hears(self, body: Any) -> bool:
        """Whether an event that shows this object is an echo."""
        expected = self._expected.get(body["metadata"]["uid"])
        return expected is not None and expected == _without_bookkeeping(body)

    def forget(self, uid: str) -> None:
        """The resource is gone."""
        self._expected.pop(uid, None)


def _without_bookkeeping(body: Any) -> Object:
    """Metadata and status of an object, without what the API server changes at every write. `generation` stands for the spec."""
    metadata = {key: value for key, value in body["metadata"].items() if key not in ("resourceVersion", "managedFields")}
    return {"metadata": metadata, "status": body.get("status") or {}}
