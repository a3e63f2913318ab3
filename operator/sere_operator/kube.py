"""The one way to the API server, for the operator and for `kubectl sere`: dicts in and out, no discovery.

Kinds are a fixed table, so a start costs no discovery requests, and the rights that are needed can be read off `KINDS`. Calls
are synchronous, since the official client's asynchronous form is marked experimental; `runtime.client` runs them in threads.
"""

from __future__ import annotations

import json
import ssl
from dataclasses import dataclass
from typing import Any

from kubernetes import client as kube
from kubernetes import config as kube_config
from kubernetes.client.rest import ApiException
from kubernetes.dynamic import DynamicClient
from urllib3.exceptions import HTTPError
from urllib3.exceptions import TimeoutError as TimeoutException

from sere_ext.contract.errors import ApiError, UsageError
from sere_operator.api import meta

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


_SERE = f"apis/{meta.API_VERSION}"
_RBAC = "apis/rbac.authorization.k8s.io/v1"
KINDS = {
    kind.kind: kind
    for kind in (
        Kind(_SERE, meta.DEPLOYMENTS, meta.DEPLOYMENT_KIND),
        Kind(_SERE, meta.TUNING_JOBS, meta.TUNING_JOB_KIND),
        Kind(_SERE, meta.PROFILES, meta.PROFILE_KIND),
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


def refused(what: str, error: ApiException) -> ApiError:
    """The API server's refusal of a request, with the server's own sentence."""
    try:
        answer = json.loads(error.body or "{}")
    except (ValueError, TypeError):
        answer = {}
    known = isinstance(answer, dict) and answer.get("kind") == "Status"
    words = str((answer.get("message") if known else None) or error.reason)
    return ApiError(what, int(error.status or 0), words, known=known)


def no_answer(error: BaseException) -> str:
    """Why there was no answer, in the operating system's words: urllib3 wraps them in the names of its classes and the URL."""
    causes = [error]
    while (cause := getattr(causes[-1], "reason", None) or causes[-1].__cause__ or causes[-1].__context__) is not None:
        if not isinstance(cause, BaseException) or cause in causes:
            break
        causes.append(cause)
    for cause in reversed(causes):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate is not trusted ({cause.verify_message})"
        if isinstance(cause, TimeoutError | TimeoutException):
            return "it took too long"
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror
    return (str(causes[-1]).strip().splitlines() or [type(causes[-1]).__name__])[0]


def in_cluster_or_kubeconfig() -> kube.Configuration:
    """From the pod's service account, else from KUBECONFIG."""
    settings = kube.Configuration()
    try:
        kube_config.load_incluster_config(client_configuration=settings)
    except kube_config.ConfigException:
        try:
            kube_config.load_kube_config(client_configuration=settings)
        except kube_config.ConfigException as error:
            raise UsageError(
                f"no cluster is named: this is no pod of one, and there is no usable kubeconfig ({error}); set KUBECONFIG"
            ) from error
    settings.connection_pool_maxsize = 32
    return settings


class Api:
    """Reads and writes of one cluster. Every method may be called from several threads at once.

    Raises:
        ApiError: by every method.

    Args:
        settings: how to reach and to whom to be known.
        manager: field manager of every write.
        timeout_s: of one request.
    """

    def __init__(self, settings: kube.Configuration, manager: str, timeout_s: float = 20.0) -> None:
        self.host, self.manager, self._timeout_s = settings.host, manager, timeout_s
        # Kinds are known: the discoverer would cost requests and a cache file on a read-only disk.
        self._dynamic = DynamicClient(kube.ApiClient(settings), discoverer=lambda *_: None)

    def call(self, what: str, method: str, path: str, body: Object | None = None, **params: Any) -> Object:
        """One request; the decoded answer. `what` completes "cannot ..." in the error."""
        params.setdefault("_request_timeout", self._timeout_s)
        try:
            return dict(json.loads(self._dynamic.request(method, path, body=body, serialize=False, **params).data))
        except ApiException as error:
            raise refused(what, error) from error
        except (HTTPError, OSError) as error:
            raise ApiError(what, 0, f"the API server at {self.host} does not answer: {no_answer(error)}") from error
        except ValueError as error:
            raise ApiError(what, 0, f"the API server at {self.host} answers no JSON when asked to {what}") from error

    def get(self, kind: str, namespace: str, name: str) -> Object | None:
        """The object, or None where there is none."""
        try:
            return self.call(f"read {kind} {name}", "get", KINDS[kind].path(namespace, name))
        except ApiError as error:
            if error.status == 404 and error.known:
                return None
            if error.status == 404:
                raise _unknown(kind) from error
            raise

    def list(self, kind: str, namespace: str | None, selector: str = "", fields: str = "") -> list[Object]:
        """All objects of a kind in a namespace (None: in all) by label and field selector; apiVersion and kind filled in."""
        spec = KINDS[kind]
        try:
            path = spec.path(namespace)
            answer = self.call(f"list {kind}", "get", path, label_selector=selector or None, field_selector=fields or None)
        except ApiError as error:
            raise (_unknown(kind) if error.status == 404 else error) from error
        return [{"apiVersion": spec.api_version, "kind": kind, **item} for item in answer.get("items", [])]

    def apply(self, body: Object, *, subresource: str | None = None, manager: str | None = None) -> Object:
        """Server-side apply, taking fields that others set (foreign changes are healed)."""
        metadata = body["metadata"]
        return self.call(
            f"apply {body['kind']} {metadata['name']}", "patch",
            KINDS[body["kind"]].path(metadata.get("namespace"), metadata["name"], subresource), body,
            content_type="application/apply-patch+yaml", field_manager=manager or self.manager, force_conflicts=True,
        )  # fmt: skip

    def patch(self, kind: str, namespace: str, name: str, body: Object, *, subresource: str | None = None) -> Object:
        """JSON merge patch: None removes a key. A metadata.resourceVersion or uid in it guards against a newer object."""
        return self.call(
            f"change {kind} {name}", "patch", KINDS[kind].path(namespace, name, subresource), body,
            content_type="application/merge-patch+json", field_manager=self.manager,
        )  # fmt: skip

    def replace(self, body: Object) -> Object:
        """PUT with the resourceVersion that `body` carries: 409 if somebody was quicker."""
        metadata = body["metadata"]
        path = KINDS[body["kind"]].path(metadata.get("namespace"), metadata["name"])
        return self.call(f"replace {body['kind']} {metadata['name']}", "put", path, body, field_manager=self.manager)

    def create(self, body: Object) -> Object:
        path = KINDS[body["kind"]].path(body["metadata"].get("namespace"))
        return self.call(f"create {body['kind']}", "post", path, body, field_manager=self.manager)

    def delete(self, kind: str, namespace: str, name: str, uid: str | None = None) -> None:
        """Delete in the background, only the object with this uid; one that is gone is fine."""
        options: Object = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        if uid:
            options["preconditions"] = {"uid": uid}
        try:
            self.call(f"delete {kind} {name}", "delete", KINDS[kind].path(namespace, name), options)
        except ApiError as error:
            if error.status not in (404, 409):
                raise


def _unknown(kind: str) -> ApiError:
    return ApiError("", 0, f"this cluster knows no {kind}; install the chart, or apply manifests/crd")
