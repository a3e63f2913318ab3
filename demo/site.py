"""Where the demo's second stage and the cluster tests run: the cluster that tests/kit/one-node makes, or one of the user's.

SERE_KUBECONFIG and SERE_IMAGES name the user's (`make demo ARGS="--kubeconfig FILE --images PREFIX"` sets them).
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Protocol

from demo.kube import Object
from demo.one_node import OneNode
from demo.user_cluster import UserCluster


class Site(Protocol):
    """A cluster with the operator, and how pods in it are given data and reached from here."""

    namespace: str  # of everything that is served
    system: str  # of the operator
    flags: tuple[str, ...]  # what a person adds to kubectl to look at `namespace`

    def install(self) -> None:
        """`helm install` of the chart, until the operator's pod is ready."""

    def prepare(self, claims: dict[str, Path]) -> None:
        """The namespace, with a claim for each folder that holds what lies in the folder."""

    def spec(self, spec: Object) -> Object:
        """A SereDeployment's spec with what this cluster needs for a small engine."""

    def pod(self, pod: Object) -> str:
        """The URL of an engine pod as reached from here, without a path."""

    def service(self, name: str) -> str:
        """The URL of a Service as reached from here, without a path."""

    def remove(self) -> None:
        """Remove everything that `install` and `prepare` have made, also where they stopped halfway."""


@functools.cache
def current() -> Site:
    """The cluster that the environment names. Nothing is asked of it yet."""
    if kubeconfig := os.environ.get("SERE_KUBECONFIG"):
        return UserCluster(kubeconfig, os.environ.get("SERE_IMAGES", ""))
    return OneNode()
