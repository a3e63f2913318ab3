"""What somebody who may only create SereTuningJobs gains by it: nothing that they did not have."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.kit.operator_process import World, eventually

from .conftest import Kubectl
from .test_operator import node, world
from .test_operator_tuned import TUNED

__all__ = ["node", "world"]  # fixtures

FOREIGN = ("ServiceAccount", "Role", "RoleBinding", "ConfigMap", "Job")


def tuning_job(name: str) -> dict[str, Any]:
    spec = {key: TUNED[key] for key in ("slo", "accuracy", "tuning")}
    body = {"apiVersion": "serving.sere.dev/v1alpha1", "kind": "SereTuningJob", "metadata": {"name": name}}
    return {**body, "spec": {"model": {"name": "fake/model"}, "engine": {"image": "tenant:1"}, **spec}}


def victims(world: World, name: str, *config_maps: str) -> None:
    """What a platform team keeps in the namespace: an account that may read Secrets, a Job of its, and data."""
    rbac = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name}
    pod = {"restartPolicy": "Never", "containers": [{"name": "c", "image": "theirs:1"}]}
    metadata = {"metadata": {"name": name}}
    world.apply({"apiVersion": "v1", "kind": "ServiceAccount", **metadata})
    rules = [{"apiGroups": [""], "resources": ["secrets"], "verbs": ["get"]}]
    world.apply({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", **metadata, "rules": rules})
    subjects = [{"kind": "ServiceAccount", "name": name, "namespace": world.namespace}]
    binding = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", **metadata}
    world.apply({**binding, "roleRef": rbac, "subjects": subjects})
    world.apply({"apiVersion": "batch/v1", "kind": "Job", **metadata, "spec": {"suspend": True, "template": {"spec": pod}}})
    for config_map in config_maps:
        body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": config_map}, "data": {"theirs": "1"}}
        world.apply(body)


def spec_of(world: World, kind: str, name: str) -> Any:
    """What matters of an object: its owners and its content, without what controllers write."""
    found = world.get(kind, name)
    return found["metadata"].get("ownerReferences"), {
        key: found.get(key) for key in ("rules", "roleRef", "subjects", "data", "spec")
    }


def test_a_tuning_job_named_like_an_account_runs_as_another_that_may_do_nothing_else(world: World, kubectl: Kubectl) -> None:
    victims(world, "deployer")
    before = {kind: spec_of(world, kind, "deployer") for kind in FOREIGN if kind != "ConfigMap"}
    world.apply(tuning_job("deployer"))
    made = eventually(lambda: world.get("Job", "deployer-tuner"), 30, "the tuning Job")
    account = made["spec"]["template"]["spec"]["serviceAccountName"]
    assert account == "deployer-tuner"
    assert {kind: spec_of(world, kind, "deployer") for kind in before} == before
    # What the account of the tenant's pod may do in the namespace, as the API server itself says it.
    review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectRulesReview", "spec": {"namespace": world.namespace}}
    user = f"system:serviceaccount:{world.namespace}:{account}"
    answer = kubectl("create", "--validate=false", "-f", "-", "-o", "json", f"--as={user}", stdin=review)
    granted = [
        rule
        for rule in json.loads(answer.stdout)["status"]["resourceRules"]
        if not set(rule["apiGroups"]) <= {"authorization.k8s.io", "authentication.k8s.io"}  # every account may ask who it is
    ]
    (rule,) = granted
    assert (rule["resources"], sorted(rule["verbs"])) == (["configmaps"], ["create", "patch"])
    # `sere-openings` is the namespace's: which held-out items its tuning runs opened.
    assert all(name.startswith("deployer-result") for name in set(rule["resourceNames"]) - {"sere-openings"})


@pytest.mark.parametrize("taken", ["ci-input", "ci-result", "ci-result-7"])
def test_data_that_is_somebody_elses_is_left_alone_and_said(world: World, taken: str) -> None:
    victims(world, "other", taken)
    before = spec_of(world, "ConfigMap", taken)
    world.apply(tuning_job("ci"))
    refused(world, "ci", f"ConfigMap {taken} exists and is not ours; rename it or this job")
    assert spec_of(world, "ConfigMap", taken) == before
    assert not [
        body for kind in ("ServiceAccount", "Role", "Job") for body in world.items(kind) if body["metadata"]["name"] == "ci-tuner"
    ]


def test_an_account_under_our_own_name_is_not_taken_over_and_outlives_the_job(world: World) -> None:
    victims(world, "ci-tuner")
    before = {kind: spec_of(world, kind, "ci-tuner") for kind in FOREIGN if kind != "ConfigMap"}
    world.apply(tuning_job("ci"))
    refused(world, "ci", "exists and is not ours; rename it or this job")
    world.apply(tuning_job("fine"))
    eventually(lambda: world.get("Job", "fine-tuner"), 30, "a job beside it")
    for name in ("ci", "fine"):
        world.delete("SereTuningJob", name)
    eventually(
        lambda: "fine-tuner" not in [body["metadata"]["name"] for body in world.items("Role")], 60, "what was ours is collected"
    )
    assert {kind: spec_of(world, kind, "ci-tuner") for kind in before} == before


def test_libraries_of_ones_own_under_the_operators_command_are_refused_at_once(world: World, kubectl: Kubectl) -> None:
    for name in ("PATH", "LD_PRELOAD", "PYTHONPATH", "SERE_POLICY_DIR"):
        body = tuning_job("own")
        body["spec"]["engine"]["env"] = [{"name": name, "value": "/mnt/pvc/mine"}]
        answer = kubectl("apply", "--server-side", "-f", "-", stdin=body, check=False)
        assert answer.returncode != 0 and f"{name} is set by the operator or the image" in answer.stderr, answer.stderr


def refused(world: World, name: str, words: str) -> None:
    def check() -> bool:
        (complete,) = (c for c in world.get("SereTuningJob", name)["status"]["conditions"] if c["type"] == "Complete")
        assert (complete["status"], complete["reason"]) == ("False", "InvalidSpec")
        assert words in complete["message"]
        return any(event["type"] == "Warning" and words in event["message"] for event in world.items("Event"))

    eventually(check, 20, "refused, with a Warning")
