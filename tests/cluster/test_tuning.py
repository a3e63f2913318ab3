"""Tuned, end to end: the operator runs the tuner's own container, takes its profile, and switches the serving pod hot."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from demo import kube, site
from demo.traffic import Traffic
from sere_ext.contract.policy import Policy
from sere_ext.contract.state import EngineState
from sere_operator.api.deployment import SereDeploymentSpec
from sere_operator.plan.rollout.aftermath import BACKOFF_S

SITE = site.current()
NAMESPACE = SITE.namespace
NAME = "demo"

pytestmark = pytest.mark.timeout(1800)


@pytest.fixture(scope="module")
def tuned(operator: None) -> dict[str, Any]:
    """The demo's sample: one serving engine and one tuning engine."""
    resource = yaml.safe_load((kube.ROOT / "manifests/samples/demo.yaml").read_text())
    resource["spec"] = SITE.spec(resource["spec"])
    kube.apply(resource, namespace=NAMESPACE)
    return resource


def condition(kind: str) -> dict[str, Any]:
    return kube.condition(kube.get("sere", NAME, NAMESPACE), kind)


def state(pod: dict[str, Any]) -> EngineState:
    return EngineState.parse(kube.get_json(f"{SITE.pod(pod)}/sere"))


def job() -> dict[str, Any]:
    jobs = kube.items("seretune", NAMESPACE)
    return jobs[0] if jobs else {}


def test_ready_does_not_wait_for_tuning(tuned: dict[str, Any]) -> None:
    kube.wait_for("Ready", lambda: condition("Ready").get("status") == "True", 1200, every_s=2)
    assert condition("Tuned").get("status") != "True"
    (pod,) = kube.pods(NAME, NAMESPACE)
    assert state(pod).policy_digest == "exact"


def test_tuning_ends_in_a_certified_profile(tuned: dict[str, Any]) -> None:
    kube.wait_for("the end of the tuning run", lambda: (job().get("status") or {}).get("outcome"), 1500, every_s=3)
    found = job()
    assert found["status"]["outcome"] == "Chosen", kube.condition(found, "Complete")
    profile = kube.get("sereprof", found["status"]["profile"], NAMESPACE)
    assert profile is not None
    evidence = profile["spec"]["evidence"]
    assert evidence["certified"]
    assert evidence["accuracy"]["upperBoundPoints"] <= 2.0
    assert found["status"]["trials"]["completed"] <= 8


def test_profile_reaches_the_pod_hot(tuned: dict[str, Any], prompts: list[str]) -> None:
    """One pod alone: the stable policy and the candidate take turns on it. It never restarts, and no request fails."""
    (pod,) = kube.pods(NAME, NAMESPACE)
    before = kube.identity(pod)
    deadline_s = SereDeploymentSpec.model_validate(tuned["spec"]).rollout.canary.deadline_seconds
    two_canaries_s = (
        2 * deadline_s + BACKOFF_S + 120
    )  # one that has too few requests by its deadline is inconclusive and tried again

    def applied() -> bool:
        found = condition("PolicyApplied")
        assert found.get("status") == "True", found
        return True

    with Traffic(SITE.service(NAME), NAME, prompts, concurrency=8, tokens=16) as client:
        kube.wait_for("the profile's policy", applied, two_canaries_s, every_s=1)
    assert client.errors == 0, client.causes
    (pod,) = kube.pods(NAME, NAMESPACE)
    assert kube.identity(pod) == before
    profile = kube.get("sereprof", job()["status"]["profile"], NAMESPACE) or {}
    running = state(pod)
    assert running.policy == Policy.parse(profile["spec"]["policy"])
    assert running.policy_digest == (kube.get("sere", NAME, NAMESPACE) or {})["status"]["policy"]["stable"] != "exact"
    assert condition("Tuned")["status"] == "True"


def test_deleting_the_tuning_job_never_touches_traffic(tuned: dict[str, Any], prompts: list[str]) -> None:
    (pod,) = kube.pods(NAME, NAMESPACE)
    before = state(pod).policy_digest
    with Traffic(SITE.service(NAME), NAME, prompts, concurrency=2) as client:
        kube.kubectl("delete", "seretune", "--all", "-n", NAMESPACE, "--timeout=60s")
        kube.wait_for("traffic", lambda: client.requests > 30, 60)
    assert client.errors == 0, client.causes
    assert kube.identity(kube.pods(NAME, NAMESPACE)[0]) == kube.identity(pod)
    assert state(pod).policy_digest == before
    kube.kubectl("delete", "sere", NAME, "-n", NAMESPACE, "--timeout=60s")
