"""What `kubectl sere` needs of a cluster: a few calls over the official dynamic client, with errors in plain words."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from sere_ext.contract.errors import SereError, UsageError

from sere_operator.api import meta
from sere_operator.cli.explain import Object

ENGINE_PORT = 8000
TIMEOUT_S = 15.0  # of one call to the API server
POD_TIMEOUT_S = 3.0  # of one call to a pod through it


class ClusterError(SereError):
    """The API server could not be reached, or refused. The message is its own, with what to do."""


@dataclass(frozen=True)
class Cluster:
    """One namespace of one cluster, by the official dynamic client. Every call raises ClusterError in plain words."""

    client: Any
    namespace: str

    @classmethod
    def connect(cls, namespace: str | None, context: str | None) -> Cluster:
        from kubernetes import client, config
        from kubernetes.dynamic import DynamicClient

        configuration = client.Configuration()
        try:
            config.load_kube_config(context=context, client_configuration=configuration)
            _, active = config.list_kube_config_contexts()
            default = ((active if context is None else _context(config, context)).get("context") or {}).get("namespace")
        except config.ConfigException as error:
            raise UsageError(f"no usable kubeconfig: {str(error).rstrip('.')}; set KUBECONFIG or --context") from error
        configuration.retries = 1
        try:
            dynamic = DynamicClient(client.ApiClient(configuration=configuration))
        except Exception as error:  # discovery: any of urllib3's or the client's
            raise ClusterError(f"the API server at {configuration.host} does not answer: {_words(error)}") from error
        return cls(dynamic, namespace or default or "default")

    def get(self, api_version: str, kind: str, name: str) -> Object | None:
        """The object, or None where there is none."""
        try:
            return dict(
                self._resource(api_version, kind).get(name=name, namespace=self.namespace, _request_timeout=TIMEOUT_S).to_dict()
            )
        except Exception as error:
            if getattr(error, "status", None) == 404:
                return None
            raise ClusterError(f"cannot read {kind} {name}: {_words(error)}") from error

    def objects(self, api_version: str, kind: str, selector: str = "") -> list[Object]:
        try:
            found = self._resource(api_version, kind).get(
                namespace=self.namespace, label_selector=selector, _request_timeout=TIMEOUT_S
            )
        except Exception as error:
            raise ClusterError(f"cannot list {kind}: {_words(error)}") from error
        return list(found.to_dict().get("items") or [])

    def merge(self, api_version: str, kind: str, name: str, patch: Object) -> None:
        """JSON merge patch: None removes a key."""
        try:
            self._resource(api_version, kind).patch(
                name=name, namespace=self.namespace, body=patch,
                content_type="application/merge-patch+json", field_manager=meta.KUBECTL_FIELD_MANAGER, _request_timeout=TIMEOUT_S,
            )  # fmt: skip
        except Exception as error:
            raise ClusterError(f"cannot change {kind} {name}: {_words(error)}") from error

    def annotate(self, api_version: str, kind: str, name: str, **annotations: str | None) -> None:
        patch = {"metadata": {"annotations": {f"{meta.GROUP}/{key}": value for key, value in annotations.items()}}}
        self.merge(api_version, kind, name, patch)

    def pod_state(self, pod: str) -> Object:
        """GET /sere of one pod, through the API server (needs the right to pods/proxy)."""
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod}:{ENGINE_PORT}/proxy/sere"
        try:
            return dict(json.loads(self.client.request("GET", path, serialize=False, _request_timeout=POD_TIMEOUT_S).data))
        except Exception as error:
            raise ClusterError(f"cannot ask pod {pod}: {_words(error)}") from error

    def deployment(self, name: str) -> Object:
        found = self.get(meta.API_VERSION, meta.DEPLOYMENT_KIND, name)
        if found is None:
            raise UsageError(f"no SereDeployment {name} in namespace {self.namespace}; `kubectl get sere -A` lists all")
        return found

    def pods(self, name: str) -> list[Object]:
        """Engine pods that are not on their way out."""
        found = self.objects("v1", "Pod", meta.engine_selector(name))
        return [pod for pod in found if not pod["metadata"].get("deletionTimestamp")]

    def policies(self, name: str) -> Object | None:
        return self.get("v1", "ConfigMap", meta.policy_config_map(name))

    def _resource(self, api_version: str, kind: str) -> Any:
        from kubernetes.dynamic.exceptions import ResourceNotFoundError

        try:
            return self.client.resources.get(api_version=api_version, kind=kind)
        except ResourceNotFoundError as error:
            raise UsageError(f"this cluster knows no {kind}; install the chart, or apply manifests/crd") from error


def _context(config: Any, name: str) -> Object:
    contexts, _ = config.list_kube_config_contexts()
    return next((dict(context) for context in contexts if context["name"] == name), {})


def _words(error: Exception) -> str:
    """The API server's own message, else the exception's first line."""
    body = getattr(error, "body", None)
    if body:
        try:
            return str(json.loads(body)["message"])
        except (ValueError, KeyError, TypeError):
            pass
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
