"""Does a live object still say what we want? Pure comparison, so that a quiet minute writes nothing.

Three questions, since server-side apply alone answers only the second:
1. Did what we want change since we last applied it (an env variable was taken away)? A hash in an annotation tells.
2. Is each field that we set as we set it? Fields that we do not set (defaults, other people's) do not count.
3. Is there something in the pod template or the policy ConfigMap that must not be there? Applying leaves foreign
   containers, env and data keys in place; `without_foreign` gives the object to put in its stead.
"""

from __future__ import annotations

import copy
import hashlib
import re
from decimal import Decimal
from typing import Any

from sere_ext.contract.record import canonical_json

from sere_operator.api.meta import CONFIG_HASH_ANNOTATION

Object = dict[str, Any]

# List items are matched by these keys, as the API server merges them (x-kubernetes-list-map-keys).
_ITEM_KEYS = ("mountPath", "containerPort", "port", "uid", "name", "ip", "type")
# Foreign parts of a pod template that are somebody's legitimate business.
_ALLOWED_TEMPLATE_ANNOTATIONS = ("kubectl.kubernetes.io/restartedAt",)
_ALLOWED_CONTAINERS = ("istio-proxy", "linkerd-proxy", "vault-agent")

_QUANTITY = re.compile(r"^([0-9.]+)(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$")
_UNITS = {
    None: Decimal(1), "m": Decimal("0.001"), "k": Decimal(10**3), "M": Decimal(10**6), "G": Decimal(10**9),
    "T": Decimal(10**12), "P": Decimal(10**15), "Ki": Decimal(2**10), "Mi": Decimal(2**20), "Gi": Decimal(2**30),
    "Ti": Decimal(2**40), "Pi": Decimal(2**50),
}  # fmt: skip


def config_hash(body: Object) -> str:
    return hashlib.sha256(canonical_json(body)).hexdigest()[:16]


def stamped(body: Object) -> Object:
    """`body` with the annotation that says what was applied."""
    body = copy.deepcopy(body)
    digest = config_hash(body)
    body["metadata"].setdefault("annotations", {})[CONFIG_HASH_ANNOTATION] = digest
    return body


def _quantity(value: Any) -> Decimal | None:
    match = _QUANTITY.match(str(value))
    try:
        return Decimal(match[1]) * _UNITS[match[2]] if match else None
    except ArithmeticError:
        return None


def _item_key(items: list[Any]) -> str | None:
    for key in _ITEM_KEYS:
        if items and all(isinstance(item, dict) and key in item for item in items):
            return key
    return None


def difference(wanted: Any, live: Any, path: str = "") -> str | None:
    """Path of the first field that is set in `wanted` and is not so in `live`, or None."""
    if isinstance(wanted, dict):
        if not isinstance(live, dict):
            return None if not wanted and live is None else path
        for key, value in wanted.items():
            where = difference(value, live.get(key), f"{path}.{key}" if path else key)
            if where:
                return where
        return None
    if isinstance(wanted, list):
        live = live or []
        key = _item_key(wanted)
        if key is None:
            return None if wanted == live else path
        by_key = {item.get(key): item for item in live if isinstance(item, dict)}
        for item in wanted:
            where = difference(item, by_key.get(item[key]), f"{path}[{item[key]}]")
            if where:
                return where
        return None
    if wanted == live:
        return None
    if (
        live is not None
        and (".resources." in path or path.endswith(("sizeLimit", "averageValue")))
        and _quantity(wanted) is not None
    ):
        return None if _quantity(wanted) == _quantity(live) else path
    return None if wanted in ("", 0, False) and live is None else path  # the API server drops zero values


def drift(wanted: Object, live: Object | None) -> str | None:
    """Why `wanted` (stamped) must be applied again, as a field path, or None if the live object says it all."""
    if live is None:
        return "missing"
    return difference({key: wanted[key] for key in wanted if key not in ("apiVersion", "kind")}, live)


def without_foreign(wanted: Object, live: Object) -> Object | None:
    """`live` without what does not belong into it, or None if there is nothing foreign.

    Judged are: containers, init containers, volumes, and each of our containers' env, mounts and template annotations
    of a Deployment; data keys of a ConfigMap.
    """
    cleaned = copy.deepcopy(live)
    if wanted["kind"] == "ConfigMap":
        for section in ("data", "binaryData"):
            have = cleaned.get(section) or {}
            cleaned[section] = {key: value for key, value in have.items() if key in (wanted.get(section) or {})}
            if not cleaned[section]:
                cleaned.pop(section)
        return _if_changed(cleaned, live, ("data", "binaryData"))
    if wanted["kind"] != "Deployment":
        return None
    pod, ours = cleaned["spec"]["template"]["spec"], wanted["spec"]["template"]["spec"]
    _keep(pod, ours, "containers", "name", _ALLOWED_CONTAINERS)
    _keep(pod, ours, "initContainers", "name", _ALLOWED_CONTAINERS)
    _keep(pod, ours, "volumes", "name")
    for container in pod["containers"]:
        mine = next((item for item in ours["containers"] if item["name"] == container["name"]), None)
        if mine is not None:
            _keep(container, mine, "env", "name")
            _keep(container, mine, "volumeMounts", "mountPath")
            if "envFrom" in container:
                container.pop("envFrom")
    meta = cleaned["spec"]["template"].get("metadata", {})
    annotations = meta.get("annotations") or {}
    kept = {key: value for key, value in annotations.items() if key in _ALLOWED_TEMPLATE_ANNOTATIONS}
    if kept != annotations:
        meta["annotations"] = kept
    return _if_changed(cleaned, live, ("spec",))


def _keep(live: Object, ours: Object, field: str, key: str, allowed: tuple[str, ...] = ()) -> None:
    items = live.get(field)
    if not items:
        return
    names = {item[key] for item in ours.get(field) or []} | set(allowed)
    live[field] = [item for item in items if item[key] in names]
    if not live[field]:
        live.pop(field)


def _if_changed(cleaned: Object, live: Object, sections: tuple[str, ...]) -> Object | None:
    if all(cleaned.get(section) == live.get(section) for section in sections):
        return None
    cleaned["metadata"].pop("managedFields", None)
    return cleaned
