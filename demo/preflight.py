"""May the demo use the cluster that the user names? Asked before anything is made; a refusal is one line that says what to do.

`python -m demo.preflight` asks for the cluster of SERE_KUBECONFIG and SERE_IMAGES.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from demo import kube
from demo.kube import Object

NAMESPACE = "sere-demo"  # of everything that the demo makes there, the CustomResourceDefinitions aside
README = 'docs/quickstart.md, "On a cluster of yours"'

# What the demo does itself with kubectl and helm; "" is a right on the whole cluster. What the chart grants to the operator
# the user must hold as well, which the API server tells at `helm install`.
RIGHTS = (
    ("create", "", "namespaces", ""),
    ("delete", "", "namespaces", ""),
    ("create", "apiextensions.k8s.io", "customresourcedefinitions", ""),
    ("delete", "apiextensions.k8s.io", "customresourcedefinitions", ""),
    ("list", "apiextensions.k8s.io", "customresourcedefinitions", ""),
    ("get", "", "namespaces", ""),
    ("get", "", "nodes", ""),
    ("list", "storage.k8s.io", "storageclasses", ""),
    ("create", "apps", "deployments", NAMESPACE),
    ("create", "rbac.authorization.k8s.io", "roles", NAMESPACE),
    ("create", "", "secrets", NAMESPACE),
    ("create", "", "persistentvolumeclaims", NAMESPACE),
    ("create", "", "pods", NAMESPACE),
    ("create", "", "pods/exec", NAMESPACE),
    ("get", "", "pods/proxy", NAMESPACE),
    ("create", "", "services/proxy", NAMESPACE),
    ("create", "serving.sere.dev", "seredeployments", NAMESPACE),
)


class RefusedError(RuntimeError):
    """The demo will not run on this cluster; the message says in one line why and what to do."""


class Images(NamedTuple):
    """Where the cluster pulls the operator and the engine from."""

    prefix: str
    tag: str

    def values(self) -> tuple[str, ...]:
        """The images as values of the chart."""
        operator, engine = f"image.repository={self.prefix}/sere-operator", f"engine.image.repository={self.engine_repository}"
        return operator, f"image.tag={self.tag}", engine, f"engine.image.tag={self.tag}"

    @property
    def engine_repository(self) -> str:
        return f"{self.prefix}/sere-engine"

    @property
    def engine(self) -> str:
        return f"{self.engine_repository}:{self.tag}"


def images(given: str) -> Images:
    """`registry.example:5000/team` or, with a tag other than dev, `registry.example:5000/team:TAG`.

    Raises:
        RefusedError: it is empty, or no image name starts so.
    """
    if not given:
        raise RefusedError(f"say with --images where the cluster pulls sere-operator:dev and sere-engine:dev from ({README})")
    found = re.fullmatch(r"(?P<prefix>[a-z0-9.-]+(:\d+(?=/|$))?(/[a-z0-9._-]+)*)/?(:(?P<tag>\w[\w.-]*))?", given)
    if not found:
        raise RefusedError(f"--images takes what stands before /sere-operator:dev, such as registry.example/team, not {given!r}")
    return Images(found["prefix"], found["tag"] or "dev")


def reviews(rights: Iterable[tuple[str, str, str, str]]) -> Object:
    """One question to the API server for each right: (verb, group, resource or resource/subresource, namespace)."""
    items: list[Object] = []
    for verb, group, resource, namespace in rights:
        name, _, subresource = resource.partition("/")
        asked = {"verb": verb, "group": group, "resource": name, "subresource": subresource, "namespace": namespace}
        body: Object = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview"}
        items.append({**body, "spec": {"resourceAttributes": {key: value for key, value in asked.items() if value}}})
    return {"apiVersion": "v1", "kind": "List", "items": items}


def denied(rights: Iterable[tuple[str, str, str, str]], allowed: Iterable[str]) -> list[str]:
    """The rights that are not granted, in words, by the answers to `reviews` in their order."""
    return [f"{verb} {resource}" for (verb, _, resource, _), word in zip(rights, allowed, strict=True) if word != "true"]


def in_the_way(namespace: bool, definitions: Iterable[str], classes: Iterable[Object]) -> str | None:
    """What of the cluster's content forbids the demo, in one line, or None.

    Args:
        namespace: whether the demo's namespace is there.
        definitions: names of all CustomResourceDefinitions.
        classes: all StorageClasses.
    """
    if namespace:
        return (
            f"the cluster has a namespace {NAMESPACE}; if an earlier run left it: "
            f"helm uninstall sere -n {NAMESPACE}; kubectl delete namespace {NAMESPACE}"
        )
    ours = sorted(name for name in definitions if name.endswith(".serving.sere.dev"))
    if ours:
        return (
            "the cluster has the operator already, or had it, and it is not overwritten: take another cluster, or apply "
            f"manifests/samples to this one yourself; if no operator is left there: kubectl delete crd {' '.join(ours)}"
        )
    default = "storageclass.kubernetes.io/is-default-class"
    if not any((one["metadata"].get("annotations") or {}).get(default) == "true" for one in classes):
        return f"the cluster has no default StorageClass for the model's claim: kubectl annotate storageclass NAME {default}=true"
    return None


def check(kubeconfig: str, prefix: str) -> None:
    """Ask all questions, the cheapest first; nothing is made. From here on kubectl and helm go to this cluster.

    Raises:
        RefusedError: the first that speaks against it.
    """
    if not Path(kubeconfig).is_file():
        raise RefusedError(f"there is no kubeconfig {kubeconfig}")
    images(prefix)
    os.environ["KUBECONFIG"] = kubeconfig
    for program in ("kubectl", "helm"):
        if shutil.which(program) is None:
            raise RefusedError(f"{program} is not on PATH; a cluster of yours needs kubectl and helm here, nothing else")
    try:
        kube.kubectl("get", "--raw", "/version", "--request-timeout=10s", timeout_s=30)
    except kube.KubectlError as error:
        raise RefusedError(f"the cluster of {kubeconfig} does not answer: {_words(error)}") from None
    try:
        ask = ("create", "-f", "-", "-o", 'jsonpath={.status.allowed}{"\\n"}')  # each answer is printed by itself
        if missing := denied(RIGHTS, kube.kubectl(*ask, stdin=json.dumps(reviews(RIGHTS)), timeout_s=60).split()):
            raise RefusedError(f"the user of {kubeconfig} may not: {', '.join(missing)}")
        namespace = kube.kubectl("get", "namespace", NAMESPACE, "--ignore-not-found", "-o", "name")
        definitions = [line.split("/")[-1] for line in kube.kubectl("get", "crd", "-o", "name").split()]
        classes = json.loads(kube.kubectl("get", "storageclass", "-o", "json"))["items"]
    except kube.KubectlError as error:
        raise RefusedError(f"the cluster of {kubeconfig} refuses: {_words(error)}") from None
    if why := in_the_way(bool(namespace), definitions, classes):
        raise RefusedError(why)


def _words(error: kube.KubectlError) -> str:
    """kubectl's last line, without the command."""
    return str(error).split(": ", 1)[-1].splitlines()[-1]


if __name__ == "__main__":
    try:
        check(os.environ["SERE_KUBECONFIG"], os.environ.get("SERE_IMAGES", ""))
    except RefusedError as refusal:
        print(refusal)
        sys.exit(2)
