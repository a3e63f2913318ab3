"""What must be read next for one SereTuningJob, from what has been read so far. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from sere_ext.contract.errors import SpecError
from sere_operator.api import meta
from sere_operator.api.common import parse_spec
from sere_operator.api.tuning import SereTuningJobSpec
from sere_operator.plan.objects.children import Defaults, text
from sere_operator.plan.reads import Artefact, Child, Events, Listed, Read
from sere_operator.plan.snapshot import TuningSnapshot
from sere_operator.plan.tuning.objects import build, result_name, result_names, run_name
from sere_operator.plan.tuning.orphans import any_orphaned
from sere_operator.plan.tuning.result import read_result, similarity_uri, waits_for_a_pod


def needs_tuning(snapshot: TuningSnapshot, defaults: Defaults) -> tuple[Read, ...]:
    """The reads to do next: those of the first round that are not in the snapshot yet. Empty: the snapshot is whole.

    Nothing is read for a run that has ended, or whose spec cannot be read.
    """
    try:
        spec = parse_spec(SereTuningJobSpec, snapshot.spec)
    except SpecError:
        return ()
    if snapshot.status.get("outcome"):
        return ()
    for reads in (_result(snapshot), _artefact(snapshot), _objects(snapshot, spec, defaults), _last(snapshot)):
        if missing := tuple(read for read in reads if read not in snapshot.read):
            return missing
    return ()


def _result(snapshot: TuningSnapshot) -> Iterator[Read]:
    """The ConfigMap that the tuner writes: it says which artefact and which objects matter."""
    yield Child("ConfigMap", result_name(snapshot.name))


def _artefact(snapshot: TuningSnapshot) -> Iterator[Read]:
    uri = similarity_uri(snapshot.result)
    if uri is not None:
        yield Artefact(uri)


def _objects(snapshot: TuningSnapshot, spec: SereTuningJobSpec, defaults: Defaults) -> Iterator[Read]:
    """The run's children, what a chosen result becomes, and the Job's pods."""
    for body in (*build(snapshot, spec, defaults), *read_result(snapshot, spec).objects):
        yield Child(body["kind"], body["metadata"]["name"])
    yield Listed("Pod", text({meta.INSTANCE_LABEL: meta.label_value(snapshot.name), meta.COMPONENT_LABEL: meta.TUNER_COMPONENT}))


def _last(snapshot: TuningSnapshot) -> Iterator[Read]:
    yield from _to_be_written(snapshot)
    job = snapshot.child("Job", run_name(snapshot.name))
    if job is not None and waits_for_a_pod(snapshot):
        yield Events("Job", job["metadata"]["name"], job["metadata"]["uid"])


def _to_be_written(snapshot: TuningSnapshot) -> Iterator[Read]:
    """What stands where the tuner writes its ConfigMaps: before it is given the right to, and where orphans are taken back."""
    if snapshot.child("Role", run_name(snapshot.name)) is None or any_orphaned(snapshot):
        for name in result_names(snapshot.name):
            yield Child("ConfigMap", name)


def taken_tuning(snapshot: TuningSnapshot, answers: Mapping[Read, Any]) -> TuningSnapshot:
    """The snapshot with these answers, each of the type that its read's docstring names."""
    for read, answer in answers.items():
        match read:
            case Child(kind, name) if answer is not None:
                snapshot = replace(snapshot, children={**snapshot.children, (kind, name): answer})
                if (kind, name) == ("ConfigMap", result_name(snapshot.name)):
                    snapshot = replace(snapshot, result=answer)
            case Artefact():
                snapshot = replace(snapshot, similarity=answer)
            case Events():
                snapshot = replace(snapshot, events=tuple(answer))
            case Listed():
                snapshot = replace(snapshot, pods=tuple(answer))
        snapshot = replace(snapshot, read=snapshot.read | {read})
    return snapshot
