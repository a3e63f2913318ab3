"""Two real engine pods, served by the operator in its own pod: ready, switched hot under traffic, replaced, removed.

The tests are one story and run in order; each needs the ones before it.
"""

from __future__ import annotations

import json
import subprocess
import time
import urllib.request
from typing import Any

import pytest

from demo import kube, site
from demo.one_node import OneNode
from demo.traffic import Traffic
from sere_ext.contract.state import EngineState
from tests.kit.long_answers import LongAnswer, tokens_in

SITE = site.current()
NAMESPACE = SITE.namespace
NAME = "story"
OPERATOR = "app.kubernetes.io/component=operator"
LONGEST = 40_000  # tokens; the small model's answers of a minute have some ten thousand
LONG_MODEL = json.dumps({"max_position_embeddings": LONGEST})
ENGINE_CPU = 300  # millicores
ANSWER_S = 90.0  # at the pace of the slowest of eight answers at once; the last ones have the machine for themselves
LEAVE_S = 5.0  # what the operator's preStop hook waits before the engine is told to end
PATIENCE_S = 150  # for one step of the operator or of Kubernetes beside engines that take all the CPU
# topk needs no similarity artefact. One bucket for every batch size, so that single requests are re-routed too.
POLICY = {"buckets": [{"minTokens": 1, "maxTokens": 64, "kind": "topk", "S": 2}]}

pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def story(operator: None) -> dict[str, Any]:
    """Applied once; two engines start."""
    spec = {
        "model": {"uri": "pvc://data/small"},
        "engine": {
            "maxModelLen": LONGEST,
            "extraArgs": ["--dtype=float32", "--enforce-eager", "--max-num-seqs=16", f"--hf-overrides={LONG_MODEL}"],
            "shutdown": {"graceSeconds": 300},
        },
        "resources": {"requests": {"cpu": f"{ENGINE_CPU}m", "memory": "1Gi"}},  # four pods fit while they are replaced
        "replicas": 2,
        "routing": {"mode": "Exact"},
        "rollout": {"canary": {"minRequests": 20, "deadline": "2m"}},
    }
    resource = {
        "apiVersion": "serving.sere.dev/v1alpha1",
        "kind": "SereDeployment",
        "metadata": {"name": NAME},
        "spec": SITE.spec(spec),
    }
    kube.apply(resource, namespace=NAMESPACE)
    return resource


def condition(kind: str) -> dict[str, Any]:
    return kube.condition(kube.get("sere", NAME, NAMESPACE), kind)


def state(pod: dict[str, Any]) -> EngineState:
    return EngineState.parse(kube.get_json(f"{SITE.pod(pod)}/sere"))


def digests() -> dict[str, str]:
    """What each serving pod itself says it runs."""
    return {pod["metadata"]["name"]: state(pod).policy_digest for pod in kube.pods(NAME, NAMESPACE)}


def identities() -> list[tuple[str, int]]:
    return [kube.identity(pod) for pod in kube.pods(NAME, NAMESPACE)]


def set_routing(**routing: object) -> None:
    # A merge patch keeps what it does not name: null removes the policy of the mode before.
    patch = {"spec": {"routing": {"policy": None, **routing}}}
    kube.kubectl("patch", "sere", NAME, "-n", NAMESPACE, "--type=merge", "-p", json.dumps(patch))


def traffic(prompts: list[str]) -> Traffic:
    return Traffic(SITE.service(NAME), NAME, prompts, concurrency=4)


def test_operator_pod_is_unprivileged(operator: None) -> None:
    (pod,) = kube.items("pods", SITE.system, OPERATOR)
    assert pod["spec"]["containers"][0]["securityContext"]["readOnlyRootFilesystem"]
    user = kube.kubectl(
        "exec", "-n", SITE.system, pod["metadata"]["name"], "--", "python3", "-c", "import os; print(os.getuid())"
    )
    assert int(user) != 0


def test_operator_cannot_read_secrets(operator: None) -> None:
    account = f"system:serviceaccount:{SITE.system}:sere-operator"
    for verb, kind in (("get", "secrets"), ("patch", "seredeployments.serving.sere.dev"), ("create", "pods")):
        done = subprocess.run(
            ["kubectl", "auth", "can-i", verb, kind, "--as", account, "-n", NAMESPACE],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout.strip() == "no", f"{verb} {kind}"


def test_ready_means_a_real_token_through_the_service(story: dict[str, Any]) -> None:
    kube.wait_for("Ready", lambda: condition("Ready").get("status") == "True", 1200, every_s=2)
    kube.kubectl("wait", f"sere/{NAME}", "-n", NAMESPACE, "--for=condition=Ready", "--timeout=10s")
    assert len(kube.pods(NAME, NAMESPACE)) == 2
    assert set(digests().values()) == {"exact"}
    body = json.dumps({"model": NAME, "prompt": "1+1=", "max_tokens": 2, "temperature": 0}).encode()
    request = urllib.request.Request(f"{SITE.service(NAME)}/v1/completions", body, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        assert json.loads(answer.read())["usage"]["completion_tokens"] >= 1
    shown = kube.kubectl("get", "sere", NAME, "-n", NAMESPACE)
    assert "2/2" in shown
    assert "Exact" in shown


def test_policy_is_switched_hot_canary_first(story: dict[str, Any], prompts: list[str]) -> None:
    """One pod shows the new policy before the other does; no pod restarts and no request fails."""
    before, seen = identities(), []
    with traffic(prompts) as client:
        kube.wait_for("traffic", lambda: client.requests > 5, 60)
        began = time.monotonic()
        set_routing(mode="Static", policy=POLICY)

        def switched() -> bool:
            now = digests()
            seen.append(sum(digest != "exact" for digest in now.values()))
            return seen[-1] == 2 and condition("PolicyApplied").get("status") == "True"

        kube.wait_for("the policy on both pods", switched, 240, every_s=0.3)
        print(f"hot in {time.monotonic() - began:.1f} s, {client.requests} requests")
        kube.wait_for("traffic under the new policy", lambda enough=client.requests + 20: client.requests > enough, 60)
    assert seen == sorted(seen), f"a pod went back: {seen}"
    assert 1 in seen, "both pods switched at once: there was no canary"
    assert client.errors == 0, client.causes
    assert identities() == before
    (digest,) = set(digests().values())
    status = (kube.get("sere", NAME, NAMESPACE) or {})["status"]
    assert status["policy"]["stable"] == digest
    for pod in kube.pods(NAME, NAMESPACE):
        counters = state(pod).counters
        assert any(row.digest == digest and row.calls > 0 for row in counters), counters


def test_kill_switch_works_with_the_operator_down(story: dict[str, Any], prompts: list[str]) -> None:
    before, (policy,) = identities(), set(digests().values())
    kube.kubectl("scale", "-n", SITE.system, "deploy/sere-operator", "--replicas=0")
    kube.wait_for("the operator's end", lambda: not kube.items("pods", SITE.system, OPERATOR), 90)
    with traffic(prompts) as client:
        began = time.monotonic()
        kube.kubectl("sere", "exact", NAME, "-n", NAMESPACE)
        kube.wait_for("exact routing on every pod", lambda: set(digests().values()) == {"exact"}, 60, every_s=0.2)
        print(f"exact on both pods after {time.monotonic() - began:.1f} s")
        kube.kubectl("scale", "-n", SITE.system, "deploy/sere-operator", "--replicas=1")
        kube.kubectl("rollout", "status", "-n", SITE.system, "deploy/sere-operator", "--timeout=240s", timeout_s=250)
        kube.wait_for("the operator's word", lambda: condition("PolicyApplied").get("reason") == "Overridden", 150)
        assert set(digests().values()) == {"exact"}, "the operator undid the kill switch"
        kube.kubectl("sere", "exact", NAME, "--off", "-n", NAMESPACE)
        kube.wait_for("the policy again", lambda: set(digests().values()) == {policy}, 150)
    assert client.errors == 0, client.causes
    assert identities() == before


class Replaced:
    """Two long answers from each serving pod, one of them streamed, and what became of the pods meanwhile."""

    def __init__(self) -> None:
        pods = {pod["metadata"]["name"]: SITE.pod(pod) for pod in kube.pods(NAME, NAMESPACE)}
        tokens = tokens_in(ANSWER_S, list(pods.values()), NAME)
        self.answers = {
            name: [LongAnswer(url, NAME, tokens, streamed=streamed) for streamed in (True, False)] for name, url in pods.items()
        }
        self.events: dict[str, str] = {}  # by pod: what takes it away
        self.gone: dict[str, float] = {}  # by pod: monotonic seconds at which it was first seen on its way out

    @property
    def left(self) -> list[str]:
        return sorted(set(self.answers) - set(self.events))

    def leaves(self, by: str) -> None:
        """Wait until one more of the pods is on its way out."""

        def out() -> str | None:
            serving = {pod["metadata"]["name"] for pod in kube.pods(NAME, NAMESPACE)}
            return next((name for name in self.left if name not in serving), None)

        found: str = kube.wait_for(f"the end of a pod by {by}", out, PATIENCE_S, every_s=0.3)
        self.events[found], self.gone[found] = by, time.monotonic()

    def check(self) -> None:
        """Every answer came whole, so long after its pod was told to end that the engine was already shutting down."""
        for name, answers in self.answers.items():
            for answer in answers:
                assert answer.wait().problem is None, f"{self.events[name]}: {answer.problem} after {answer.seconds:.0f} s"
                assert answer.ended is not None
                late_s = answer.ended - self.gone[name]
                print(
                    f"{self.events[name]}: an answer of {answer.seconds:.0f} s, {late_s:.0f} s of it after its pod was told to end"
                )
                assert late_s > LEAVE_S + 1, f"{self.events[name]}: the answer was there before the engine was shut down"


def serving_ready(count: int) -> bool:
    """Whether so many pods serve, and all of them are ready."""
    found = kube.pods(NAME, NAMESPACE)
    ready = [any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", [])) for pod in found]
    return len(ready) == count and all(ready)


def preempt() -> None:
    """Ask for so much CPU at a higher priority that the scheduler takes one engine pod away; on a user's cluster delete one."""
    if not isinstance(SITE, OneNode):
        kube.kubectl("delete", "pod", kube.pods(NAME, NAMESPACE)[0]["metadata"]["name"], "-n", NAMESPACE, "--wait=false")
        return
    (node,) = kube.items("node", "default")
    pods = json.loads(kube.kubectl("get", "pods", "-A", "-o", "json"))["items"]
    requested = [c.get("resources", {}).get("requests", {}).get("cpu", "0") for pod in pods for c in pod["spec"]["containers"]]
    free = millicores(node["status"]["allocatable"]["cpu"]) - sum(map(millicores, requested))
    container = {
        "name": "urgent",
        "image": "pause:one-node",
        "resources": {"requests": {"cpu": f"{free + int(ENGINE_CPU * 0.8)}m"}},
    }
    pod = {"metadata": {"name": "urgent"}, "spec": {"priorityClassName": "urgent", "containers": [container]}}
    kube.apply({"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": "urgent"}, "value": 1000},
               {"apiVersion": "v1", "kind": "Pod", **pod}, namespace="kube-system")  # fmt: skip


def stop_preempting() -> None:
    kube.kubectl("delete", "pod/urgent", "priorityclass/urgent", "-n", "kube-system", "--ignore-not-found", "--grace-period=0")


def millicores(quantity: str) -> int:
    return int(quantity[:-1]) if quantity.endswith("m") else int(float(quantity) * 1000)


def evict(pod: str) -> None:
    """Take a pod away as `kubectl drain` does."""
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": NAMESPACE}}
    path = f"/api/v1/namespaces/{NAMESPACE}/pods/{pod}/eviction"
    kube.kubectl("create", "--raw", path, "-f", "-", stdin=json.dumps(eviction))


def edit(**spec: object) -> None:
    kube.kubectl("patch", "sere", NAME, "-n", NAMESPACE, "--type=merge", "-p", json.dumps({"spec": spec}))


@pytest.mark.soak
def test_replaced_pods_finish_their_requests(story: dict[str, Any], prompts: list[str]) -> None:
    """Preemption, scale-down, eviction and a template change, each with answers of a minute in flight: none is lost."""
    edit(replicas=4, rollout={"maxSurge": 0, "maxUnavailable": 4})  # so that no event waits for an engine to start
    kube.wait_for("four pods", lambda: serving_ready(4), 600, every_s=2)
    held = Replaced()
    with Traffic(SITE.service(NAME), NAME, prompts, concurrency=1) as client:
        kube.wait_for("traffic", lambda: client.requests > 2, 60)
        preempt()
        held.leaves("preemption")
        stop_preempting()
        edit(replicas=2)  # takes the preempted pod's successor as well, which is not ready
        held.leaves("scale-down")
        evict(held.left[0])
        held.leaves("eviction")
        kube.wait_for("traffic on the last pod", lambda enough=client.requests + 3: client.requests > enough, 60)
    assert client.errors == 0, client.causes
    edit(podTemplate={"metadata": {"labels": {"team": "b"}}})
    held.leaves("template change")
    held.check()


def test_deletion_leaves_nothing(story: dict[str, Any]) -> None:
    kube.kubectl("delete", "sere", NAME, "-n", NAMESPACE, "--timeout=60s")
    kinds = "deploy,rs,pod,svc,configmap,pdb,job,serviceaccount,role,rolebinding"

    def left() -> list[str]:
        found = kube.items(kinds, NAMESPACE, f"app.kubernetes.io/instance={NAME}")
        return [f"{one['kind']} {one['metadata']['name']}" for one in found]

    # A pod that was told to end before its first process could take a signal stays for its grace period.
    kube.wait_for(f"the end of {left()}", lambda: not left(), 360)
    subprocess.run(["kubectl", "get", "pods", "-n", SITE.system], check=True)
