"""The pod template of engine and tuner pods: what both share, and how data reaches them. Pure dict builders.

Pods pass the restricted Pod Security profile: non-root, RuntimeDefault seccomp, no capabilities, no privilege
escalation, a read-only root with emptyDirs where something must be written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from sere_operator.api import meta
from sere_operator.api.common import EnvVar, KeyRef, Model, Resources, Source, Toleration, VolumeMount, parse_pvc

Object = dict[str, Any]

USER_ID = 10001  # of the images; numeric, or the kubelet cannot tell that it is not root
PVC_ROOT = "/mnt/pvc"
DATA_ROOT = "/etc/sere-data"
CACHE = "/var/cache/sere"
API_KEY_VARIABLE = "VLLM_API_KEY"
POLICY_DIR = "/etc/sere"
SHM_LIMIT = "2Gi"  # tensor-parallel workers talk through /dev/shm, where the runtime gives 64 MiB

CONTAINER_SECURITY: Object = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "runAsNonRoot": True,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}
POD_SECURITY: Object = {
    "runAsNonRoot": True,
    "runAsUser": USER_ID,
    "runAsGroup": USER_ID,
    "fsGroup": USER_ID,
    "fsGroupChangePolicy": "OnRootMismatch",
    "seccompProfile": {"type": "RuntimeDefault"},
}


def volume_name(prefix: str, name: str) -> str:
    """The name in a pod of the volume of a claim or ConfigMap. Volumes' names have no dots and at most 63 characters, so a
    hash tells apart those of `a.b` and `a-b`.
    """
    plain = f"{prefix}-{name}"
    if "." not in plain and len(plain) <= meta.MAX_NAME:
        return plain
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{plain.replace('.', '-')[: meta.MAX_NAME - 9].rstrip('-')}-{digest}"


@dataclass
class Storage:
    """Volumes and mounts of a pod, each claim and ConfigMap once, in the order in which they were asked for."""

    volumes: list[Object] = field(default_factory=list)
    mounts: list[Object] = field(default_factory=list)

    def _add(self, volume: Object, mount: Object) -> None:
        if all(known["name"] != volume["name"] for known in self.volumes):
            self.volumes.append(volume)
        if all(known["mountPath"] != mount["mountPath"] for known in self.mounts):
            self.mounts.append(mount)

    def empty(self, name: str, path: str, *, memory: bool = False, limit: str | None = None) -> None:
        source: Object = {"medium": "Memory"} if memory else {}
        if limit:
            source["sizeLimit"] = limit
        self._add({"name": name, "emptyDir": source}, {"name": name, "mountPath": path})

    def claim(
        self, claim: str, path: str | None = None, *, name: str | None = None, read_only: bool = True, sub_path: str | None = None
    ) -> str:
        """Mount a claim or a folder of it, by default read-only at /mnt/pvc/<claim>; returns the path of the mount."""
        path = path or f"{PVC_ROOT}/{claim}"
        name = name or volume_name("pvc", claim)
        source: Object = {"claimName": claim}
        mount: Object = {"name": name, "mountPath": path}
        if read_only:
            source["readOnly"] = mount["readOnly"] = True
        if sub_path:
            mount["subPath"] = sub_path
        self._add({"name": name, "persistentVolumeClaim": source}, mount)
        return path

    def config_map(self, ref: KeyRef) -> str:
        """Mount a ConfigMap at /etc/sere-data/<name>; returns the path of the key."""
        name = volume_name("data", ref.name)
        path = f"{DATA_ROOT}/{ref.name}"
        self._add({"name": name, "configMap": {"name": ref.name}}, {"name": name, "mountPath": path, "readOnly": True})
        return f"{path}/{ref.key}"

    def uri(self, uri: str) -> str:
        """The path at which the thing named by a pvc://, configmap:// or file:// URI is found in the pod; mounts it."""
        if uri.startswith("configmap://"):
            name, _, key = uri.removeprefix("configmap://").partition("/")
            return self.config_map(KeyRef(name=name, key=key))
        pvc = parse_pvc(uri)
        if pvc is None:
            return uri.removeprefix("file://")
        claim, path = pvc
        return f"{self.claim(claim)}/{path}".rstrip("/")

    def source(self, source: Source) -> str:
        return self.config_map(source.config_map) if source.config_map else self.uri(source.uri or "")

    def extra(self, volumes: Iterable[VolumeMount]) -> None:
        for volume in volumes:
            self.claim(volume.claim_name, volume.mount_path, name="vol-" + volume.name, sub_path=volume.sub_path)

    def scratch(self) -> None:
        """What every engine needs to write: /tmp, caches, and shared memory."""
        self.empty("tmp", "/tmp")
        self.empty("cache", CACHE)
        self.empty("shm", "/dev/shm", memory=True, limit=SHM_LIMIT)


def model_path(model: Model, storage: Storage) -> str:
    """What `sere serve` and `sere tune` are given as the model: a hub name, or a path (its claim gets mounted)."""
    if model.uri is not None:
        return storage.uri(model.uri)
    if model.cache is not None:
        storage.claim(model.cache.claim_name, f"{CACHE}/hub", name="hub", read_only=False)
    return model.name or ""


def environment(model: Model, given: Iterable[EnvVar], fixed: dict[str, str]) -> list[Object]:
    """Environment of an engine: caches on the writable volume, the hub's token, ours, then the user's (theirs win)."""
    values: dict[str, Object] = {
        key: {"name": key, "value": value}
        for key, value in {
            "HOME": CACHE,
            "USER": "sere",  # torch asks for a user name, and a numeric user has none
            "XDG_CACHE_HOME": CACHE,
            "VLLM_CACHE_ROOT": f"{CACHE}/vllm",
            "TORCHINDUCTOR_CACHE_DIR": f"{CACHE}/inductor",
            "NUMBA_CACHE_DIR": f"{CACHE}/numba",
            "VLLM_NO_USAGE_STATS": "1",
            **fixed,
        }.items()
    }
    if model.name is not None:
        values["HF_HOME"] = {"name": "HF_HOME", "value": f"{CACHE}/hub"}
    else:
        values["HF_HUB_OFFLINE"] = {"name": "HF_HUB_OFFLINE", "value": "1"}
    if model.token_secret is not None:
        values["HF_TOKEN"] = {"name": "HF_TOKEN", "valueFrom": {"secretKeyRef": model.token_secret.to_json_dict()}}
    for variable in given:
        values[variable.name] = variable.to_json_dict()
    return [{**value, **({"value": ""} if set(value) == {"name"} else {})} for value in values.values()]


def with_api_key(variables: list[Object], key: KeyRef | None) -> list[Object]:
    """With the variable by which vLLM asks clients for a key, where there is one."""
    if key is None:
        return variables
    ours = {"name": API_KEY_VARIABLE, "valueFrom": {"secretKeyRef": key.to_json_dict()}}
    return [*(variable for variable in variables if variable["name"] != API_KEY_VARIABLE), ours]


def resources(wanted: Resources | None) -> Object:
    return wanted.to_json_dict() if wanted else {}


def scheduling(node_selector: dict[str, str] | None, tolerations: Iterable[Toleration], runtime_class_name: str | None) -> Object:
    """The pod spec's fields on where it may run; only those that are given."""
    fields: Object = {}
    if node_selector:
        fields["nodeSelector"] = dict(node_selector)
    listed = [toleration.to_json_dict() for toleration in tolerations]
    if listed:
        fields["tolerations"] = listed
    if runtime_class_name:
        fields["runtimeClassName"] = runtime_class_name
    return fields
