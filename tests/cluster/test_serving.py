"""Two real engine pods, served by the operator in its own pod: ready, switched hot under traffic, stopped, removed.

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
from demo.traffic import Traffic
from sere_ext.contract.state import EngineState

SITE = site.current()
NAMESPACE = SITE.namespace
NAME = "story"
OPERATOR = "app.kubernetes.io/component=operator"
# topk needs no similarity artefact. One bucket for every batch size, so that single requests are re-routed too.
POLICY = {"buckets": [{"minTokens": 1, "maxTokens": 64, "kind": "topk", "S": 2}]}

pytestmark = pytest.mark.timeout(1500)


@pytest.fixture(scope="module")
def story(operator: None) -> dict[str, Any]:
    """Applied once; two engines start."""
    spec = {
        "model": {"uri": "pvc://data/small"},
        "engine": {"maxModelLen": 128, "extraArgs": ["--dtype=float32", "--enforce-eager", "--max-num-seqs=16"]},
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


def test_deletion_leaves_nothing(story: dict[str, Any]) -> None:
    kube.kubectl("delete", "sere", NAME, "-n", NAMESPACE, "--timeout=60s")
    kinds = "deploy,rs,pod,svc,configmap,pdb,job,serviceaccount,role,rolebinding"

    def left() -> list[str]:
        found = kube.items(kinds, NAMESPACE, f"app.kubernetes.io/instance={NAME}")
        return [f"{one['kind']} {one['metadata']['name']}" for one in found]

    kube.wait_for(f"the end of {left()}", lambda: not left(), 150)
    subprocess.run(["kubectl", "get", "pods", "-n", SITE.system], check=True)
