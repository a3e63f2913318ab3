"""Does a live object still say what we want? Pure comparison, so that a quiet minute writes nothing.

Three questions, since server-side apply alone answers only the second:
1. Did what we want change since we last applied it (an env variable was taken away)? A hash in an annotation tells.
2. Is each field that we set as we set it? Fields that we do not set (defaults, other people's) do not count.
3. Is there something in the pod template or the policy ConfigMap that must not be there? Applying leaves foreign
   containers, env and data keys in place; `without_foreign` gives the object to put in its stead.

Fields are named by paths such as `spec.template.spec.containers[engine].image`.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Collection, Iterator
from decimal import Decimal
from typing import Any

from sere_ext.contract.record import canonical_json
from sere_operator.api.meta import CONFIG_HASH_ANNOTATION

Object = dict[str, Any]

# List items are matched by these keys, as the API server merges them (x-kubernetes-list-map-keys).
_ITEM_KEYS = ("mountPath", "containerPort", "port", "uid", "name", "ip", "type")
# Foreign parts of a pod template that are somebody's legitimate business.
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


def difference(wanted: Any, live: Any) -> str | None:
    """The first of `differences`, or None."""
    return next(differences(wanted, live), None)


def differences(wanted: Any, live: Any, path: str = "") -> Iterator[str]:
    """Paths of the fields that are set in `wanted` and are not so in `live`."""
    if isinstance(wanted, dict):
        if not isinstance(live, dict):
            if wanted or live is not None:
                yield path
            return
        for key, value in wanted.items():
            yield from differences(value, live.get(key), f"{path}.{key}" if path else key)
    elif isinstance(wanted, list):
        key = _item_key(wanted)
        if key is None:
            if wanted != (live or []):
                yield path
            return
        by_key = {item.get(key): item for item in live or [] if isinstance(item, dict)}
        for item in wanted:
            yield from differences(item, by_key.get(item[key]), f"{path}[{item[key]}]")
    elif not _equal(wanted, live, path):
        yield path


def _equal(wanted: Any, live: Any, path: str) -> bool:
    if wanted == live:
        return True
    if (
        live is not None
        and (".resources." in path or path.endswith(("sizeLimit", "averageValue")))
        and _quantity(wanted) is not None
    ):
        return _quantity(wanted) == _quantity(live)
    return wanted in ("", 0, False) and live is None  # the API server drops zero values


def leaving(wanted: Any, live: Any, left: Collection[str], path: str = "") -> Any:
    """`wanted` with the live value of every field whose path is in `left`: what is applied then takes nothing from anybody."""
    if path in left:
        return copy.deepcopy(live)
    if isinstance(wanted, dict) and isinstance(live, dict):
        parts = {key: leaving(value, live.get(key), left, f"{path}.{key}" if path else key) for key, value in wanted.items()}
        return {key: value for key, value in parts.items() if value is not None or wanted[key] is None}
    key = _item_key(wanted) if isinstance(wanted, list) else None
    if key is not None and isinstance(live, list):
        by_key = {item.get(key): item for item in live if isinstance(item, dict)}
        items = [leaving(item, by_key.get(item[key]), left, f"{path}[{item[key]}]") for item in wanted]
        return [item for item in items if item is not None]
    return wanted


def drift(wanted: Object, live: Object | None) -> str | None:
    """Why `wanted` (stamped) must be applied again, as a field path, or None if the live object says it all."""
    return next(drifts(wanted, live), None)


def drifts(wanted: Object, live: Object | None) -> Iterator[str]:
    """Paths of all fields in which the live object is not as `wanted` (stamped); `missing` where there is none."""
    if live is None:
        yield "missing"
        return
    yield from differences({key: wanted[key] for key in wanted if key not in ("apiVersion", "kind")}, live)


def without_foreign(wanted: Object, live: Object, left: Collection[str] = ()) -> tuple[Object, list[str]] | None:
    """(`live` without what does not belong into it, paths of what was taken out), or None if there is nothing foreign.

    Judged are: containers, init containers, volumes, and each of our containers' env and mounts of a Deployment; data
    keys of a ConfigMap. Labels and annotations of the pod template are anybody's.

    Args:
        left: paths that stay although they are foreign.
    """
    cleaned, gone = copy.deepcopy(live), _Gone(left)
    if wanted["kind"] == "ConfigMap":
        for section in ("data", "binaryData"):
            have = cleaned.get(section) or {}
            known = wanted.get(section) or {}
            gone.paths += [f"{section}.{key}" for key in have if key not in known]
            cleaned[section] = {key: value for key, value in have.items() if key in known}
            if not cleaned[section]:
                cleaned.pop(section)
    elif wanted["kind"] == "Deployment":
        pod, ours, where = cleaned["spec"]["template"]["spec"], wanted["spec"]["template"]["spec"], "spec.template.spec"
        gone.keep(pod, ours, where, "containers", "name", _ALLOWED_CONTAINERS)
        gone.keep(pod, ours, where, "initContainers", "name", _ALLOWED_CONTAINERS)
        gone.keep(pod, ours, where, "volumes", "name")
        for container in pod["containers"]:
            mine = next((item for item in ours["containers"] if item["name"] == container["name"]), None)
            if mine is not None:
                inside = f"{where}.containers[{container['name']}]"
                gone.keep(container, mine, inside, "env", "name")
                gone.keep(container, mine, inside, "volumeMounts", "mountPath")
                if "envFrom" in container and "envFrom" not in mine and f"{inside}.envFrom" not in left:
                    container.pop("envFrom")
                    gone.paths.append(f"{inside}.envFrom")
    if not gone.paths:
        return None
    cleaned["metadata"].pop("managedFields", None)
    return cleaned, gone.paths


class _Gone:
    """Takes foreign items out of lists and remembers their paths."""

    def __init__(self, left: Collection[str]) -> None:
        self.left, self.paths = left, list[str]()

    def keep(self, live: Object, ours: Object, where: str, field: str, key: str, allowed: tuple[str, ...] = ()) -> None:
        items = live.get(field)
        if not items:
            return
        names = {item[key] for item in ours.get(field) or []} | set(allowed)
        foreign = [f"{where}.{field}[{item[key]}]" for item in items if item[key] not in names]
        self.paths += [path for path in foreign if path not in self.left]
        live[field] = [item for item in items if item[key] in names or f"{where}.{field}[{item[key]}]" in self.left]
        if not live[field]:
            live.pop(field)
