"""The objects that the operator applies."""

from __future__ import annotations

import base64
import json
from typing import Any

import kubernetes_validate
import pytest

from sere_ext.contract.config_maps import encoded
from sere_ext.contract.errors import SpecError
from sere_ext.contract.policy import Policy
from sere_ext.contract.shards import join
from sere_ext.contract.volume import desired, named_slo
from sere_operator.api.common import parse_spec
from sere_operator.api.deployment import SereDeploymentSpec
from sere_operator.plan.objects import children, drift, pods
from sere_operator.plan.objects.children import Defaults
from sere_operator.plan.objects.revision import revision
from sere_operator.plan.objects.volume import PolicyEntry, policy_config_map, shard_config_maps
from sere_operator.plan.rollout.wanted import tuning_hash

OWNER = {
    "apiVersion": "serving.sere.dev/v1alpha1",
    "kind": "SereDeployment",
    "metadata": {"name": "m", "namespace": "ns", "uid": "00000000-0000-0000-0000-000000000001"},
}


def spec(**changes: Any) -> SereDeploymentSpec:
    return parse_spec(SereDeploymentSpec, {"model": {"name": "org/model"}, **changes})


def test_children_are_valid_and_owned() -> None:
    wanted = spec(
        model={"uri": "pvc://models/qwen3"},
        resources={"limits": {"nvidia.com/gpu": 1}},
        nodeSelector={"a": "b"},
        tolerations=[{"key": "gpu", "operator": "Exists"}],
        volumes=[{"name": "v", "claimName": "c", "mountPath": "/v"}],
    )
    policy = Policy.parse({"buckets": [{"minTokens": 8, "kind": "topk", "S": 2}]})
    bodies = [
        children.deployment(OWNER, wanted, Defaults()),
        children.service(OWNER),
        children.disruption_budget(OWNER, wanted),
        policy_config_map(OWNER, "exact", False, {policy.digest: PolicyEntry(policy)}),
        *shard_config_maps(OWNER, {}, [PolicyEntry(policy, similarity=("sha256:0", ("AAAA",)))]),
    ]
    for body in bodies:
        kubernetes_validate.validate(body, "1.34", strict=True)
        (reference,) = body["metadata"]["ownerReferences"]
        assert (reference["uid"], reference["controller"]) == (OWNER["metadata"]["uid"], True)
        assert "finalizers" not in body["metadata"]


def test_the_policy_is_nowhere_in_the_pod_template() -> None:
    """A policy change must never restart a pod."""
    static = {"mode": "Static", "policy": {"buckets": [{"minTokens": 8, "kind": "topk", "S": 2}]}}
    assert children.pod_template("m", spec(), Defaults()) == children.pod_template("m", spec(routing=static), Defaults())


def test_an_edit_of_the_slo_restarts_nothing_and_reaches_the_pods_by_their_policy_volume() -> None:
    limits = {"tpotMs": {"p95": 20, "p99": 35.5}, "ttftMs": {"p99": 500}}
    without, given = spec(), spec(slo=limits)
    assert children.deployment(OWNER, without, Defaults()) == children.deployment(OWNER, given, Defaults())
    assert named_slo(policy_config_map(OWNER, "exact", False, {}, given.slo)["data"]) == given.slo
    assert named_slo(policy_config_map(OWNER, "exact", False, {}, without.slo)["data"]) is None


def test_a_pod_is_asked_by_the_name_that_it_serves_under() -> None:
    """Pods of the model before may serve on for hours, and know nothing of the new one's name."""
    assert children.served_by(children.pod_template("m", spec(), Defaults()), "other/model") == "org/model"
    assert children.served_by({"spec": {"containers": [{"name": "engine", "args": ["serve"]}]}}, "other/model") == "other/model"


def test_the_pod_passes_the_restricted_profile() -> None:
    """The profile of https://kubernetes.io/docs/concepts/security/pod-security-standards/."""
    pod = children.pod_template("m", spec(), Defaults())["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    allowed = {"emptyDir", "projected", "configMap", "persistentVolumeClaim", "secret", "downwardAPI"}
    assert all(set(volume) - {"name"} <= allowed for volume in pod["volumes"])
    (container,) = pod["containers"]
    security = container["securityContext"]
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert (security["allowPrivilegeEscalation"], security["readOnlyRootFilesystem"]) == (False, True)
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert {"/tmp", "/dev/shm"} <= writable


def test_the_engine_is_told_what_the_spec_says() -> None:
    wanted = spec(
        model={"name": "org/model", "revision": "abc", "tokenSecret": {"name": "hf", "key": "token"}},
        engine={"image": "e:2", "tensorParallelSize": 4, "maxModelLen": 512, "extraArgs": ["--enforce-eager"],
                "env": [{"name": "HOME", "value": "/x"}]},
    )  # fmt: skip
    (container,) = children.pod_template("m", wanted, Defaults())["spec"]["containers"]
    assert container["args"] == [
        "serve", "org/model", "--port", "8000", "--served-model-name", "org/model", "--revision", "abc",
        "--tensor-parallel-size", "4", "--max-model-len", "512", "--shutdown-timeout", "120", "--enforce-eager",
    ]  # fmt: skip
    env = {variable["name"]: variable.get("value") or variable.get("valueFrom") for variable in container["env"]}
    assert env["SERE_POLICY_DIR"] == "/etc/sere"
    assert env["HF_TOKEN"] == {"secretKeyRef": {"name": "hf", "key": "token"}}
    assert env["HOME"] == "/x", "the user's variable wins"
    assert len(env) == len(container["env"]), "no variable twice"


def test_a_claim_is_mounted_once_and_read_only() -> None:
    wanted = spec(
        model={"uri": "pvc://models/a/b"}, volumes=[{"name": "v", "claimName": "data", "mountPath": "/v", "subPath": "s"}]
    )
    pod = children.pod_template("m", wanted, Defaults())["spec"]
    (container,) = pod["containers"]
    assert container["args"][1] == "/mnt/pvc/models/a/b"
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    assert mounts["/mnt/pvc/models"]["readOnly"] is True
    assert (mounts["/v"]["readOnly"], mounts["/v"]["subPath"]) == (True, "s")


def test_claims_whose_names_differ_by_a_dot_stay_two_volumes() -> None:
    storage = pods.Storage()
    claims = ("a.b", "a-b", "a" * 70 + ".x", "a" * 70 + "-x")
    paths = {storage.claim(claim): claim for claim in claims}
    assert len({volume["name"] for volume in storage.volumes}) == len(claims)
    assert all(len(volume["name"]) <= 63 and "." not in volume["name"] for volume in storage.volumes)
    by_name = {volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in storage.volumes}
    assert {mount["mountPath"]: by_name[mount["name"]] for mount in storage.mounts} == paths


def test_a_folder_of_a_claim_is_the_folder_of_its_own_mount() -> None:
    wanted = spec(
        model={"uri": "pvc://models/a"}, volumes=[{"name": "v", "claimName": "models", "mountPath": "/v", "subPath": "s"}]
    )
    (container,) = children.pod_template("m", wanted, Defaults())["spec"]["containers"]
    folders = {mount["mountPath"]: mount.get("subPath") for mount in container["volumeMounts"]}
    assert (folders["/mnt/pvc/models"], folders["/v"]) == (None, "s")


def test_the_policy_config_maps_are_what_the_plug_in_reads() -> None:
    policy = Policy.parse({"buckets": [{"minTokens": 8, "kind": "sere", "S": 2}], "similarityDigest": "sha256:" + "ab" * 32})
    content = bytes(range(256)) * 20
    entry = PolicyEntry(policy, similarity=(policy.similarity_digest or "", encoded(content, 2000)))
    body = policy_config_map(OWNER, policy.digest, True, {policy.digest: entry})
    assert body["data"]["stable"] == policy.digest
    assert body["data"]["override"] == "exact"
    assert Policy.parse(body["data"][f"{policy.digest}.json"]).digest == policy.digest
    assert json.loads(body["data"][f"{policy.digest}.json"])["similarityDigest"] == policy.similarity_digest
    volume = {name: text.encode() for name, text in body["data"].items()}
    shards = shard_config_maps(OWNER, {}, [entry])
    assert [shard["metadata"]["name"] for shard in shards] == [f"m-policy-shard-{i}" for i in range(4)]
    for shard in shards:
        ((name, text),) = shard["binaryData"].items()
        volume[name] = base64.b64decode(text)
    wanted = desired(volume, None)
    assert wanted.policy is not None and wanted.override
    wanted = desired({name: text for name, text in volume.items() if name != "override"}, None)
    assert wanted.policy == policy
    assert join([volume[name] for name in wanted.shards]) == content


@pytest.mark.parametrize("name", ["m", "m" * 200])
def test_long_names_are_cut_to_what_kubernetes_takes(name: str) -> None:
    owner = {**OWNER, "metadata": {**OWNER["metadata"], "name": name}}
    assert len(children.service(owner)["metadata"]["name"]) <= 63
    body = children.deployment(owner, spec(), Defaults())
    assert len(body["metadata"]["name"]) <= 46
    assert all(len(value) <= 63 for value in body["metadata"]["labels"].values())


def test_an_autoscaler_is_made_where_a_metric_is_given() -> None:
    body = children.autoscaler(OWNER, spec(autoscaling={"min": 2, "max": 3, "metric": {"name": "queue", "averageValue": "2.5"}}))
    assert body is not None
    kubernetes_validate.validate(body, "1.34", strict=True)
    assert body["spec"]["scaleTargetRef"]["name"] == children.deployment(OWNER, spec(), Defaults())["metadata"]["name"]
    assert children.autoscaler(OWNER, spec(autoscaling={"max": 3})) is None
    assert children.autoscaler(OWNER, spec(replicas=3)) is None


def test_the_live_number_of_pods_is_handed_over_once() -> None:
    ours = {"manager": "sere-operator", "operation": "Apply", "fieldsV1": {"f:spec": {"f:replicas": {}}}}
    live = {"metadata": {"name": "m", "namespace": "ns", "managedFields": [ours]}, "spec": {"replicas": 7}}
    scaled = spec(autoscaling={"max": 9})
    handed = children.replicas_handed_over(scaled, live)
    assert handed is not None
    assert handed["spec"] == {"replicas": 7}
    assert children.replicas_handed_over(spec(replicas=7), live) is None
    assert children.replicas_handed_over(scaled, None) is None
    live["metadata"]["managedFields"] = [{**ours, "manager": "kube-controller-manager"}]
    assert children.replicas_handed_over(scaled, live) is None


def test_an_autoscaled_deployment_leaves_replicas_alone() -> None:
    assert "replicas" not in children.deployment(OWNER, spec(autoscaling={"max": 3}), Defaults())["spec"]
    assert children.deployment(OWNER, spec(), Defaults())["spec"]["replicas"] == 1


def test_the_api_key_reaches_the_engine_alone_and_is_no_other_engine() -> None:
    env = [{"name": "VLLM_API_KEY", "value": "no"}]
    keyed, plain = spec(engine={"apiKeySecret": {"name": "keys", "key": "k"}, "env": env}), spec(engine={"env": env})
    (container,) = children.pod_template("m", keyed, Defaults())["spec"]["containers"]
    keys = [variable for variable in container["env"] if variable["name"] == "VLLM_API_KEY"]
    assert keys == [{"name": "VLLM_API_KEY", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "k"}}}]
    assert revision(keyed) == revision(plain)
    assert tuning_hash(keyed) == tuning_hash(plain), "no tuning again because of it"
    with pytest.raises(SpecError, match=r"--api-key may not stand here.*spec\.engine\.apiKeySecret"):
        spec(engine={"extraArgs": ["--api-key", "s"]})


# ---- how pods end ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grace_s", [None, 0, 600])
def test_a_pod_that_ends_has_time_for_its_requests(grace_s: int | None) -> None:
    """Out of the endpoints first, then as long as the spec says, and the kubelet kills nothing before that."""
    engine = {} if grace_s is None else {"shutdown": {"graceSeconds": grace_s}}
    pod = children.pod_template("m", spec(engine=engine), Defaults())["spec"]
    (container,) = pod["containers"]
    args = container["args"]
    grace = int(args[args.index("--shutdown-timeout") + 1])
    assert grace == (120 if grace_s is None else grace_s)
    leave = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert leave >= 5
    assert pod["terminationGracePeriodSeconds"] >= leave + grace + 20


def test_how_pods_end_is_no_other_engine() -> None:
    """Else a change of the grace would be tuned anew."""
    one, other = (spec(engine={"shutdown": {"graceSeconds": seconds}}) for seconds in (10, 20))
    assert revision(one) == revision(other)
    assert tuning_hash(one) == tuning_hash(other)


def test_pods_that_serve_nobody_do_not_keep_a_node() -> None:
    budget = children.disruption_budget(OWNER, spec())["spec"]
    assert budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


def test_a_first_deployment_has_the_autoscalers_least_number_of_pods() -> None:
    scaled = spec(autoscaling={"min": 2, "max": 3})
    assert children.deployment(OWNER, scaled, Defaults(), first=True)["spec"]["replicas"] == 2
    assert "replicas" not in children.deployment(OWNER, scaled, Defaults())["spec"]


# ---- podTemplate -------------------------------------------------------------------------------------------------


def test_what_the_user_gives_is_merged_as_server_side_apply_merges() -> None:
    given = {
        "metadata": {"labels": {"team": "a"}, "annotations": {"karpenter.sh/do-not-disrupt": "true"}},
        "spec": {
            "imagePullSecrets": [{"name": "registry"}], "serviceAccountName": "models", "priorityClassName": "high",
            "securityContext": {"runAsUser": None, "fsGroup": None, "supplementalGroups": [5]},
            "volumes": [{"name": "ca", "configMap": {"name": "ca"}}],
            "containers": [
                {
                    "name": "engine", "env": [{"name": "HF_HUB_OFFLINE", "value": "1"}],
                    "volumeMounts": [{"name": "ca", "mountPath": "/etc/ssl/ca"}], "resources": {"claims": [{"name": "gpu"}]},
                },
                {"name": "sidecar", "image": "s:1"},
            ],
        },
    }  # fmt: skip
    before = children.pod_template("m", spec(), Defaults())
    body = children.deployment(OWNER, spec(podTemplate=given), Defaults())
    kubernetes_validate.validate(body, "1.34", strict=True)
    template = body["spec"]["template"]
    pod = template["spec"]
    assert template["metadata"]["labels"] == {**before["metadata"]["labels"], "team": "a"}
    assert pod["serviceAccountName"] == "models"
    assert "runAsUser" not in pod["securityContext"] and pod["securityContext"]["runAsNonRoot"] is True
    assert [volume["name"] for volume in pod["volumes"]] == [*(v["name"] for v in before["spec"]["volumes"]), "ca"]
    engine, sidecar = pod["containers"]
    assert sidecar == {"name": "sidecar", "image": "s:1"}
    ours = before["spec"]["containers"][0]
    assert engine["args"] == ours["args"]
    assert engine["volumeMounts"] == [*ours["volumeMounts"], {"name": "ca", "mountPath": "/etc/ssl/ca"}]
    assert {variable["name"] for variable in engine["env"]} == {variable["name"] for variable in ours["env"]} | {"HF_HUB_OFFLINE"}
    stamps = [drift.stamped(children.deployment(OWNER, one, Defaults())) for one in (spec(), spec(podTemplate=given))]
    hashes = {stamp["metadata"]["annotations"]["serving.sere.dev/config-hash"] for stamp in stamps}
    assert len(hashes) == 2, "the rollout hash covers it"
    assert drift.without_foreign(stamps[1], stamps[1]) is None


def engine_with(**fields: Any) -> dict[str, Any]:
    return {"spec": {"containers": [{"name": "engine", **fields}]}}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (engine_with(image="x"), "spec.containers[engine].image is set by spec.engine.image"),
        (engine_with(args=["serve"]), "spec.engine.extraArgs"),
        (engine_with(lifecycle={}), "spec.engine.shutdown.graceSeconds"),
        (engine_with(readinessProbe={}), "readinessProbe is set by the operator itself"),
        (engine_with(env=[{"name": "SERE_POLICY_DIR", "value": "/x"}]), "SERE_POLICY_DIR is set by the operator or the image"),
        (engine_with(volumeMounts=[{"name": "x", "mountPath": "/etc/sere/"}]), "/etc/sere is where the operator mounts"),
        ({"spec": {"terminationGracePeriodSeconds": 5}}, "spec.engine.shutdown.graceSeconds"),
        ({"spec": {"volumes": [{"name": "policy", "emptyDir": {}}]}}, "policy is a name of the operator's own volumes"),
        ({"spec": {"containers": [{"image": "nameless"}]}}, "spec.containers must be a list of objects, each with a name"),
        (
            {"metadata": {"labels": {"app.kubernetes.io/instance": "x"}}},
            "app.kubernetes.io/instance is set by the operator itself",
        ),
        (
            {"metadata": {"annotations": {"serving.sere.dev/policy": "x"}}},
            "serving.sere.dev/policy is set by the operator itself",
        ),
    ],
)
def test_what_the_operator_needs_is_refused_inside_it(given: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError) as refused:
        spec(podTemplate=given)
    assert words in str(refused.value)
    assert "podTemplate" in str(refused.value)
