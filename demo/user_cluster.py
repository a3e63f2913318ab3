"""A cluster that the user names: nothing of it is on this machine, and it is left as it was found.

Everything is made in one namespace; the operator watches that alone and gets no right outside it. Data goes over
`kubectl exec` into a claim of the default StorageClass. Pods and Services are reached through the API server, which picks
one of a Service's pods for each request.
"""

from __future__ import annotations

import lzma
import os
import subprocess
import tarfile
import tempfile
from pathlib import Path

from demo import kube, one_node, preflight
from demo.kube import KubectlError, Object
from demo.screen import console
from sere_ext.contract.names import ENGINE_PORT

FILLER = "fill"
UNPACK = "import sys, tarfile; tarfile.open(fileobj=sys.stdin.buffer, mode='r|xz').extractall({folder!r})"  # Debian 12's Python 3.11.2 knows no filter
PULL_S = 1800.0  # time to pull an engine's image, which has gigabytes
SEND_S = 600.0
HOSTNAME = "kubernetes.io/hostname"
# A pod that waits for one of these will not start by itself.
STUCK = {"ImagePullBackOff", "ErrImageNeverPull", "InvalidImageName", "CreateContainerConfigError"}


class UserCluster:
    """See `demo.site.Site`.

    Args:
        kubeconfig: a file; its current context is taken.
        images: what stands before /sere-operator:dev and /sere-engine:dev.
    """

    namespace = system = preflight.NAMESPACE
    flags: tuple[str, ...] = ("-n", preflight.NAMESPACE)

    def __init__(self, kubeconfig: str, images: str):
        self._kubeconfig, self._images = kubeconfig, images
        self._began = False  # true once something may have been made that must be removed
        self._node: str | None = None
        self._proxy: subprocess.Popen[str] | None = None
        self._base = ""
        # The tests' own engine image lacks torch; on a node that is this machine its pods take it from here.
        self._mounts_environment = os.environ.get("SERE_MOUNT_ENVIRONMENT") == "1"

    def install(self) -> None:
        preflight.check(self._kubeconfig, self._images)
        where = kube.kubectl("config", "view", "--minify", "-o", "jsonpath={.current-context}, {.clusters[0].cluster.server}")
        console.print(f"{where}: all goes into namespace {self.namespace} and is removed at the end", soft_wrap=True)
        self._began = True
        kube.make_namespace(self.namespace)
        alone = (f"watchNamespaces={{{self.namespace}}}", "rbac.aggregate=false", "crds.keep=false")
        kube.install_chart(self.system, *preflight.images(self._images).values(), *alone)
        selector = "app.kubernetes.io/component=operator"
        kube.wait_for("the operator's pod", lambda: all_ready(kube.items("pods", self.system, selector)), 600, every_s=1)

    def prepare(self, claims: dict[str, Path]) -> None:
        kube.apply(*(claim(name) for name in claims), namespace=self.namespace)
        if self._mounts_environment:
            one_node.claim_environment(self.namespace)
        image = preflight.images(self._images).engine
        console.print(f"Sending the model through a pod of {image}; a node's first pull of it takes a while", soft_wrap=True)
        kube.apply(filler(image, list(claims)), namespace=self.namespace)
        pod = kube.wait_for("a pod of the engine's image", self._filler, PULL_S, every_s=1)
        for name, folder in claims.items():
            send(folder, f"/mnt/{name}")
        # A claim of most StorageClasses can be mounted on one node at a time, and more than one pod reads it.
        node = kube.existing("node", pod["spec"]["nodeName"], self.namespace)
        self._node = node["metadata"].get("labels", {}).get(HOSTNAME)
        kube.kubectl("delete", "pod", FILLER, *self.flags, "--timeout=60s")

    def _filler(self) -> Object | None:
        pod = kube.existing("pod", FILLER, self.namespace)
        return pod if all_ready([pod]) else None

    def spec(self, spec: Object) -> Object:
        spec = kube.small_engine(spec)
        if self._node:
            spec = {**spec, "nodeSelector": {HOSTNAME: self._node}}
        return one_node.with_environment(spec) if self._mounts_environment else spec

    def pod(self, pod: Object) -> str:
        return f"{self._api()}/pods/{pod['metadata']['name']}:{ENGINE_PORT}/proxy"

    def service(self, name: str) -> str:
        port = kube.existing("service", name, self.namespace)["spec"]["ports"][0]["port"]
        return f"{self._api()}/services/{name}:{port}/proxy"

    def _api(self) -> str:
        """The URL of the namespace. `kubectl proxy` lends this user's rights to whoever reaches it, so it is kept narrow."""
        if self._proxy is None:
            path = f"/api/v1/namespaces/{self.namespace}"
            accept = f"--accept-paths=^{path}/(pods|services)/[^/]+/proxy/"
            self._proxy = subprocess.Popen(["kubectl", "proxy", "--port=0", accept], stdout=subprocess.PIPE, text=True)
            assert self._proxy.stdout is not None
            line = self._proxy.stdout.readline()  # Starting to serve on 127.0.0.1:PORT
            if not line:
                raise KubectlError("kubectl proxy did not start; its words are above")
            self._base = f"http://{line.split()[-1]}{path}"
        return self._base

    def remove(self) -> None:
        """Raises: KubectlError: something is left; the message says what to do."""
        if self._proxy is not None:
            self._proxy.terminate()
            self._proxy.wait()
        if not self._began:
            return
        console.print(f"Removing the operator and namespace {self.namespace}", soft_wrap=True)
        try:
            try:
                kube.helm("uninstall", "sere", *self.flags, "--wait", "--timeout=3m")
            except KubectlError as error:
                if "not found" not in str(error):
                    raise
            kube.kubectl("delete", "namespace", self.namespace, "--ignore-not-found", "--timeout=180s", timeout_s=200)
            if self._mounts_environment:
                kube.kubectl("delete", "pv", f"{self.namespace}-{one_node.ENVIRONMENT}", "--ignore-not-found")
        except BaseException as error:
            by_hand = f"helm uninstall sere -n {self.namespace}; kubectl delete namespace {self.namespace}"
            raise KubectlError(f"not all was removed ({error or type(error).__name__}); do it with: {by_hand}") from error


def send(folder: Path, target: str) -> None:
    """Put what lies in `folder` into `target` of the filler.

    Raises:
        KubectlError: not all of it arrived; the archive carries its own checksum.
    """
    with tempfile.TemporaryFile() as archive:
        # The widened model's experts repeat within the window of the lowest preset: 403 MB become 7.
        with lzma.open(archive, "wb", preset=0) as packed, tarfile.open(fileobj=packed, mode="w|") as tar:
            for child in sorted(folder.iterdir()):
                tar.add(child, arcname=child.name)
        archive.seek(0)
        command = ["kubectl", "exec", "-i", FILLER, *UserCluster.flags, "--", "python3", "-c", UNPACK.format(folder=target)]
        done = subprocess.run(command, stdin=archive, capture_output=True, text=True, check=False, timeout=SEND_S)
    if done.returncode:
        raise KubectlError(f"{folder.name} did not reach the claim: {done.stderr.strip()}")


def claim(name: str) -> Object:
    """A claim of the default StorageClass."""
    spec: Object = {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name}, "spec": spec}


def filler(image: str, claims: list[str]) -> Object:
    """A pod that waits, with each claim at /mnt/NAME. Of the engine's image and user, so that what it writes an engine can read."""
    from sere_operator.plan.objects import pods

    container: Object = {
        "name": FILLER,
        "image": image,
        "command": ["python3", "-c", f"import time; time.sleep({PULL_S})"],
        "securityContext": pods.CONTAINER_SECURITY,
        "volumeMounts": [{"name": name, "mountPath": f"/mnt/{name}"} for name in claims],
    }
    spec: Object = {
        "containers": [container],
        "securityContext": pods.POD_SECURITY,
        "automountServiceAccountToken": False,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 1,
        "volumes": [{"name": name, "persistentVolumeClaim": {"claimName": name}} for name in claims],
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": FILLER}, "spec": spec}


def all_ready(pods: list[Object]) -> bool:
    """Whether there are pods and each is ready.

    Raises:
        KubectlError: one will not start by itself, an image that cannot be pulled above all.
        AssertionError: what one waits for.
    """
    for pod in pods:
        status = pod.get("status") or {}
        for container in status.get("containerStatuses", []):
            waiting = (container.get("state") or {}).get("waiting") or {}
            if waiting.get("reason") in STUCK:
                words = waiting.get("message", waiting["reason"])
                raise KubectlError(f"pod {pod['metadata']['name']} cannot start: image {container['image']}: {words}")
        conditions = {one["type"]: one for one in status.get("conditions", [])}
        if conditions.get("Ready", {}).get("status") != "True":
            said = conditions.get("PodScheduled", {}).get("message")
            assert not said, said
            return False
    return bool(pods)
