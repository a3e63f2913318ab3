"""The engine that the pods are of: its revision, and whether they are being replaced by another's. Pure."""

from __future__ import annotations

import hashlib

from sere_ext.policy import canonical_json

from sere_operator.api import meta
from sere_operator.api.deployment import SereDeploymentSpec
from sere_operator.plan.snapshot import Object, Snapshot


def revision(spec: SereDeploymentSpec) -> str:
    """The model and engine (of an `effective` spec), as rejections and the Deployment remember them. 12 hex digits."""
    state = {"model": spec.model.to_json_dict(), "engine": spec.engine.to_json_dict()}
    return hashlib.sha256(canonical_json(state)).hexdigest()[:12]


def effective(snapshot: Snapshot, spec: SereDeploymentSpec, default_image: str) -> SereDeploymentSpec:
    """The spec with the engine image that its pods get, so that another default of the operator is another engine.

    Operators before left a default image out of the revision and of what is tuned. A Deployment of theirs is read as they
    did for as long as it is of this model, engine and image: an upgrade alone replaces and tunes nothing.
    """
    live = snapshot.children.get("Deployment")
    as_before = live is not None and not changing(snapshot, spec) and image_of(live) == default_image
    if spec.engine.image is not None or as_before:
        return spec
    return spec.model_copy(update={"engine": spec.engine.model_copy(update={"image": default_image})})


def image_of(deployment: Object) -> str | None:
    containers = deployment["spec"]["template"]["spec"]["containers"]
    return next((container["image"] for container in containers if container["name"] == "engine"), None)


def changing(snapshot: Snapshot, spec: SereDeploymentSpec) -> bool:
    """Whether the Deployment is still of another revision than the spec. Unknown (an older operator's): no."""
    annotations = (snapshot.children.get("Deployment") or {}).get("metadata", {}).get("annotations") or {}
    return bool(annotations.get(meta.REVISION_ANNOTATION, revision(spec)) != revision(spec))


def replacing(snapshot: Snapshot) -> str | None:
    """None if all pods are of the Deployment's newest template, else what is missing."""
    deployment = snapshot.children.get("Deployment")
    if deployment is None:
        return "the Deployment is being created"
    status, wanted = deployment.get("status") or {}, deployment["spec"].get("replicas", 1)
    if status.get("observedGeneration", 0) < deployment["metadata"].get("generation", 0):
        return "the newest pod template has not been seen yet"
    updated, there = status.get("updatedReplicas", 0), status.get("replicas", 0)
    return f"{updated} of {wanted} pods are of the current spec" if updated < wanted or there > updated else None


def kept(body: Object, live: Object) -> Object:
    """A Deployment as wanted, but with the pods that it has: their number may change, their template does not."""
    metadata = {
        **body["metadata"],
        "annotations": {meta.REVISION_ANNOTATION: live["metadata"]["annotations"][meta.REVISION_ANNOTATION]},
    }
    return {**body, "metadata": metadata, "spec": {**body["spec"], "template": live["spec"]["template"]}}
