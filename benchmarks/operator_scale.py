"""What many SereDeployments cost the operator: `tests/kit/one-node -k -- python -m benchmarks.operator_scale [N]` prints JSON.

A real etcd, API server, controller-manager, scheduler and operator process. Node and pods are kwok's, whose binary must lie beside
the API server's; behind all their addresses, and those of Services, answers one server of the benchmark as an engine would.
Wanted are N resources that become Ready, no failed reconciliation, and few reads in the quiet time after.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from kubernetes import client as kube
from kubernetes import config
from kubernetes.dynamic import DynamicClient

from sere_ext.contract.names import ENGINE_PORT
from tests.kit import ROOT
from tests.kit.operator_process import OperatorProcess, World, eventually, manifest
from tests.kit.plan_world import KEY
from tests.kit.states import engine_state

NAMESPACE = "scale"
STAGES = ROOT / "benchmarks" / "kwok.yaml"
PODS, SERVICES = "10.244.0.0/16", "10.96.0.0/16"  # addresses, as tests/kit/one-node has them
STATE = engine_state("exact", KEY).model_dump_json(by_alias=True).encode()
NODE = {
    "apiVersion": "v1", "kind": "Node",
    "metadata": {"name": "kwok", "annotations": {"kwok.x-k8s.io/node": "fake"}},
    "status": {"allocatable": {"cpu": "10000", "memory": "100Ti", "pods": "10000"}},
}  # fmt: skip


def _cpu_s(pid: int) -> float:
    """Processor seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _resident_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) / 1024


def _counters(operator: OperatorProcess) -> dict[str, float]:
    names = ("reads_total", "reconciliations_total", "reconciliation_errors_total")
    return {"written": float(_written(operator)), **{name: operator.metric(f"sere_operator_{name}") for name in names}}


class _Engine(BaseHTTPRequestHandler):
    """Every engine at once: exact routing in force, and a token for whoever asks."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(STATE if self.path.startswith("/sere") else b"")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(json.dumps({"choices": [{"text": "a"}], "usage": {"completion_tokens": 1}}).encode())

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def _serve() -> None:
    """Answer on every address of pods and Services, within the benchmark's own network namespace."""
    for addresses in (PODS, SERVICES):
        subprocess.run(["ip", "route", "add", "local", addresses, "dev", "lo"], check=True)
    server = ThreadingHTTPServer(("0.0.0.0", ENGINE_PORT), _Engine)
    threading.Thread(target=server.serve_forever, daemon=True).start()


def _pods(world: World, kubeconfig: str) -> subprocess.Popen[bytes]:
    """kwok, with a node."""
    world.api("Node").create(body=NODE)
    line = [
        "kwok",
        "--kubeconfig",
        kubeconfig,
        "--manage-all-nodes",
        "--node-lease-duration-seconds",
        "40",
        "--cidr",
        PODS,
        "--config",
        str(STAGES),
    ]
    return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _created(world: World, count: int) -> list[float]:
    """Seconds from each SereDeployment's creation to its Deployment's, by the API server's clock, once all are there."""

    def all_of_them() -> list[dict[str, Any]] | None:
        found = world.items("Deployment")
        return found if len(found) == count else None

    deployments = eventually(all_of_them, 540, f"{count} Deployments")
    made = {one["metadata"]["name"]: one["metadata"]["creationTimestamp"] for one in world.items("SereDeployment")}

    def seconds(text: str) -> float:
        return datetime.fromisoformat(text).timestamp()

    return sorted(seconds(one["metadata"]["creationTimestamp"]) - seconds(made[one["metadata"]["name"]]) for one in deployments)


def _ready(resource: dict[str, Any]) -> tuple[str, str]:
    """Status and message of condition Ready."""
    conditions = resource.get("status", {}).get("conditions", [])
    return next(((c["status"], c["message"]) for c in conditions if c["type"] == "Ready"), ("Unknown", ""))


def _settled(world: World, operator: OperatorProcess) -> None:
    """Wait until nothing but the Lease has been written for 10 s."""
    written = -1
    while (now := _written(operator)) != written:
        written = now
        time.sleep(10)


def _written(operator: OperatorProcess) -> int:
    """Reconciliations that have written something."""
    return operator.log().count('"event": "writing"')


def measured(count: int, quiet_s: float) -> dict[str, Any]:
    """The whole measurement."""
    kubeconfig = os.environ["KUBECONFIG"]
    settings = kube.Configuration()
    config.load_kube_config(kubeconfig, client_configuration=settings)
    crds = ["kubectl", "apply", "--server-side", "-k", str(ROOT / "manifests" / "crd")]
    subprocess.run(crds, check=True, capture_output=True)
    subprocess.run(
        ["kubectl", "wait", "--for=condition=Established", "crd", "--all", "--timeout=30s"], check=True, capture_output=True
    )
    time.sleep(2)
    world_client = DynamicClient(kube.ApiClient(configuration=settings))
    log = Path(tempfile.mkdtemp()) / "operator.log"
    operator = OperatorProcess(kubeconfig, log, SERE_LEASE_NAME=NAMESPACE, SERE_WATCH_NAMESPACES=NAMESPACE, SERE_LEASE_S="60")
    world = World(world_client, NAMESPACE, None, operator)
    world.api("Namespace").create(body={"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
    _serve()
    nodes = _pods(world, kubeconfig)
    operator.start()
    try:
        eventually(lambda: '"leading"' in operator.log(), 60, "the operator leads")
        began = time.monotonic()
        for number in range(count):
            world.apply(manifest(f"m{number}"))
        waited = _created(world, count)
        all_s = time.monotonic() - began
        _settled(world, operator)
        settled_s, busy, busy_cpu = time.monotonic() - began, _counters(operator), _cpu_s(operator.pid)
        time.sleep(quiet_s)
        after, cpu = _counters(operator), _cpu_s(operator.pid)
        quiet = {name: after[name] - busy[name] for name in after}
        minutes, found = quiet_s / 60, world.items("SereDeployment")
        return {
            "resources": count,
            "ready": sum(_ready(one)[0] == "True" for one in found),
            "why": sorted({_ready(one)[1] for one in found})[:3],
            "secondsToDeployment": {
                "p50": statistics.median(waited), "p95": waited[int(0.95 * (count - 1))], "max": waited[-1]
            },
            "secondsToAllDeployments": round(all_s, 1),
            "secondsToQuiet": round(settled_s, 1),
            "failedReconciliations": after["reconciliation_errors_total"],
            "toQuiet": {
                "readsPerReconciliation": round(busy["reads_total"] / busy["reconciliations_total"], 2),
                "readsPerResource": round(busy["reads_total"] / count, 1),
                "reconciliationsThatWritePerResource": round(busy["written"] / count, 1),
                "cpuSecondsPerResource": round(busy_cpu / count, 3),
            },
            "quietMinute": {
                "reconciliationsPerResource": round(quiet["reconciliations_total"] / count / minutes, 2),
                "readsPerReconciliation": round(quiet["reads_total"] / max(1.0, quiet["reconciliations_total"]), 2),
                "readsPerResource": round(quiet["reads_total"] / count / minutes, 2),
                "reconciliationsThatWrite": quiet["written"] / minutes,
                "cpuSeconds": round((cpu - busy_cpu) / minutes, 2),
            },
            "residentMiB": round(_resident_mib(operator.pid)),
        }  # fmt: skip
    finally:
        operator.kill()
        nodes.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("resources", nargs="?", type=int, default=200, help="SereDeployments (default 200)")
    parser.add_argument("--quiet-s", type=float, default=60.0, help="quiet time that is measured, seconds (default 60)")
    given = parser.parse_args()
    if not os.environ.get("KUBECONFIG"):
        sys.exit("no API server: run `tests/kit/one-node -k -- python -m benchmarks.operator_scale`")
    if shutil.which("kwok") is None:
        sys.exit("no kwok: put its binary into the folder that tests/kit/assets prints")
    print(json.dumps(measured(given.resources, given.quiet_s), indent=2))


if __name__ == "__main__":
    main()
