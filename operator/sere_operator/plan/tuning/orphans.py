"""Whose the objects are that stand where a tuning run's objects belong, and which of them a run takes back. Pure.

A SereTuningJob that is deleted with `--cascade=orphan` leaves its objects without an owner, its Job among them, which runs on. One
of the same name and spec that is applied later takes them back: the run goes on, or its answer counts.
"""

from __future__ import annotations

import json

from sere_ext.contract.names import SIMILARITY_LABEL, TUNER_FIELD_MANAGER
from sere_operator.api import meta
from sere_operator.plan.objects import children, drift
from sere_operator.plan.snapshot import Object, TuningSnapshot
from sere_operator.plan.tuning.objects import result_name, result_names


def not_ours(snapshot: TuningSnapshot, bodies: list[Object]) -> Object | None:
    """The first live object of a name that this run writes, or lets its tuner write, and that no run of this name made.

    Objects of a run that was deleted and is being collected come last, since those go away by themselves.
    """
    names = [(body["kind"], body["metadata"]["name"]) for body in bodies]
    names += [("ConfigMap", name) for name in result_names(snapshot.name)]
    live = [child for key in names if (child := snapshot.child(*key)) is not None]
    foreign = [child for child in live if not children.ours(snapshot.object, child) and not _orphaned_shard(snapshot, child)]
    return min(foreign, key=lambda child: being_collected(snapshot, child), default=None)


def being_collected(snapshot: TuningSnapshot, live: Object) -> bool:
    """Whether a child still belongs to a deleted SereTuningJob of the same name: to adopt it would be to read its old result."""
    owners = live["metadata"].get("ownerReferences") or []
    return any(
        owner.get("controller") and owner.get("kind") == meta.TUNING_JOB_KIND and owner.get("name") == snapshot.name
        for owner in owners
    )


def orphaned(snapshot: TuningSnapshot, live: Object | None) -> bool:
    """Whether a live object was made by a run of this name, and has no owner any more."""
    return live is not None and not children.owned(snapshot.object, live) and children.ours(snapshot.object, live)


def any_orphaned(snapshot: TuningSnapshot) -> bool:
    return any(orphaned(snapshot, live) for live in snapshot.children.values())


def of_another_spec(snapshot: TuningSnapshot, bodies: list[Object]) -> Object | None:
    """The first orphaned object, input or Job, of a run that did something else than this one asks for."""
    for body in bodies:
        live = snapshot.child(body["kind"], body["metadata"]["name"])
        if live is None or not orphaned(snapshot, live):
            continue
        if body["kind"] == "Job":
            spec = {key: value for key, value in body["spec"].items() if key != "suspend"}
            if drift.difference({"spec": spec}, live) is not None:
                return live
        if "data" in body and _tuning_file(body) != _tuning_file(live):
            return live
    return None


def _tuning_file(input_map: Object) -> object:
    text = (input_map.get("data") or {}).get("tuning.yaml", "")
    try:
        return json.loads(text)
    except ValueError:
        return text


def shards_taken_back(snapshot: TuningSnapshot) -> list[Object]:
    """What to apply so that the orphaned ConfigMaps of the result's similarity artefact have this run for their owner."""
    references = [children.owner_reference(snapshot.object)]
    return [
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": name, "namespace": snapshot.namespace, "ownerReferences": references},
        }
        for name in result_names(snapshot.name)[1:]
        if (live := snapshot.child("ConfigMap", name)) is not None and _orphaned_shard(snapshot, live)
    ]


def _orphaned_shard(snapshot: TuningSnapshot, live: Object) -> bool:
    """Whether the tuner of a run of this name made a ConfigMap with a part of its artefact, which has no owner any more."""
    metadata = live["metadata"]
    labelled = (metadata.get("labels") or {}).get(SIMILARITY_LABEL) == result_name(snapshot.name)
    return labelled and not children.controlled(live) and children.applied_by(live, TUNER_FIELD_MANAGER)
