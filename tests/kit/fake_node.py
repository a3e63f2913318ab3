"""A node that exists only in the API server, with engine pods that answer HTTP: for tests where no kubelet is.

It does what a kubelet does as far as the operator can see: gives pods addresses, makes them Ready, projects annotations
and ConfigMap into them, takes deleted ones away. One HTTP server answers for all pods, told apart by the address that a
request came to; Services' addresses lead to any ready pod. Needs the right to add addresses to the loopback device,
which tests have inside `one-node -k`. Real engines in real pods are tested in tests/cluster.
"""

from __future__ import annotations

import base64
import json
import random
import subprocess
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from kubernetes import client as kube
from kubernetes import config as kube_config
from kubernetes.dynamic import DynamicClient
from kubernetes.dynamic.exceptions import NotFoundError

from sere_ext.contract.profile import ProfileKey
from sere_ext.contract.shards import join
from sere_ext.contract.volume import desired
from tests.kit.states import engine_state

MANAGED = "app.kubernetes.io/managed-by=sere-operator"
BOUNDS_MS = (5.0, 10.0, 20.0, 50.0, 100.0, 500.0)
KEY = {
    "modelName": "fake", "modelRevision": "", "configDigest": "sha256:" + "0" * 64, "engineVersion": "0.32.0",
    "pluginVersion": "0.1.0", "device": "cpu", "tensorParallelSize": 1,
}  # fmt: skip


@dataclass
class Behaviour:
    """How a pod serves under one policy digest."""

    tpot_ms: float = 15.0
    right: bool = True  # answers of golden prompts
    words: str = "{}"  # around a right answer
    refuse: str | None = None  # the policy is not applied, with this error


@dataclass
class FakePod:
    name: str
    namespace: str
    uid: str
    address: str
    born: float
    digest: str = "exact"
    pending: tuple[str, float] | None = None  # digest and when it will be applied
    error: str | None = None
    generation: int = 0
    override: bool = False
    counts: dict[str, list[float]] = field(default_factory=dict)  # digest -> TPOTs in ms
    tokens: int = 0
    ready: bool = False
    switches: list[str] = field(default_factory=list)
    key: dict[str, Any] = field(default_factory=dict)  # the ProfileKey that it says it runs
    similarity: bytes = b""  # the artefact that it joined last


class FakeNode:
    """Use as a context manager.

    behaviours   by policy digest; others behave by `default`
    traffic      finished requests per second and pod that the histograms show
    load_s       from a pod's birth to Ready
    project_s    from a changed annotation or ConfigMap to its application
    key          the ProfileKey that pods say they run, with the model revision of their arguments
    """

    def __init__(self, kubeconfig: str, load_s: float = 0.5, project_s: float = 0.3) -> None:
        configuration = kube.Configuration()
        kube_config.load_kube_config(kubeconfig, client_configuration=configuration)
        self.kubeconfig = kubeconfig
        self.client = DynamicClient(kube.ApiClient(configuration))
        self.pods: dict[str, FakePod] = {}
        self.behaviours: dict[str, Behaviour] = {}
        self.default = Behaviour()
        self.traffic = 200.0
        self.load_s, self.project_s = load_s, project_s
        self.key: dict[str, Any] = dict(KEY)
        self.reachable = True
        self.api_key: str | None = None  # that clients of /v1 must send
        self.sick: dict[str, str] = {}  # by a prefix of pods' names: "hangs" or "drips" its answers
        self.errors: list[str] = []
        self._addresses: set[str] = set()
        self._services: dict[str, tuple[str, str]] = {}  # cluster address -> namespace, instance label
        self._stop = threading.Event()
        self._next = 10
        get = self.client.resources.get
        self._pods = get(api_version="v1", kind="Pod")
        self._nodes = get(api_version="v1", kind="Node")
        self._maps = get(api_version="v1", kind="ConfigMap")
        self._svcs = get(api_version="v1", kind="Service")

    # ---- as a context ----

    def __enter__(self) -> FakeNode:
        self._node()
        node = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None: ...

            def do_GET(self) -> None:
                node._answer(self, None)

            def do_POST(self) -> None:
                node._answer(self, json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        self._server = ThreadingHTTPServer(("0.0.0.0", 8000), Handler)
        self._threads = [
            threading.Thread(target=self._server.serve_forever, daemon=True),
            threading.Thread(target=self._loop, daemon=True),
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._server.shutdown()
        self._server.server_close()
        for thread in self._threads:
            thread.join(timeout=5)
        for address in self._addresses:
            subprocess.run(["ip", "addr", "del", f"{address}/32", "dev", "lo"], check=False, capture_output=True)
        self._nodes.delete(name="fake")

    def _node(self) -> None:
        room = {"cpu": "1000", "memory": "10000Gi", "pods": "1000", "ephemeral-storage": "1000Gi", "nvidia.com/gpu": "8"}
        body = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "fake"}}
        self._nodes.create(body=body)
        self._node_status = {"capacity": room, "allocatable": room}
        self._heartbeat()

    def _heartbeat(self) -> None:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        ready = {"type": "Ready", "status": "True", "reason": "Fake", "lastHeartbeatTime": now, "lastTransitionTime": now}
        body = {"status": {**self._node_status, "conditions": [ready]}}
        self._nodes.status.patch(name="fake", body=body, content_type="application/merge-patch+json")
        taints = {"spec": {"taints": None}}
        self._nodes.patch(name="fake", body=taints, content_type="application/merge-patch+json")

    # ---- the kubelet's part ----

    def _loop(self) -> None:
        beat = 0.0
        while not self._stop.wait(0.1):
            try:
                if time.monotonic() - beat > 10:
                    beat = time.monotonic()
                    self._heartbeat()
                self._look()
            except Exception as error:
                self.errors.append(repr(error))

    def _look(self) -> None:
        listed = self._pods.get(label_selector=MANAGED).to_dict()["items"]
        maps: dict[tuple[str, str], dict[str, str]] = {}
        alive = set()
        for pod in listed:
            meta = pod["metadata"]
            if pod.get("spec", {}).get("nodeName") != "fake":
                continue
            if meta.get("deletionTimestamp"):
                self._gone(meta)
                continue
            if meta["labels"].get("app.kubernetes.io/component") != "engine":
                continue
            alive.add(meta["uid"])
            known = self.pods.get(meta["uid"]) or self._born(pod)
            self._project(known, pod, maps)
            self._serve(known)
            ready = time.monotonic() - known.born > self.load_s
            if ready != known.ready:
                known.ready = ready
                self._report(known)
        for uid in set(self.pods) - alive:
            del self.pods[uid]
        self._services = {}
        for service in self._svcs.get(label_selector=MANAGED).to_dict()["items"]:
            address = service["spec"]["clusterIP"]
            self._address(address)
            self._services[address] = (
                service["metadata"]["namespace"],
                service["metadata"]["labels"]["app.kubernetes.io/instance"],
            )

    def _address(self, address: str) -> None:
        if address not in self._addresses:
            subprocess.run(["ip", "addr", "add", f"{address}/32", "dev", "lo"], check=True, capture_output=True)
            self._addresses.add(address)

    def _born(self, pod: dict[str, Any]) -> FakePod:
        self._next += 1
        address = f"10.244.{self._next // 250}.{self._next % 250 + 1}"
        self._address(address)
        meta = pod["metadata"]
        known = FakePod(meta["name"], meta["namespace"], meta["uid"], address, time.monotonic())
        args = pod["spec"]["containers"][0]["args"]
        known.key = {**self.key, **({"modelRevision": args[args.index("--revision") + 1]} if "--revision" in args else {})}
        self.pods[meta["uid"]] = known
        self._report(known)
        return known

    def _report(self, pod: FakePod) -> None:
        ready = str(pod.ready)
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        conditions = [
            {"type": kind, "status": status, "lastTransitionTime": now}
            for kind, status in (("Ready", ready), ("ContainersReady", ready), ("PodScheduled", "True"), ("Initialized", "True"))
        ]
        containers = [{
            "name": "engine", "ready": pod.ready, "started": pod.ready, "restartCount": 0, "image": "fake", "imageID": "fake",
            "state": {"running": {"startedAt": now}},
        }]  # fmt: skip
        body = {"status": {
            "phase": "Running", "podIP": pod.address, "podIPs": [{"ip": pod.address}], "hostIP": "127.0.0.1",
            "conditions": conditions, "containerStatuses": containers, "startTime": now,
        }}  # fmt: skip
        self._pods.status.patch(
            name=pod.name, namespace=pod.namespace, body=body, content_type="application/strategic-merge-patch+json"
        )

    def _gone(self, meta: dict[str, Any]) -> None:
        body = {"gracePeriodSeconds": 0, "preconditions": {"uid": meta["uid"]}}
        self._pods.delete(name=meta["name"], namespace=meta["namespace"], body=body)

    # ---- the plug-in's part: the policy volume ----

    def _project(self, known: FakePod, pod: dict[str, Any], maps: dict[tuple[str, str], dict[str, str]]) -> None:
        namespace, annotations = known.namespace, pod["metadata"].get("annotations") or {}
        sources = next(volume for volume in pod["spec"]["volumes"] if volume["name"] == "policy")["projected"]["sources"]
        name, *optional = (source["configMap"]["name"] for source in sources if "configMap" in source)
        if (namespace, name) not in maps:
            maps[namespace, name] = self._maps.get(name=name, namespace=namespace).to_dict().get("data") or {}
        files: dict[str, bytes | str] = dict(maps[namespace, name])
        for item in (item for source in sources for item in source.get("downwardAPI", {}).get("items", ())):
            annotation = item["fieldRef"]["fieldPath"].removeprefix("metadata.annotations['").removesuffix("']")
            files[item["path"]] = annotations.get(annotation, "")
        key = ProfileKey.model_validate(known.key)
        want = desired(files, key)
        if want.awaited:  # megabytes, which a kubelet would not read anew all the time either
            files |= self._shards(namespace, optional)
            want = desired(files, key)
        known.error = None if want.awaited else want.error
        digest = want.policy.digest if want.policy is not None else known.digest
        if want.shards and digest != known.digest:
            known.similarity = join([piece for name in want.shards if isinstance(piece := files[name], bytes)])
        refusal = self.behaviours.get(digest, self.default).refuse
        if refusal is not None:
            known.error, digest = refusal, known.digest
        if digest == known.digest:
            known.pending, known.override = None, want.override
        elif known.pending is None or known.pending[0] != digest:
            known.pending = (digest, time.monotonic() + self.project_s)
        elif time.monotonic() >= known.pending[1]:
            known.digest, known.pending, known.override = digest, None, want.override
            known.generation += 1
            known.switches.append(digest)

    def _shards(self, namespace: str, names: list[str]) -> dict[str, bytes]:
        """The files that the volume's optional ConfigMaps hold."""
        found: dict[str, bytes] = {}
        for name in names:
            try:
                held = self._maps.get(name=name, namespace=namespace).to_dict().get("binaryData") or {}
            except NotFoundError:
                continue
            found |= {file: base64.b64decode(text) for file, text in held.items()}
        return found

    def _serve(self, pod: FakePod) -> None:
        tpots = pod.counts.setdefault(pod.digest, [])
        middle = self.behaviours.get(pod.digest, self.default).tpot_ms
        tpots.extend(random.uniform(0.8, 1.2) * middle for _ in range(int(self.traffic * 0.1)))

    def _answer(self, request: BaseHTTPRequestHandler, body: dict[str, Any] | None) -> None:
        address = request.connection.getsockname()[0]
        pod = next((p for p in list(self.pods.values()) if p.address == address), None)
        if pod is None and address in self._services:
            namespace, instance = self._services[address]
            ready = [p for p in list(self.pods.values()) if p.ready and p.namespace == namespace and p.name.startswith(instance)]
            pod = ready[0] if ready else None
        if pod is None or not self.reachable:
            request.close_connection = True
            return
        how = next((how for prefix, how in self.sick.items() if pod.name.startswith(prefix)), None)
        if how is not None:
            self._be_sick(request, how)
            return
        if self.api_key and "/v1/" in request.path and request.headers["Authorization"] != f"Bearer {self.api_key}":
            request.send_response(401)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        status, answer = 200, self._body(pod, request.path, body)
        if isinstance(answer, dict):
            answer = json.dumps(answer)
        data = answer.encode()
        request.send_response(status)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    def _be_sick(self, request: BaseHTTPRequestHandler, how: str) -> None:
        """No answer, or one that comes byte by byte and would need an hour."""
        request.close_connection = True
        try:
            if how == "drips":
                request.send_response(200)
                request.send_header("Content-Length", "100000")
                request.end_headers()
            for _ in range(100_000):
                if self._stop.wait(0.5):
                    return
                if how == "drips":
                    request.wfile.write(b" ")
                    request.wfile.flush()
                elif not request.connection.recv(1):  # the other side gave up
                    return
        except OSError:
            return

    def _body(self, pod: FakePod, path: str, body: dict[str, Any] | None) -> dict[str, Any] | str:
        if path == "/metrics":
            return _metrics(pod)
        if path == "/v1/completions":
            assert body is not None
            pod.tokens += 1
            behaviour = self.behaviours.get(pod.digest, self.default)
            text = behaviour.words.format(body["prompt"].upper()) if behaviour.right else "wrong"
            return {"choices": [{"text": text}], "usage": {"completion_tokens": 1}}
        state = engine_state(pod.digest, pod.key, generation=pod.generation, override=pod.override, error=pod.error)
        return state.to_json_dict()


def _metrics(pod: FakePod) -> str:
    lines = []
    for name in ("sere_tpot_seconds", "sere_ttft_seconds"):
        lines.append(f"# TYPE {name} histogram")
        for digest, tpots in pod.counts.items():
            labels, seen = f'policy="{digest}",bucket="8-64"', list(tpots)
            for bound in BOUNDS_MS:
                lines.append(f'{name}_bucket{{{labels},le="{bound / 1e3}"}} {sum(t <= bound for t in seen)}')
            lines.append(f'{name}_bucket{{{labels},le="+Inf"}} {len(seen)}')
            lines.append(f"{name}_count{{{labels}}} {len(seen)}")
            lines.append(f"{name}_sum{{{labels}}} {sum(seen) / 1e3}")
    return "\n".join(lines) + "\n"
