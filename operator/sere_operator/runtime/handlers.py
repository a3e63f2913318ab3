"""kopf's part: watch, and wake. No handler of ours keeps state, so kopf writes nothing (no finalizer, no annotation)."""

from __future__ import annotations

from typing import Any

import kopf
import structlog
from kopf._core.intents.registries import SmartOperatorRegistry

from sere_operator.api import meta
from sere_operator.runtime.cache import Cache
from sere_operator.runtime.echoes import Echoes
from sere_operator.runtime.reconciler import Key, Reconciler
from sere_operator.runtime.switch import pulled

log = structlog.get_logger(__name__)

# Kinds whose objects are children: watched by label on the server's side.
CHILDREN = {
    "Deployment": ("apps", "v1", "deployments"),
    "Service": ("", "v1", "services"),
    "ConfigMap": ("", "v1", "configmaps"),
    "Pod": ("", "v1", "pods"),
    "PodDisruptionBudget": ("policy", "v1", "poddisruptionbudgets"),
    "Job": ("batch", "v1", "jobs"),
}


class Wakes:
    """Which resource an event is about. Remembers full names, since a label holds only 63 characters of one."""

    def __init__(self, reconciler: Reconciler, switch: Reconciler, echoes: Echoes) -> None:
        self._reconciler, self._switch, self._echoes = reconciler, switch, echoes
        self._off: set[Key] = set()  # SereDeployments whose kill switch is pulled
        self._names: dict[tuple[str, str, str], str] = {}  # kind, namespace, label value -> name
        self.api_keys: dict[Key, tuple[str, str]] = {}  # Secret and key in it, of SereDeployments whose engines ask for one
        self.seen: dict[str, tuple[str, float]] = {}  # uid -> resourceVersion that the watch showed last, generation

    def resource(self, kind: str, body: Any, gone: bool) -> None:
        """An event of a SereDeployment or SereTuningJob itself, which wakes it unless it shows the operator's own write alone."""
        name, namespace = body["metadata"]["name"], body["metadata"]["namespace"]
        self._names[kind, namespace, meta.label_value(name)] = name
        uid, generation = body["metadata"]["uid"], body["metadata"].get("generation", 0)
        if gone:
            self.seen.pop(uid, None)
            self._echoes.forget(uid)
        else:
            self.seen[uid] = (body["metadata"]["resourceVersion"], generation)
        key: Key = (kind, namespace, name)
        named = ((body.get("spec") or {}).get("engine") or {}).get("apiKeySecret")
        if named and not gone:
            self.api_keys[key] = (str(named.get("name")), str(named.get("key")))
        else:
            self.api_keys.pop(key, None)
        if kind == meta.DEPLOYMENT_KIND and not gone and pulled(body):
            self._off.add(key)
            self._switch.wake(key)
        else:
            self._off.discard(key)
        if not self._echoes.hears(body):
            self._reconciler.wake(key)
        if kind == meta.TUNING_JOB_KIND:  # its SereDeployment waits for its result
            self.child(body["metadata"].get("labels") or {}, namespace)

    def child(self, labels: Any, namespace: str) -> None:
        """An event of something that carries our labels."""
        self._wake(meta.DEPLOYMENT_KIND, namespace, labels.get(meta.DEPLOYMENT_LABEL))
        if labels.get(meta.COMPONENT_LABEL) == meta.TUNER_COMPONENT:
            self._wake(meta.TUNING_JOB_KIND, namespace, labels.get(meta.INSTANCE_LABEL))

    def profile(self, namespace: str) -> None:
        """A SereProfile came, changed or went: every SereDeployment there may want it."""
        for kind, where, label in list(self._names):
            if kind == meta.DEPLOYMENT_KIND and where == namespace:
                self._wake(kind, where, label)

    def _wake(self, kind: str, namespace: str, label: str | None) -> None:
        name = self._names.get((kind, namespace, label)) if label else None
        if name is not None:
            key: Key = (kind, namespace, name)
            if key in self._off:  # a pod came that does not know of it
                self._switch.wake(key)
            self._reconciler.wake(key)


def registry(wakes: Wakes, cache: Cache) -> kopf.OperatorRegistry:
    """All handlers: each only remembers what it was shown, and wakes."""
    handlers = SmartOperatorRegistry()  # "smart": brings kopf's own logins (service account, KUBECONFIG)
    plurals = {meta.DEPLOYMENT_KIND: meta.DEPLOYMENTS, meta.TUNING_JOB_KIND: meta.TUNING_JOBS}

    def watch_resource(kind: str, plural: str) -> None:
        @kopf.on.event(meta.GROUP, meta.VERSION, plural, id=f"wake-{plural}", registry=handlers)
        async def resource(event: Any, **_: Any) -> None:
            cache.shown(kind, event["object"], gone=event["type"] == "DELETED")
            wakes.resource(kind, event["object"], event["type"] == "DELETED")

    def watch_child(kind: str, group: str, version: str, plural: str) -> None:
        @kopf.on.event(
            group, version, plural, labels={meta.MANAGED_BY_LABEL: meta.FIELD_MANAGER}, id=f"wake-{plural}", registry=handlers
        )
        async def child(event: Any, body: Any, **_: Any) -> None:
            cache.shown(kind, event["object"], gone=event["type"] == "DELETED")
            wakes.child(body["metadata"].get("labels") or {}, body["metadata"]["namespace"])

    for kind, plural in plurals.items():
        watch_resource(kind, plural)
    for kind, (group, version, plural) in CHILDREN.items():
        watch_child(kind, group, version, plural)

    @kopf.on.event(meta.GROUP, meta.VERSION, meta.PROFILES, id="wake-profiles", registry=handlers)
    async def profile(event: Any, body: Any, **_: Any) -> None:
        cache.shown(meta.PROFILE_KIND, event["object"], gone=event["type"] == "DELETED")
        wakes.profile(body["metadata"]["namespace"])

    return handlers


def kopf_settings(namespaced: bool) -> kopf.OperatorSettings:
    """kopf's settings, each with its reason."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False  # events are posted by `enact`
    settings.peering.standalone = True  # the Lease is the lock; peering is none
    settings.scanning.disabled = namespaced  # watching namespaces and CRDs needs cluster-wide rights
    settings.process.ultimate_exiting_timeout = 10  # 600 s by default, longer than any grace period of ours
    settings.queueing.worker_limit = 32  # unbounded by default
    settings.watching.server_timeout = 600  # both ends give up now and then, so that no watch dies unseen
    settings.watching.client_timeout = 630
    settings.watching.connect_timeout = 10
    settings.networking.request_timeout = 60  # 300 by default
    settings.networking.connect_timeout = 10
    selector = f"{meta.MANAGED_BY_LABEL}={meta.FIELD_MANAGER}"
    for group, version, plural in CHILDREN.values():
        settings.watching.label_selectors[group, version, plural] = selector  # else filtered only after the download
    return settings
