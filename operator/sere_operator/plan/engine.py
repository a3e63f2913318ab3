"""The engine that the pods are of: its revision, and whether they are being replaced by another's. Pure."""

from __future__ import annotations

import hashlib

from sere_ext.policy import canonical_json

from sere_operator.api import meta
from sere_operator.api.deployment import SereDeploymentSpec
from sere_operator.plan.snapshot import Object, Snapshot


def revision(spec: SereDeploymentSpec) -> str:
    """The model and engine, as rejections and the Deployment remember them. 12 hex digits."""
    state = {"model": spec.model.to_json_dict(), "engine": spec.engine.to_json_dict()}
    return hashlib.sha256(canonical_json(state)).hexdigest()[:12]


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
