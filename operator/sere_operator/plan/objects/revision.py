"""The engine that the pods are of: its revision, and whether they are being replaced by another's. Pure."""

from __future__ import annotations

import hashlib
import json

from sere_ext.contract.policy import canonical_json

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
    as_before = (
        live is not None and not changing(snapshot, spec) and container(applied_template(live)).get("image") == default_image
    )
    if spec.engine.image is not None or as_before:
        return spec
    return spec.model_copy(update={"engine": spec.engine.model_copy(update={"image": default_image})})


def container(template: Object) -> Object:
    """The engine's own, among those that others may have injected."""
    return next((found for found in template["spec"]["containers"] if found["name"] == "engine"), {})


def remembered(made_of: str, template: Object) -> Object:
    """Annotations of the Deployment that say what its pods are meant to be."""
    return {meta.REVISION_ANNOTATION: made_of, meta.TEMPLATE_ANNOTATION: canonical_json(template).decode()}


def applied_template(live: Object) -> Object:
    """The pod template that the operator last applied, whatever others have made of it. Unknown (an older operator's): theirs."""
    try:
        found: Object = json.loads((live["metadata"].get("annotations") or {})[meta.TEMPLATE_ANNOTATION])
    except (KeyError, ValueError):
        found = live["spec"]["template"]
    return found


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
    """A Deployment as wanted, but with the pods that it is meant to have: their number may change, their template does not."""
    template = applied_template(live)
    annotations = remembered(live["metadata"]["annotations"][meta.REVISION_ANNOTATION], template)
    return {**body, "metadata": {**body["metadata"], "annotations": annotations}, "spec": {**body["spec"], "template": template}}


def waiting(template: Object, live: Object) -> list[str]:
    """Fields of the spec, beside model and engine, in which a pod template differs from the one that is kept."""

    def parts(of: Object) -> dict[str, object]:
        pod, engine = of["spec"], container(of)
        return {
            "resources": engine.get("resources") or None,
            "slo": [variable for variable in engine.get("env") or [] if variable["name"].startswith("SERE_SLO_")],
            "volumes": [
                item for item in (*pod.get("volumes", []), *engine.get("volumeMounts", [])) if item["name"].startswith("vol-")
            ],
            **{field: pod.get(field) for field in ("nodeSelector", "tolerations", "runtimeClassName")},
        }

    now, then = parts(template), parts(applied_template(live))
    return [f"spec.{field}" for field, value in now.items() if value != then[field]]
