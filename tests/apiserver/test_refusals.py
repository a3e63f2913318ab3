"""What a real API server refuses of an object's children stands in its status, in the server's words."""

from __future__ import annotations

from typing import Any

import pytest
from kubernetes.client.rest import ApiException

from tests.kit.operator_process import World, eventually, manifest

from .test_operator import node, world
from .test_operator_tuned import TUNED
from .test_tenant import tuning_job

__all__ = ["node", "world"]  # fixtures


def quota(world: World, **hard: str) -> None:
    world.apply({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}, "spec": {"hard": hard}})
    # Admission believes a quota only once the controller has counted.
    eventually(lambda: world.get("ResourceQuota", "none").get("status", {}).get("used") is not None, 30, "the quota is counted")


def refused(world: World, kind: str, condition: str, words: str) -> dict[str, Any]:
    def check() -> bool:
        found = world.get(kind, "m")
        (judged,) = (c for c in found["status"]["conditions"] if c["type"] == condition)
        assert (judged["status"], judged["reason"]) == ("False", "Refused"), judged
        assert words in judged["message"], judged
        assert judged["observedGeneration"] == found["status"]["observedGeneration"] == found["metadata"]["generation"]
        return any(event["reason"] == "Refused" and words in event["message"] for event in world.items("Event"))

    eventually(check, 20, f"{kind} says {words}, with a Warning")
    return world.get(kind, "m")


def test_a_quota_on_deployments_is_said_and_goes_by_when_it_is_lifted(world: World) -> None:
    quota(world, **{"count/deployments.apps": "0"})
    world.apply(manifest())
    words = "exceeded quota: none, requested: count/deployments.apps=1"
    refused(world, "SereDeployment", "Ready", words)
    assert world.get("Service", "m"), "what is not refused is there"
    events = [event for event in world.items("Event") if event["reason"] == "Refused"]
    assert len(events) == 1
    world.delete("ResourceQuota", "none")
    world.patch("SereDeployment", "m", {"metadata": {"annotations": {"wake": "up"}}})
    world.ready()


def test_an_edit_that_is_refused_is_not_served_as_ready(world: World) -> None:
    """A field that the schema lets through and the API server does not."""
    world.apply(manifest())
    world.ready()
    world.patch("SereDeployment", "m", {"spec": {"nodeSelector": {"not a key": "x"}}})
    found = refused(world, "SereDeployment", "Ready", "name part must consist of alphanumeric characters")
    assert {c["type"]: c["status"] for c in found["status"]["conditions"]}["Available"] == "True"
    world.patch("SereDeployment", "m", {"spec": {"nodeSelector": None}})
    world.ready()


def test_a_tuning_job_that_may_not_run_says_so(world: World) -> None:
    quota(world, **{"count/jobs.batch": "0"})
    world.apply(tuning_job("m"))
    refused(world, "SereTuningJob", "Complete", "exceeded quota: none, requested: count/jobs.batch=1")


# ---- pods that are never created ---------------------------------------------------------------------------------


def blocked(world: World, kind: str, condition: str, reason: str, words: str, name: str = "m") -> None:
    """The status names the cause, in the API server's words, with one Warning."""

    def check() -> bool:
        (judged,) = (c for c in world.get(kind, name)["status"]["conditions"] if c["type"] == condition)
        assert (judged["status"], judged["reason"]) == ("False", reason), judged
        assert words in judged["message"], judged
        return True

    def warned() -> bool:
        told = [
            event
            for event in world.items("Event")
            if event["type"] == "Warning" and event["involvedObject"]["kind"] == kind and words in event["message"]
        ]
        assert [event["reason"] for event in told] == [reason]
        return True

    eventually(check, 40, f"{kind} says {words}")
    eventually(warned, 10, f"one Warning about {kind}")  # it is posted after the status


def test_a_quota_on_pods_is_said_of_engines_and_of_a_tuning_run(world: World) -> None:
    quota(world, pods="0")
    world.apply(manifest())
    world.apply(tuning_job("m"))
    words = "exceeded quota: none, requested: pods=1"
    blocked(world, "SereDeployment", "Ready", "RolloutBlocked", words)
    blocked(world, "SereTuningJob", "Complete", "TuningBlocked", words)
    world.delete("ResourceQuota", "none")
    world.ready()


def test_a_quota_on_what_the_spec_does_not_ask_for_is_said(world: World) -> None:
    """No resources are asked for, where the namespace's quota wants to know."""
    quota(world, **{"requests.cpu": "8"})
    world.apply(manifest())
    world.apply(tuning_job("m"))
    words = "must specify requests.cpu"
    blocked(world, "SereDeployment", "Ready", "RolloutBlocked", words)
    blocked(world, "SereTuningJob", "Complete", "TuningBlocked", words)


def test_an_admission_webhook_that_is_down_is_said(world: World) -> None:
    hook = {
        "name": "pods.example.com",
        "admissionReviewVersions": ["v1"],
        "sideEffects": "None",
        "timeoutSeconds": 1,
        "clientConfig": {"service": {"name": "nobody", "namespace": world.namespace, "path": "/"}},
        "rules": [{"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}],
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": world.namespace}},
    }
    hooks = world.client.resources.get(api_version="admissionregistration.k8s.io/v1", kind="ValidatingWebhookConfiguration")
    metadata = {"metadata": {"name": world.namespace}}
    hooks.create(body={"apiVersion": hooks.group_version, "kind": hooks.kind, **metadata, "webhooks": [hook]})
    try:
        world.apply(manifest())
        world.apply(tuning_job("m"))
        words = 'failed calling webhook "pods.example.com"'
        blocked(world, "SereDeployment", "Ready", "RolloutBlocked", words)
        blocked(world, "SereTuningJob", "Complete", "TuningBlocked", words)
    finally:
        hooks.delete(name=world.namespace)


def test_a_service_account_that_is_missing_is_said(world: World) -> None:
    world.apply(manifest(podTemplate={"spec": {"serviceAccountName": "nobody"}}))
    blocked(world, "SereDeployment", "Ready", "RolloutBlocked", 'serviceaccount "nobody" not found')


def test_a_tuning_run_of_a_deployment_that_gets_no_pod_is_said_there_too(world: World) -> None:
    """The quota has room for the engine's pod alone."""
    quota(world, pods="1")
    world.apply(manifest(**TUNED))
    blocked(world, "SereDeployment", "Tuned", "TuningBlocked", "exceeded quota: none, requested: pods=1")
    world.ready()


# ---- every plausible mistake in a spec -----------------------------------------------------------------------------

# What the schema lets through, or not: by name, the spec, and what the status or `kubectl apply` says then.
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "half-a-gpu": ({"resources": {"limits": {"nvidia.com/gpu": "0.5"}}}, "must be an integer"),
    "lots": ({"resources": {"limits": {"nvidia.com/gpu": "lots"}}}, "quantities must match the regular expression"),
    "negative": ({"resources": {"requests": {"cpu": "-1"}}}, "must be greater than or equal to 0"),
    "above-the-limit": (
        {"resources": {"requests": {"cpu": "2"}, "limits": {"cpu": "1"}}},
        "must be less than or equal to cpu limit",
    ),
    "no-limit": ({"resources": {"requests": {"nvidia.com/gpu": "1"}}}, "Limit must be set for non overcommitable resources"),
    "node-label": ({"nodeSelector": {"not a key": "x"}}, "name part must consist of alphanumeric characters"),
    "toleration": (
        {"tolerations": [{"key": "gpu", "operator": "Exists", "value": "x"}]},
        "value must be empty when `operator` is 'Exists'",
    ),
    "sub-path": ({"volumes": [{"name": "v", "claimName": "c", "mountPath": "/data", "subPath": ".."}]}, "should match"),
    "our-path": ({"volumes": [{"name": "v", "claimName": "c", "mountPath": "/etc/sere"}]}, "mountPath hides"),
    "metric": (
        {"autoscaling": {"min": 1, "max": 2, "metric": {"name": "m", "averageValue": "lots"}}},
        "quantities must match the regular expression",
    ),
    "too-long": (
        {"engine": {"image": "engine:1", "env": [{"name": f"V{i}", "value": "x" * 4096} for i in range(64)]}},
        "may not be more than 262144 bytes",
    ),
    "template-type": ({"podTemplate": {"spec": {"securityContext": "strict"}}}, "securityContext"),
    "template-field": ({"podTemplate": {"spec": {"priorityClass": "high"}}}, "priorityClass"),
    "template-value": ({"podTemplate": {"spec": {"dnsPolicy": "Mine"}}}, 'Unsupported value: "Mine"'),
    "template-label": ({"podTemplate": {"metadata": {"labels": {"a": "not a value!"}}}}, "a valid label must be"),
    "runtime-class": ({"runtimeClassName": "gvisor"}, 'RuntimeClass "gvisor" not found'),
}
TUNING_MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "half-a-gpu": ({"resources": {"limits": {"nvidia.com/gpu": "0.5"}}}, "must be an integer"),
    "template-value": ({"podTemplate": {"spec": {"dnsPolicy": "Mine"}}}, 'Unsupported value: "Mine"'),
    "template-type": ({"podTemplate": {"spec": {"securityContext": "strict"}}}, "securityContext"),
}


def test_every_mistake_that_the_api_server_knows_stands_in_the_status_or_is_refused_at_once(world: World) -> None:
    refused_at_once = {}
    for name, (spec, _) in MISTAKES.items():
        try:
            world.apply(manifest(name, **spec))
        except ApiException as error:
            refused_at_once[name] = str(error.body)
    assert refused_at_once.keys() == {"sub-path", "our-path"}
    for name, body in refused_at_once.items():
        assert MISTAKES[name][1] in body, body
    for name, (tuning, _) in TUNING_MISTAKES.items():
        body = tuning_job(f"t-{name}")
        body["spec"]["tuning"] = {**body["spec"]["tuning"], **tuning}
        world.apply(body)
    with pytest.raises(ApiException, match="at most 63 of a-z, 0-9"):
        world.apply(tuning_job("n" * 64))

    def said(kind: str, name: str, condition: str, words: str) -> bool:
        found = world.get(kind, name)
        (judged,) = (c for c in found["status"]["conditions"] if c["type"] == condition)
        assert judged["status"] == "False" and judged["reason"] in ("Refused", "RolloutBlocked", "InvalidSpec"), judged
        assert words in judged["message"], judged
        assert judged["observedGeneration"] == found["metadata"]["generation"]
        warnings = [
            event["message"]
            for event in world.items("Event")
            if event["type"] == "Warning" and event["involvedObject"]["name"] == name and event["involvedObject"]["kind"] == kind
        ]
        assert len(warnings) == 1 and words in warnings[0], warnings
        return True

    for name in MISTAKES.keys() - refused_at_once.keys():
        eventually(lambda name=name: said("SereDeployment", name, "Ready", MISTAKES[name][1]), 60, name)
    for name, (_, words) in TUNING_MISTAKES.items():
        eventually(lambda name=name, words=words: said("SereTuningJob", f"t-{name}", "Complete", words), 60, name)
