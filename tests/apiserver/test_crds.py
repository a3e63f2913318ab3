"""The CRDs on a real API server: what is refused there and with which words, what kubectl shows, scales and waits for."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import yaml
from kubernetes.client import ApiException
from kubernetes.dynamic import DynamicClient

from sere_operator.plan.patch import merged
from tests.kit import tuning_bounds

from .conftest import ROOT, SAMPLES, Kubectl

API = "serving.sere.dev/v1alpha1"


def sample(name: str, kind: str = "SereDeployment") -> dict[str, Any]:
    return next(o for o in yaml.safe_load_all((SAMPLES / f"{name}.yaml").read_text()) if o["kind"] == kind)


def deployment(patch: dict[str, Any], base: str = "minimal") -> dict[str, Any]:
    return merged(sample(base), {"spec": patch})


def cases(name: str) -> list[dict[str, Any]]:
    """tests/assets/resources/<name>.yaml, which the unit tests hold against the models as well."""
    return list(yaml.safe_load((ROOT / "tests" / "assets" / "resources" / f"{name}.yaml").read_text()))


def refusal_message(error: ApiException) -> str:
    """The server's sentence without the value's type, which it puts between "Invalid value" and our message."""
    return str(json.loads(error.body)["message"]).replace('"object": ', "").replace('"array": ', "")


def test_all_crds_are_structural_and_established(kubectl: Kubectl, crds: list[str]) -> None:
    items = json.loads(kubectl("get", "crd", *crds, "-o", "json").stdout)["items"]
    assert len(items) == 3
    for item in items:
        conditions = {c["type"]: c["status"] for c in item["status"]["conditions"]}
        assert conditions == {"NamesAccepted": "True", "Established": "True"}, item["metadata"]["name"]


@pytest.mark.parametrize("path", sorted(SAMPLES.glob("*.yaml")), ids=lambda p: p.stem)
def test_samples_are_accepted(kubectl: Kubectl, path: Any) -> None:
    kubectl("apply", "--dry-run=server", "--validate=strict", "-f", str(path))


REFUSED, ACCEPTED = cases("refused"), cases("accepted")


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case["name"])
def test_refused_with_a_message_that_helps(sere: Any, case: dict[str, Any]) -> None:
    with pytest.raises(ApiException) as refusal:
        sere.create(body=deployment(case["patch"], case["sample"]), namespace="default", dry_run="All")
    assert refusal.value.status == 422
    assert case["told"] in refusal_message(refusal.value)


@pytest.mark.parametrize("case", ACCEPTED, ids=lambda case: case["name"])
def test_accepted(sere: Any, case: dict[str, Any]) -> None:
    body = deployment(case["patch"], case["sample"])
    stored = sere.create(body=body, namespace="default", dry_run="All").to_dict()
    assert stored["spec"] == body["spec"], "the server neither drops nor adds anything"


@pytest.mark.parametrize("name", ["qwen3.5", "3qwen", "q" * 64])
def test_a_name_that_no_service_can_have_is_refused(sere: Any, name: str) -> None:
    body = {**sample("minimal"), "metadata": {"name": name}}
    with pytest.raises(ApiException) as refusal:
        sere.create(body=body, namespace="default", dry_run="All")
    assert "metadata.name is the Service's name as well" in refusal_message(refusal.value)


def test_kubectl_refuses_an_unknown_field(kubectl: Kubectl) -> None:
    done = kubectl("apply", "-f", "-", stdin=deployment({"replicsa": 2}), check=False)
    assert done.returncode != 0
    assert 'unknown field "spec.replicsa"' in done.stderr


def test_every_field_of_the_spec_explains_itself(kubectl: Kubectl) -> None:
    told = kubectl("explain", "sere.spec.rollout.canary.minRequests").stdout
    assert "finished requests on each side before judging. Default: 500." in told


def status(generation: int, ready: str = "True") -> dict[str, Any]:
    return {
        "observedGeneration": generation,
        "replicas": 2,
        "readyReplicas": 2,
        "selector": "app.kubernetes.io/instance=qwen3",
        "ready": "2/2",
        "routing": "Tuned",
        "policy": {"stable": "sere-9f3c01d2"},
        "tpotP95": "17.9ms",
        "speedup": "1.35x",
        "accuracy": "-0.2",
        "conditions": [
            {
                "type": "Ready", "status": ready, "reason": "Serving", "message": "serving the certified policy",
                "observedGeneration": generation, "lastTransitionTime": "2026-01-01T00:00:00Z",
            }
        ],
    }  # fmt: skip


def put_status(sere: Any, namespace: str, name: str, value: dict[str, Any]) -> None:
    sere.status.patch(
        body={"apiVersion": API, "kind": "SereDeployment", "metadata": {"name": name}, "status": value},
        name=name,
        namespace=namespace,
        content_type="application/merge-patch+json",
    )


def test_columns_of_kubectl_get(kubectl: Kubectl, sere: Any, namespace: str) -> None:
    kubectl("apply", "-f", "-", stdin=sample("minimal"))
    put_status(sere, namespace, "qwen3", status(1))
    head, row = kubectl("get", "sere").stdout.splitlines()
    assert head.split() == ["NAME", "READY", "ROUTING", "POLICY", "TPOT-P95", "SPEEDUP", "ACCURACY", "AGE", "MESSAGE"]
    cells = row.split(maxsplit=8)
    assert cells[:7] == ["qwen3", "2/2", "Tuned", "sere-9f3c01d2", "17.9ms", "1.35x", "-0.2"]
    assert cells[8] == "serving the certified policy"


def test_wait_for_ready_does_not_pass_on_a_stale_object(kubectl: Kubectl, sere: Any, namespace: str) -> None:
    kubectl("apply", "-f", "-", stdin=sample("minimal"))
    put_status(sere, namespace, "qwen3", status(1))
    kubectl("wait", "sere/qwen3", "--for=condition=Ready", "--timeout=5s")
    kubectl("patch", "sere/qwen3", "--type=merge", "-p", '{"spec": {"engine": {"maxModelLen": 4096}}}')
    stale = kubectl("wait", "sere/qwen3", "--for=condition=Ready", "--timeout=2s", check=False)
    assert stale.returncode != 0, "generation 2 has not been judged yet"
    assert "timed out" in stale.stderr
    put_status(sere, namespace, "qwen3", status(2))
    kubectl("wait", "sere/qwen3", "--for=condition=Ready", "--timeout=5s")


def test_status_cannot_be_written_with_the_spec_nor_the_spec_with_the_status(sere: Any, namespace: str) -> None:
    body = sample("minimal")
    created = sere.create(body={**body, "status": status(1)}, namespace=namespace)
    assert created.status is None
    put_status(sere, namespace, "qwen3", status(1))
    after = sere.get(name="qwen3", namespace=namespace)
    assert after.metadata.generation == 1, "a status update is no new generation"


def test_kubectl_scale(kubectl: Kubectl, sere: Any, namespace: str) -> None:
    kubectl("apply", "-f", "-", stdin=sample("static"))
    kubectl("scale", "sere/qwen3-static", "--replicas=5")
    assert sere.get(name="qwen3-static", namespace=namespace).spec.replicas == 5
    put_status(sere, namespace, "qwen3-static", status(2))
    scale = json.loads(kubectl("get", "--raw", f"/apis/{API}/namespaces/{namespace}/seredeployments/qwen3-static/scale").stdout)
    assert scale["status"] == {"replicas": 2, "selector": "app.kubernetes.io/instance=qwen3"}


def test_kubectl_scale_is_refused_where_an_autoscaler_decides(kubectl: Kubectl) -> None:
    kubectl("apply", "-f", "-", stdin=deployment({"autoscaling": {"min": 1, "max": 3}}))
    done = kubectl("scale", "sere/qwen3", "--replicas=5", check=False)
    assert done.returncode != 0
    assert "give replicas or autoscaling, not both" in done.stderr


def tuning_job() -> dict[str, Any]:
    spec = sample("tuned")["spec"]
    kept = ("model", "engine", "resources", "slo", "accuracy", "tuning")
    return {
        "apiVersion": API,
        "kind": "SereTuningJob",
        "metadata": {"name": "run"},
        "spec": {"deployment": "qwen3-tuned", **{key: spec[key] for key in kept}},
    }


@pytest.mark.parametrize(
    ("patch", "field"),
    [
        ({"tuning": {"trials": 61}}, "tuning"),
        ({"accuracy": {"maxDropPoints": 5}}, "accuracy"),
        ({"nodeSelector": {"a": "b"}}, "nodeSelector"),
        ({"resources": None}, "resources"),
    ],
    ids=["changed", "loosened", "added", "removed"],
)
def test_a_tuning_job_is_immutable(client: DynamicClient, namespace: str, patch: dict[str, Any], field: str) -> None:
    jobs = client.resources.get(api_version=API, kind="SereTuningJob")
    jobs.create(body=tuning_job(), namespace=namespace)
    with pytest.raises(ApiException) as refusal:
        jobs.patch(name="run", namespace=namespace, body={"spec": patch}, content_type="application/merge-patch+json")
    assert f"spec.{field}" in refusal_message(refusal.value)
    assert f"{field} is immutable: a tuning job is one run" in refusal_message(refusal.value)


def test_a_tuning_job_may_be_suspended(client: DynamicClient, namespace: str) -> None:
    jobs = client.resources.get(api_version=API, kind="SereTuningJob")
    jobs.create(body=tuning_job(), namespace=namespace)
    for value in (True, False):
        body = {"spec": {"suspend": value}}
        after = jobs.patch(name="run", namespace=namespace, body=body, content_type="application/merge-patch+json")
        assert after.spec.suspend is value


def test_a_profile_is_immutable_and_keeps_its_digest(client: DynamicClient, namespace: str) -> None:
    from sere_ext.contract.profile import ProfileSpec

    profiles = client.resources.get(api_version=API, kind="SereProfile")
    body = sample("profile", "SereProfile")
    stored = profiles.create(body=body, namespace=namespace).to_dict()
    digest = sample("profile")["spec"]["routing"]["profileRef"]["digest"]
    assert ProfileSpec.model_validate(stored["spec"]).digest == digest, "the way through the server must not change the content"
    with pytest.raises(ApiException) as refusal:
        profiles.patch(
            name=body["metadata"]["name"],
            namespace=namespace,
            content_type="application/merge-patch+json",
            body={"spec": {"evidence": {"certified": True}}},
        )
    assert "a profile is immutable, its name stands for its content; create another one" in refusal_message(refusal.value)


def test_deleting_what_owns_a_child_takes_the_child_along(client: DynamicClient, sere: Any, namespace: str) -> None:
    """Children go by ownerReference alone, so that no finalizer is needed and deletion works with the operator down."""
    owner = sere.create(body=sample("minimal"), namespace=namespace)
    maps = client.resources.get(api_version="v1", kind="ConfigMap")
    reference = {"apiVersion": API, "kind": "SereDeployment", "name": "qwen3", "uid": owner.metadata.uid, "controller": True}
    maps.create(
        body={"metadata": {"name": "qwen3-policy", "ownerReferences": [reference]}, "data": {"stable": "exact"}},
        namespace=namespace,
    )
    sere.delete(name="qwen3", namespace=namespace)
    until = time.monotonic() + 30
    while any(item.metadata.name == "qwen3-policy" for item in maps.get(namespace=namespace).items):
        assert time.monotonic() < until, "the ConfigMap is still there"
        time.sleep(0.2)


def test_the_server_refuses_what_the_tuner_would_refuse_in_a_pod(client: DynamicClient) -> None:
    """Every bound and flag of tuning.yaml, at the last value that fits and at the next one."""
    jobs = client.resources.get(api_version=API, kind="SereTuningJob")
    wrong = []
    for case in (*tuning_bounds.cases(), *tuning_bounds.flags()):
        body = {"apiVersion": API, "kind": "SereTuningJob", "metadata": {"name": "run"}, "spec": case.spec()}
        try:
            jobs.create(body=body, namespace="default", dry_run="All")
            status = 201
        except ApiException as error:
            status = error.status
        if status != (201 if case.fits else 422):
            wrong.append(f"{case}: {status}")
    assert wrong == []


@pytest.mark.parametrize("name", ["run.1", "r" * 64])
def test_a_name_that_no_job_can_have_is_refused(client: DynamicClient, name: str) -> None:
    jobs = client.resources.get(api_version=API, kind="SereTuningJob")
    with pytest.raises(ApiException) as refusal:
        jobs.create(body={**tuning_job(), "metadata": {"name": name}}, namespace="default", dry_run="All")
    assert "metadata.name is the Job's name as well" in refusal_message(refusal.value)
