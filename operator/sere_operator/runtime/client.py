"""The one way to the API server: the official client's dynamic API, dicts in and out, no discovery.

Kinds are a fixed table, so a start costs no discovery requests and the rights that the operator needs can be read off
`KINDS`. Calls are synchronous (they run in threads, see `Client`), since the client's asynchronous form is marked
experimental. Every write goes by server-side apply under one field manager, but for the few that cannot.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from kubernetes import client as kube
from kubernetes import config as kube_config
from kubernetes.client.rest import ApiException
from kubernetes.dynamic import DynamicClient

FIELD_MANAGER = "sere-operator"

Object = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A kind by its REST path. `prefix` is `api/v1` or `apis/<group>/<version>`."""

    prefix: str
    plural: str
    kind: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        return self.prefix.removeprefix("apis/").removeprefix("api/")

    def path(self, namespace: str | None, name: str | None = None, subresource: str | None = None) -> str:
        parts = ["", self.prefix]
        if self.namespaced and namespace:
            parts += ["namespaces", namespace]
        parts.append(self.plural)
        parts += [part for part in (name, subresource) if part]
        return "/".join(parts)


_SERE = "apis/serving.sere.dev/v1alpha1"
_RBAC = "apis/rbac.authorization.k8s.io/v1"
KINDS = {
    kind.kind: kind
    for kind in (
        Kind(_SERE, "seredeployments", "SereDeployment"),
        Kind(_SERE, "seretuningjobs", "SereTuningJob"),
        Kind(_SERE, "sereprofiles", "SereProfile"),
        Kind("apis/apps/v1", "deployments", "Deployment"),
        Kind("api/v1", "services", "Service"),
        Kind("api/v1", "configmaps", "ConfigMap"),
        Kind("api/v1", "pods", "Pod"),
        Kind("api/v1", "events", "Event"),
        Kind("api/v1", "serviceaccounts", "ServiceAccount"),
        Kind("api/v1", "secrets", "Secret"),  # by name alone, of those that the chart's rbac.apiKeySecrets lists
        Kind("apis/policy/v1", "poddisruptionbudgets", "PodDisruptionBudget"),
        Kind("apis/autoscaling/v2", "horizontalpodautoscalers", "HorizontalPodAutoscaler"),
        Kind("apis/batch/v1", "jobs", "Job"),
        Kind(_RBAC, "roles", "Role"),
        Kind(_RBAC, "rolebindings", "RoleBinding"),
        Kind("apis/coordination.k8s.io/v1", "leases", "Lease"),
    )
}


class ApiError(Exception):
    """A request that the API server refused. `status` is the HTTP status, `reason` and `words` the server's own word and sentence."""

    def __init__(self, error: ApiException, what: str) -> None:
        self.status = int(error.status or 0)
        message = str(error.reason)
        self.reason = message
        try:
            body = json.loads(error.body or "{}")
            message = body.get("message") or message
            self.reason = body.get("reason") or self.reason
        except (ValueError, AttributeError, TypeError):
            pass
        self.words = message
        super().__init__(f"{what}: {self.status} {message}")


def connect() -> DynamicClient:
    """A client from the pod's service account, else from KUBECONFIG. Pool sized for the worker threads."""
    settings = kube.Configuration()
    try:
        kube_config.load_incluster_config(client_configuration=settings)
    except kube_config.ConfigException:
        kube_config.load_kube_config(client_configuration=settings)
    settings.connection_pool_maxsize = 32
    # Kinds are known: the discoverer would cost requests and a cache file on a read-only disk.
    return DynamicClient(kube.ApiClient(settings), discoverer=lambda *_: None)


class Client:
    """Reads and writes as dicts. Each method is a coroutine; the request runs in a small pool of threads.

    Args:
        dynamic: from `connect()`.
        threads: requests in flight at most.
        timeout_s: per request.
    """

    def __init__(self, dynamic: DynamicClient, threads: int = 16, timeout_s: float = 20.0) -> None:
        self._dynamic = dynamic
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="kube")
        self._timeout_s = timeout_s
        self.writes = 0  # successful writes since the start, for the operator's own metrics and tests

    async def _call(self, what: str, call: Callable[[], Any]) -> Object:
        def run() -> Object:
            try:
                response = call()
            except ApiException as error:
                raise ApiError(error, what) from error
            return json.loads(response.data)

        return await asyncio.get_running_loop().run_in_executor(self._pool, run)

    def _request(self, method: str, path: str, body: Object | None = None, **params: Any) -> Callable[[], Any]:
        return partial(
            self._dynamic.request, method, path, body=body, serialize=False, _request_timeout=self._timeout_s, **params
        )

    async def get(self, kind: str, namespace: str, name: str) -> Object | None:
        """The object, or None where there is none."""
        try:
            return await self._call(f"get {kind} {name}", self._request("get", KINDS[kind].path(namespace, name)))
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def list(self, kind: str, namespace: str | None, selector: str = "") -> list[Object]:
        """All objects of a kind in a namespace (None: in all) by label selector; apiVersion and kind filled in."""
        spec = KINDS[kind]
        answer = await self._call(f"list {kind}", self._request("get", spec.path(namespace), label_selector=selector or None))
        return [{"apiVersion": spec.api_version, "kind": kind, **item} for item in answer.get("items", [])]

    async def apply(self, body: Object, *, subresource: str | None = None, manager: str = FIELD_MANAGER) -> Object:
        """Server-side apply, taking fields that others set (foreign changes are healed)."""
        meta = body["metadata"]
        path = KINDS[body["kind"]].path(meta.get("namespace"), meta["name"], subresource)
        answer = await self._call(
            f"apply {body['kind']} {meta['name']}",
            self._request(
                "patch", path, body, content_type="application/apply-patch+yaml", field_manager=manager, force_conflicts=True,
            ),
        )  # fmt: skip
        self.writes += 1
        return answer

    async def patch(self, kind: str, namespace: str, name: str, body: Object, *, subresource: str | None = None) -> Object:
        """JSON merge patch: None removes a key. A metadata.resourceVersion or uid in it guards against a newer object."""
        answer = await self._call(
            f"patch {kind} {name}",
            self._request(
                "patch", KINDS[kind].path(namespace, name, subresource), body, content_type="application/merge-patch+json",
                field_manager=FIELD_MANAGER,
            ),
        )  # fmt: skip
        self.writes += 1
        return answer

    async def replace(self, body: Object) -> Object:
        """PUT with the resourceVersion that `body` carries: 409 if somebody was quicker."""
        meta = body["metadata"]
        path = KINDS[body["kind"]].path(meta.get("namespace"), meta["name"])
        answer = await self._call(
            f"replace {body['kind']} {meta['name']}",
            self._request("put", path, body, field_manager=FIELD_MANAGER),
        )
        self.writes += 1
        return answer

    async def create(self, body: Object) -> Object:
        path = KINDS[body["kind"]].path(body["metadata"].get("namespace"))
        answer = await self._call(
            f"create {body['kind']}",
            self._request("post", path, body, field_manager=FIELD_MANAGER),
        )
        self.writes += 1
        return answer

    async def delete(self, kind: str, namespace: str, name: str, uid: str | None = None) -> None:
        """Delete in the background, only the object with this uid; one that is gone is fine."""
        options: Object = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        if uid:
            options["preconditions"] = {"uid": uid}
        try:
            await self._call(
                f"delete {kind} {name}",
                self._request("delete", KINDS[kind].path(namespace, name), options),
            )
        except ApiError as error:
            if error.status not in (404, 409):
                raise
            return
        self.writes += 1
