"""The model and engine that the pods are of: their revision, and whether pods of another are being replaced. Pure."""

from __future__ import annotations

import hashlib
import json

from sere_ext.contract.record import canonical_json
from sere_operator.api import meta
from sere_operator.api.common import Engine
from sere_operator.api.deployment import SereDeploymentSpec
from sere_operator.plan.snapshot import Object, Snapshot

_PLACES = ("nodeSelector", "tolerations", "runtimeClassName")  # fields of the spec and of a pod on where pods run
_POD_FIELDS = ("containers", "volumes", "terminationGracePeriodSeconds")  # of the pod, that other fields of the spec set
_ENGINE_FIELDS = ("image", "args", "env", "resources", "volumeMounts")  # the same of the container


def revision(spec: SereDeploymentSpec) -> str:
    """The model and engine (of an `effective` spec), as rejections and the Deployment remember them. 12 hex digits.

    What `podTemplate` sets in pods beside labels and annotations is a part of the engine, such as a variable or a sidecar.
    """
    state = {"model": spec.model.to_json_dict(), "engine": what_runs(spec.engine)}
    if spec.pod_template is not None and spec.pod_template.spec:
        state["podTemplate"] = spec.pod_template.spec
    return hashlib.sha256(canonical_json(state)).hexdigest()[:12]


def what_runs(engine: Engine) -> Object:
    """The engine without what says nothing about how it answers: who may ask, and how its pods end."""
    return {key: value for key, value in engine.to_json_dict().items() if key not in ("apiKeySecret", "shutdown")}


def effective(spec: SereDeploymentSpec, default_image: str) -> SereDeploymentSpec:
    """The spec with the engine image that its pods get, so that another default of the operator is another engine."""
    if spec.engine.image is not None:
        return spec
    return spec.model_copy(update={"engine": spec.engine.model_copy(update={"image": default_image})})


def container(template: Object) -> Object:
    """The engine's own container, among those that others may have injected."""
    return next((found for found in template["spec"]["containers"] if found["name"] == "engine"), {})


def as_annotations(made_of: str, template: Object) -> Object:
    """Annotations of the Deployment that say what its pods are meant to be: revision and pod template."""
    return {meta.REVISION_ANNOTATION: made_of, meta.TEMPLATE_ANNOTATION: canonical_json(template).decode()}


def applied(live: Object | None) -> tuple[str, Object] | None:
    """(revision, pod template) that the operator last applied, whatever others have made of the template since.

    None where there is no Deployment, or somebody took the annotations away.
    """
    found = (live or {}).get("metadata", {}).get("annotations") or {}
    try:
        return found[meta.REVISION_ANNOTATION], json.loads(found[meta.TEMPLATE_ANNOTATION])
    except (KeyError, ValueError):
        return None


def changing(snapshot: Snapshot, spec: SereDeploymentSpec) -> bool:
    """Whether the Deployment is known to be still of another revision than the spec."""
    before = applied(snapshot.children.get("Deployment"))
    return before is not None and before[0] != revision(spec)


def replacing(snapshot: Snapshot) -> str | None:
    """What is missing until all pods are of the Deployment's newest template; None if nothing is."""
    deployment = snapshot.children.get("Deployment")
    if deployment is None:
        return "the Deployment is being created"
    status, wanted = deployment.get("status") or {}, deployment["spec"].get("replicas", 1)
    if status.get("observedGeneration", 0) < deployment["metadata"].get("generation", 0):
        return "the newest pod template has not been seen yet"
    updated, there = status.get("updatedReplicas", 0), status.get("replicas", 0)
    return f"{updated} of {wanted} pods are of the current spec" if updated < wanted or there > updated else None


def kept(body: Object, live: Object) -> Object:
    """A Deployment as wanted, but with the pod template that was applied before: the number of pods may still change.

    Args:
        live: a Deployment for which `applied` is known.
    """
    before = applied(live)
    assert before is not None
    metadata = {**body["metadata"], "annotations": as_annotations(*before)}
    return {**body, "metadata": metadata, "spec": {**body["spec"], "template": before[1]}}


def waiting(template: Object, live: Object) -> list[str]:
    """Fields of the spec, beside model and engine, in which a pod template differs from the one that was applied before."""

    def parts(of: Object) -> dict[str, object]:
        pod, engine = of["spec"], container(of)
        return {
            "resources": engine.get("resources") or None,
            "volumes": [
                item for item in (*pod.get("volumes", []), *engine.get("volumeMounts", [])) if item["name"].startswith("vol-")
            ],
            **{field: pod.get(field) for field in _PLACES},
            "podTemplate": {
                "metadata": of["metadata"],
                "pod": {key: value for key, value in pod.items() if key not in (*_PLACES, *_POD_FIELDS)},
                "engine": {key: value for key, value in engine.items() if key not in _ENGINE_FIELDS},
                "others": [found for found in pod["containers"] if found["name"] != "engine"],
            },
        }

    before = applied(live)
    if before is None:
        return []
    now, then = parts(template), parts(before[1])
    return [f"spec.{field}" for field, value in now.items() if value != then[field]]
