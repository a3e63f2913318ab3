"""What the operator process is told: environment variables, which the chart sets."""

from __future__ import annotations

import os
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path

from sere_operator.plan.objects.children import Defaults

_NAMESPACE_FILE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


def own_namespace() -> str:
    """The operator's namespace: POD_NAMESPACE, else the service account's, else `default`."""
    given = os.environ.get("POD_NAMESPACE")
    if given:
        return given
    try:
        return _NAMESPACE_FILE.read_text().strip()
    except OSError:
        return "default"


@dataclass(frozen=True)
class Settings:
    """
    namespaces   SERE_WATCH_NAMESPACES, comma-separated; empty: all, which needs cluster-wide rights
    namespace    where the Lease is (POD_NAMESPACE)
    lease_name   SERE_LEASE_NAME
    engine_image SERE_ENGINE_IMAGE, for SereDeployments that name none
    pull_policy  SERE_IMAGE_PULL_POLICY of engine and tuner pods
    health_port  SERE_HEALTH_PORT: /healthz, /readyz, /metrics on all addresses; 0: any free one
    health_host  SERE_HEALTH_HOST
    workers      SERE_WORKERS: resources worked on at a time
    resync_s     SERE_RESYNC_S: every resource is looked at at least this often, and the watch's age is checked
    """

    namespaces: tuple[str, ...] = ()
    namespace: str = "default"
    lease_name: str = "sere-operator"
    lease_s: float = 15.0
    engine_image: str = Defaults.engine_image
    pull_policy: str = Defaults.image_pull_policy
    health_host: str | None = None
    health_port: int = 8080
    workers: int = 8
    resync_s: float = 300.0
    identity: str = ""

    @classmethod
    def from_environment(cls) -> Settings:
        env = os.environ
        return cls(
            namespaces=tuple(part.strip() for part in env.get("SERE_WATCH_NAMESPACES", "").split(",") if part.strip()),
            namespace=own_namespace(),
            lease_name=env.get("SERE_LEASE_NAME", cls.lease_name),
            lease_s=float(env.get("SERE_LEASE_S", cls.lease_s)),
            engine_image=env.get("SERE_ENGINE_IMAGE") or cls.engine_image,
            pull_policy=env.get("SERE_IMAGE_PULL_POLICY") or cls.pull_policy,
            health_host=env.get("SERE_HEALTH_HOST") or None,
            health_port=int(env.get("SERE_HEALTH_PORT", cls.health_port)),
            workers=int(env.get("SERE_WORKERS", cls.workers)),
            resync_s=float(env.get("SERE_RESYNC_S", cls.resync_s)),
            identity=f"{env.get('POD_NAME') or socket.gethostname()}_{uuid.uuid4().hex[:8]}",
        )

    @property
    def instance(self) -> str:
        """What the replicas of one release share, and no other operator of the cluster has."""
        return f"{self.namespace}/{self.lease_name}"

    @property
    def defaults(self) -> Defaults:
        return Defaults(self.engine_image, self.pull_policy)
