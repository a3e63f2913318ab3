"""What `kubectl sere` needs of a cluster: one namespace of it, by `kube.Api`. Errors are ApiError, in plain words."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from sere_ext.contract.errors import UsageError
from sere_ext.contract.names import ENGINE_PORT
from sere_ext.contract.state import EngineState
from sere_operator.api import meta
from sere_operator.kube import KINDS, Api, Object

TIMEOUT_S = 15.0  # of one call to the API server
POD_TIMEOUT_S = 3.0  # of one call to a pod through it


@dataclass(frozen=True)
class Cluster:
    """One namespace of one cluster. Every call may raise `kube.ApiError`."""

    api: Api
    namespace: str

    @classmethod
    def connect(cls, namespace: str | None, context: str | None) -> Cluster:
        """By the kubeconfig, in its context's namespace where none is given.

        Raises:
            UsageError: there is no kubeconfig, or no such context in it.
        """
        from kubernetes import client, config

        settings = client.Configuration()
        try:
            config.load_kube_config(context=context, client_configuration=settings)
            contexts, active = config.list_kube_config_contexts()
        except config.ConfigException as error:
            named = os.environ.get("KUBECONFIG")
            where = f"KUBECONFIG names {named}" if named else "KUBECONFIG is not set, and ~/.kube/config was tried"
            raise UsageError(
                f"no usable kubeconfig: {str(error).rstrip('.')}; {where}; set KUBECONFIG, or take a --context of that file"
            ) from error
        chosen: Any = active if context is None else next((one for one in contexts if one["name"] == context), {})
        settings.retries = 1
        api = Api(settings, meta.KUBECTL_FIELD_MANAGER, TIMEOUT_S)
        return cls(api, namespace or (chosen.get("context") or {}).get("namespace") or "default")

    def get(self, kind: str, name: str) -> Object | None:
        """The object, or None where there is none."""
        return self.api.get(kind, self.namespace, name)

    def merge(self, kind: str, name: str, patch: Object) -> None:
        """JSON merge patch: None removes a key."""
        self.api.patch(kind, self.namespace, name, patch)

    def annotate(self, kind: str, name: str, **annotations: str | None) -> None:
        """Set annotations of our own group (None: remove)."""
        patch = {"metadata": {"annotations": {f"{meta.GROUP}/{key}": value for key, value in annotations.items()}}}
        self.merge(kind, name, patch)

    def pod_state(self, pod: str) -> EngineState:
        """GET /sere of one pod, through the API server (needs the right to pods/proxy)."""
        path = KINDS["Pod"].path(self.namespace, f"{pod}:{ENGINE_PORT}", "proxy/sere")
        return EngineState.parse(self.api.call(f"ask pod {pod}", "get", path, _request_timeout=POD_TIMEOUT_S))

    def deployments(self) -> list[Object]:
        return self.api.list(meta.DEPLOYMENT_KIND, self.namespace)

    def deployment(self, name: str) -> Object:
        found = self.get(meta.DEPLOYMENT_KIND, name)
        if found is None:
            raise UsageError(f"no SereDeployment {name} in namespace {self.namespace}; `kubectl get sere -A` lists all")
        return found

    def pods(self, name: str) -> list[Object]:
        """Engine pods that are not on their way out."""
        found = self.api.list("Pod", self.namespace, meta.engine_selector(name))
        return [pod for pod in found if not pod["metadata"].get("deletionTimestamp")]

    def policies(self, name: str) -> Object | None:
        return self.get("ConfigMap", meta.policy_config_map(name))
