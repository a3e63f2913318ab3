"""The settings of the operator process: environment variables, which the chart sets."""

from __future__ import annotations

import math
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
    """One field per environment variable, with its effect, unit, default and the reason for that default."""

    namespaces: tuple[str, ...] = ()
    """SERE_WATCH_NAMESPACES, names with commas between them: only resources in these namespaces are looked after.

    Default: all namespaces, which needs cluster-wide rights. Namespaces are not watched themselves, so they must exist.
    """

    namespace: str = "default"
    """POD_NAMESPACE: where the Lease is. Default: the service account's own namespace, as in a pod without that variable."""

    lease_name: str = "sere-operator"
    """SERE_LEASE_NAME: of the Lease that decides which replica leads. The chart sets one per release.

    With the namespace it is also the operator's name in `status.operator`, by which two operators keep out of each other's way.
    """

    lease_s: float = 15.0
    """SERE_LEASE_S, seconds: a leader that was not heard of for so long is replaced. Default: client-go's.

    The leader ends itself after two thirds of it without a renewal, so it has stopped to write before another may begin. It
    renews every seventh part and a half: five tries, of which four may fail. Shorter means a quicker change of leader, and one
    more often for no reason on a starved node.
    """

    engine_image: str = Defaults.engine_image
    """SERE_ENGINE_IMAGE: of engine and tuner pods whose spec names no image. Another one replaces their pods."""

    pull_policy: str = Defaults.image_pull_policy
    """SERE_IMAGE_PULL_POLICY of engine and tuner pods. Default IfNotPresent: images are gigabytes."""

    engine_rollouts: int = 3
    """SERE_ENGINE_ROLLOUTS: models whose pods are replaced at a time because of the operator itself (another default image, or
    a release that makes another pod template). Default 3: loading takes minutes, and each replaces a pod at a time at least.
    """

    health_host: str | None = None
    """SERE_HEALTH_HOST: address on which /healthz, /readyz and /metrics answer. Default: every one, IPv4 and IPv6."""

    health_port: int = 8080
    """SERE_HEALTH_PORT: their TCP port; 0: any free one, which the log names."""

    workers: int = 8
    """SERE_WORKERS: resources that are worked on at a time; one that only waits for its pods does not count.

    Default 8: the work is requests to the API server, which are sent one after the other for each resource.
    """

    resync_s: float = 300.0
    """SERE_RESYNC_S, seconds: every resource is read anew from the API server at least this often; between, what the watches have
    shown is enough where nothing is to be written. Whether the watch shows what a list shows is checked five times as often.
    Default 300: a net below the watches, which find nearly all there is to find.
    """

    identity: str = ""
    """POD_NAME, else the host's name, with random digits: of this process, in the Lease. Never the same for two processes, also
    after a restart in the same pod: a process must not take the Lease of one before it for its own.
    """

    @classmethod
    def from_environment(cls) -> Settings:
        """The settings of this process.

        Raises:
            ValueError: a number that is none, with the variable's name.
        """
        env = os.environ
        return cls(
            namespaces=tuple(part.strip() for part in env.get("SERE_WATCH_NAMESPACES", "").split(",") if part.strip()),
            namespace=own_namespace(),
            lease_name=env.get("SERE_LEASE_NAME") or cls.lease_name,
            lease_s=_number("SERE_LEASE_S", cls.lease_s, 2.0),
            engine_image=env.get("SERE_ENGINE_IMAGE") or cls.engine_image,
            pull_policy=env.get("SERE_IMAGE_PULL_POLICY") or cls.pull_policy,
            engine_rollouts=int(_number("SERE_ENGINE_ROLLOUTS", cls.engine_rollouts, 1)),
            health_host=env.get("SERE_HEALTH_HOST") or None,
            health_port=int(_number("SERE_HEALTH_PORT", cls.health_port, 0)),
            workers=int(_number("SERE_WORKERS", cls.workers, 1)),
            resync_s=_number("SERE_RESYNC_S", cls.resync_s, 1.0),
            identity=f"{env.get('POD_NAME') or socket.gethostname()}_{uuid.uuid4().hex[:8]}",
        )

    @property
    def instance(self) -> str:
        """What the replicas of one release share, and no other operator of the cluster has."""
        return f"{self.namespace}/{self.lease_name}"

    @property
    def defaults(self) -> Defaults:
        return Defaults(self.engine_image, self.pull_policy)


def _number(variable: str, default: float, least: float) -> float:
    """The variable's value, or the default where it is not set or empty."""
    text = os.environ.get(variable) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value < math.inf:
        raise ValueError(f"{variable} is {text!r}; give a number of {least:g} or more")
    return value
