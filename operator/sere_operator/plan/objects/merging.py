"""Merging `podTemplate` into a pod template, as server-side apply merges what two appliers set. Pure."""

from __future__ import annotations

import copy
from typing import Any

from sere_operator.api.pod_template import PodTemplate

Object = dict[str, Any]

# Lists whose items are merged by these keys (x-kubernetes-list-map-keys of the pod's schema). Any other list is replaced whole.
_KEYS = {
    "containers": ("name",),
    "initContainers": ("name",),
    "volumes": ("name",),
    "env": ("name",),
    "imagePullSecrets": ("name",),
    "resourceClaims": ("name",),
    "claims": ("name",),
    "schedulingGates": ("name",),
    "hostAliases": ("ip",),
    "volumeMounts": ("mountPath",),
    "volumeDevices": ("devicePath",),
    "ports": ("containerPort", "protocol"),
    "topologySpreadConstraints": ("topologyKey", "whenUnsatisfiable"),
}


def with_template(template: Object, given: PodTemplate | None) -> Object:
    """The operator's pod template with what the user gives merged into it; a given value of null takes a field out."""
    if given is None:
        return template
    metadata = given.metadata.to_json_dict() if given.metadata is not None else {}
    merged: Object = _merged(
        {"metadata": template["metadata"], "spec": template["spec"]}, {"metadata": metadata, "spec": given.spec or {}}
    )
    return {**template, **merged}


def _merged(ours: Any, theirs: Any, field: str = "") -> Any:
    if isinstance(ours, dict) and isinstance(theirs, dict):
        merged = dict(ours)
        for key, value in theirs.items():
            if value is None:
                merged.pop(key, None)
            else:
                merged[key] = _merged(ours.get(key), value, key)
        return merged
    if isinstance(ours, list) and isinstance(theirs, list) and field in _KEYS:
        return _merged_items(ours, theirs, _KEYS[field])
    return copy.deepcopy(theirs)


def _merged_items(ours: list[Any], theirs: list[Any], keys: tuple[str, ...]) -> list[Any]:
    """Items of the same keys are merged in place, others follow."""

    def key_of(item: Any) -> tuple[Any, ...]:
        return tuple(item.get(key) for key in keys) if isinstance(item, dict) else (item,)

    merged = {key_of(item): item for item in ours}
    for item in theirs:
        merged[key_of(item)] = _merged(merged.get(key_of(item)), item)
    return list(merged.values())
