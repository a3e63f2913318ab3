"""`podTemplate`: whatever else a pod is to have, merged into the operator's own template; what the operator needs is refused."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from sere_ext.contract.record import Record
from sere_operator.api.common import MANAGED_PREFIXES, MANAGED_VARIABLE, MANAGED_VARIABLES
from sere_operator.api.meta import GROUP

CONTAINERS = ("engine", "tuner")  # names of the operator's own containers
# Fields that the operator sets, and where they are set instead.
_POD_FIELDS = {
    "restartPolicy": "the operator itself",
    "terminationGracePeriodSeconds": "spec.engine.shutdown.graceSeconds",
    "ephemeralContainers": "kubectl debug alone",
}
_CONTAINER_FIELDS = {
    "image": "spec.engine.image",
    "command": "the operator itself",
    "args": "spec.engine and spec.engine.extraArgs",
    "ports": "the operator itself",
    "readinessProbe": "the operator itself, which must know when a policy is applied",
    "lifecycle": "spec.engine.shutdown.graceSeconds",
    "terminationMessagePolicy": "the operator itself, which shows a container's last words",
}
_LABELS = ("app.kubernetes.io/instance", "app.kubernetes.io/managed-by", "app.kubernetes.io/component", f"{GROUP}/")
_VOLUMES = ("policy", "tmp", "cache", "shm", "run", "tuning", "hub")
_PATHS = ("/etc/sere", "/etc/sere-tuning", "/var/lib/sere")


class PodMetadata(Record):
    """Labels and annotations of pods."""

    labels: Annotated[dict[str, str] | None, Field(max_length=64, description="beside the operator's own")] = None
    annotations: Annotated[dict[str, str] | None, Field(max_length=64, description="beside the operator's own")] = None


class PodTemplate(Record):
    """What is merged into pods as server-side apply merges: objects by key, lists by their items' names, other lists whole.

    A value of null takes a field out, such as securityContext.runAsUser where the cluster chooses it.
    """

    metadata: Annotated[PodMetadata | None, Field(description="labels and annotations")] = None
    spec: Annotated[
        dict[str, Any] | None,
        Field(
            description="any field of a pod's spec that the operator does not set itself; the operator's containers are called "
            "engine and tuner",
            json_schema_extra={"x-kubernetes-preserve-unknown-fields": True},
        ),
    ] = None

    @model_validator(mode="after")
    def _leaves_ours(self) -> Self:
        for kind in ("labels", "annotations"):
            for key in getattr(self.metadata, kind, None) or {}:
                if key.startswith(_LABELS):
                    raise ValueError(f"metadata.{kind}: {key} is set by the operator itself; remove it here")
        spec = self.spec or {}
        _refuse("spec", spec, _POD_FIELDS)
        for field in ("containers", "initContainers", "volumes"):
            items = spec.get(field) or []
            if not isinstance(items, list) or not all(
                isinstance(item, dict) and isinstance(item.get("name"), str) for item in items
            ):
                raise ValueError(f"spec.{field} must be a list of objects, each with a name")
        for volume in spec.get("volumes") or []:
            if volume["name"] in _VOLUMES or volume["name"].startswith(("pvc-", "data-", "vol-")):
                raise ValueError(f"spec.volumes: {volume['name']} is a name of the operator's own volumes; choose another")
        for container in spec.get("containers") or []:
            if container["name"] in CONTAINERS:
                _container(f"spec.containers[{container['name']}]", container)
        return self


def _refuse(where: str, given: dict[str, Any], fields: dict[str, str]) -> None:
    for field, instead in fields.items():
        if field in given:
            raise ValueError(f"{where}.{field} is set by {instead}; remove it here")


def _container(where: str, container: dict[str, Any]) -> None:
    _refuse(where, container, _CONTAINER_FIELDS)
    for variable in container.get("env") or []:
        name = str(variable.get("name") if isinstance(variable, dict) else variable)
        if name in MANAGED_VARIABLES or name.startswith(MANAGED_PREFIXES):
            raise ValueError(f"{where}.env: {name} {MANAGED_VARIABLE}")
    for mount in container.get("volumeMounts") or []:
        path = str(mount.get("mountPath") if isinstance(mount, dict) else mount).rstrip("/")
        if path in _PATHS:
            raise ValueError(f"{where}.volumeMounts: {path} is where the operator mounts its own files; choose another path")
