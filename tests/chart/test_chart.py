"""The chart as the real helm renders it: valid objects, least privilege, restricted pods, bad values refused."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from typing import Any

import kubernetes_validate
import pytest
import yaml

from sere_operator.api.common import parse_spec
from sere_operator.api.deployment import SereDeploymentSpec
from sere_operator.api.meta import COMPONENT_LABEL, ENGINE_COMPONENT, TUNER_COMPONENT
from sere_operator.plan.objects import children
from tests.kit import ROOT

CHART = ROOT / "helm" / "sere-operator"
KUBERNETES = "1.34"

Render = Callable[..., list[dict[str, Any]]]
Helm = Callable[..., subprocess.CompletedProcess[str]]

VARIANTS = {
    "defaults": (),
    "namespaced": ("watchNamespaces={models,other}",),
    "everything": (
        "networkPolicy.enabled=true",
        "networkPolicy.models.enabled=true",
        "networkPolicy.models.namespaces={models}",
        "priorityClassName=high",
        "image.digest=sha256:" + "a" * 64,
        "imagePullSecrets[0].name=pull",
        "nodeSelector.disk=ssd",
        "podAnnotations.a=b",
        "podLabels.team=ml",
        "env[0].name=A,env[0].value=b",
        "serviceAccount.annotations.role=x",
        "metrics.dashboard.enabled=true",
        "podSecurityContext.enabled=false",
    ),
    "bare": ("crds.enabled=false", "rbac.create=false", "serviceAccount.create=false", "serviceAccount.name=mine", "replicas=1"),
}


def of_kind(objects: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [one for one in objects if one["kind"] == kind]


def only(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = of_kind(objects, kind)
    return found


def environment(objects: list[dict[str, Any]]) -> dict[str, str]:
    """The operator's variables with their values ("" where they come from a field)."""
    (container,) = only(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    return {one["name"]: one.get("value", "") for one in container["env"]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_object_is_valid_for_kubernetes(render: Render, variant: str) -> None:
    objects = render(*VARIANTS[variant])
    assert of_kind(objects, "Deployment")
    for one in objects:
        kubernetes_validate.validate(one, KUBERNETES, strict=True)


def test_helm_lint_is_quiet(helm: Helm) -> None:
    done = helm("lint", "--strict", CHART)
    assert done.returncode == 0, done.stdout
    assert "[WARNING]" not in done.stdout
    assert "[ERROR]" not in done.stdout


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("replicas=-1", "replicas"),
        ("replicsa=2", "replicsa"),
        ("podDisruptionBudget.enabled=2", "enabled"),
        ("watchNamespaces={Not_A_Name}", "watchNamespaces"),
        ("crds.keep=perhaps", "keep"),
        ("image.pullPolicy=Sometimes", "pullPolicy"),
        ("image.digest=sha256:12", "digest"),
        ("leaderElection.leaseSeconds=1", "leaseSeconds"),
        ("engine.image.repository=", "repository"),
    ],
)
def test_bad_values_are_refused_by_name(helm: Helm, value: str, named: str) -> None:
    done = helm("template", "sere", CHART, "--set", value)
    assert done.returncode != 0
    assert named in done.stderr


def test_service_account_of_ones_own_needs_a_name(helm: Helm) -> None:
    done = helm("template", "sere", CHART, "--set", "serviceAccount.create=false")
    assert done.returncode != 0
    assert "serviceAccount.name is needed" in done.stderr


def test_schema_knows_every_value() -> None:
    """A value that the schema does not know could be misspelt without anybody noticing."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    schema = json.loads((CHART / "values.schema.json").read_text())

    def check(value: Any, node: dict[str, Any], path: str) -> None:
        if isinstance(value, dict) and "properties" in node:
            assert node["additionalProperties"] is False, path
            for key, inner in value.items():
                assert key in node["properties"], f"{path}.{key} is not in values.schema.json"
                check(inner, node["properties"][key], f"{path}.{key}")

    check(values, schema, "values")
    assert set(schema["properties"]) - {"global"} == set(values)


def test_templates_name_no_value_that_does_not_exist() -> None:
    """Helm renders a misspelt value as nothing."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    used = {match for path in (CHART / "templates").iterdir() for match in re.findall(r"\.Values((?:\.\w+)+)", path.read_text())}
    assert used
    for path in used:
        node: Any = values
        for key in path.strip(".").split("."):
            assert key in node, f".Values{path}"
            node = node[key]


def test_crds_are_those_of_manifests_and_are_kept(render: Render) -> None:
    rendered = {crd["metadata"]["name"]: crd for crd in of_kind(render(), "CustomResourceDefinition")}
    made = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / "manifests" / "crd").glob("sere*.yaml"))]
    assert len(made) == 3
    assert set(rendered) == {crd["metadata"]["name"] for crd in made}
    for crd in made:
        assert rendered[crd["metadata"]["name"]]["spec"] == crd["spec"]
        assert rendered[crd["metadata"]["name"]]["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}
    dropped = of_kind(render("crds.keep=false"), "CustomResourceDefinition")
    assert len(dropped) == 3
    assert all("annotations" not in crd["metadata"] for crd in dropped)
    assert not of_kind(render("crds.enabled=false"), "CustomResourceDefinition")


def test_namespaced_mode_has_no_cluster_wide_right(render: Render) -> None:
    objects = render("watchNamespaces={models,other}")
    assert not of_kind(objects, "ClusterRole")
    assert not of_kind(objects, "ClusterRoleBinding")
    assert {role["metadata"]["namespace"] for role in of_kind(objects, "Role")} == {"models", "other", "sere-system"}
    assert environment(objects)["SERE_WATCH_NAMESPACES"] == "models,other"


def test_rights_are_the_least(render: Render) -> None:
    """No wildcard, no secret, nothing that could raise its own rights, and never a write to a SereDeployment's spec."""
    roles = [one for kind in ("ClusterRole", "Role") for one in of_kind(render(), kind)]
    rules = [rule for role in roles if "aggregate-to" not in str(role["metadata"]["labels"]) for rule in role["rules"]]
    granted = {(resource, verb) for rule in rules for resource in rule["resources"] for verb in rule["verbs"]}
    assert not any("*" in part for entry in granted for part in entry)
    assert not {resource for resource, _ in granted} & {
        "secrets", "nodes", "pods/exec", "clusterroles", "clusterrolebindings", "persistentvolumes",
    }  # fmt: skip
    assert not {verb for _, verb in granted} & {"escalate", "bind", "impersonate"}
    assert {verb for resource, verb in granted if resource == "seredeployments"} == {"get", "list", "watch"}
    assert {verb for resource, verb in granted if resource == "pods"} == {"get", "list", "watch", "patch"}
    lease = [rule for rule in rules if rule["resources"] == ["leases"] and rule["verbs"] != ["create"]]
    assert [rule["resourceNames"] for rule in lease] == [["sere-operator"]]


def test_operator_pod_passes_the_restricted_profile(render: Render) -> None:
    pod = only(render(), "Deployment")["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert [set(volume) - {"name"} for volume in pod["volumes"]] == [{"emptyDir"}]
    (container,) = pod["containers"]
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_a_starved_operator_is_neither_ended_while_it_starts_nor_left_without_a_share(render: Render) -> None:
    """Beside engines that take every core, the imports alone took longer than a liveness probe waits."""
    (deployment,) = (o for o in render() if o["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 300
    assert container["resources"]["requests"]["cpu"] == "200m"
    assert "cpu" not in container["resources"]["limits"], "a limit would throttle it on an idle node"


def test_disruption_budget_only_where_it_cannot_block_a_drain(render: Render) -> None:
    assert only(render(), "PodDisruptionBudget")["spec"]["maxUnavailable"] == 1
    assert not of_kind(render("replicas=1"), "PodDisruptionBudget")


def test_digest_wins_over_tag(render: Render) -> None:
    digest = "sha256:" + "b" * 64
    objects = render("image.tag=v1", f"image.digest={digest}", "engine.image.tag=v2")
    (container,) = only(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert container["image"] == f"sere-operator@{digest}"
    assert environment(objects)["SERE_ENGINE_IMAGE"] == "sere-engine:v2"


def test_operator_reads_every_variable_that_the_chart_sets(render: Render) -> None:
    """A variable that nothing reads would be a setting without effect."""
    source = (ROOT / "operator/sere_operator/runtime/settings.py").read_text()
    set_by_chart = set(environment(render()))
    assert "SERE_WATCH_NAMESPACES" in set_by_chart
    assert not [name for name in set_by_chart if name not in source]


def test_dashboard_is_there_when_asked_for_and_whole(render: Render) -> None:
    assert not of_kind(render(), "ConfigMap")
    made = only(render("metrics.dashboard.enabled=true", "metrics.dashboard.labels.team=ml"), "ConfigMap")
    assert {"grafana_dashboard": "1", "team": "ml"}.items() <= made["metadata"]["labels"].items()
    wanted = (ROOT / "manifests" / "dashboards" / "sere.json").read_text()
    assert json.loads(made["data"]["sere.json"]) == json.loads(wanted)


def test_selector_is_the_same_wherever_it_is_used(render: Render) -> None:
    objects = render("networkPolicy.enabled=true")
    deployment = only(objects, "Deployment")["spec"]
    selector = deployment["selector"]["matchLabels"]
    assert selector.items() <= deployment["template"]["metadata"]["labels"].items()
    assert only(objects, "Service")["spec"]["selector"] == selector
    assert only(objects, "NetworkPolicy")["spec"]["podSelector"]["matchLabels"] == selector
    assert only(objects, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == selector


def test_traffic_of_engines_and_tuners_is_restricted_where_that_is_asked_for(render: Render, helm: Helm) -> None:
    assert not of_kind(render("watchNamespaces={a,b}"), "NetworkPolicy")
    found = of_kind(render("watchNamespaces={a,b}", "networkPolicy.models.enabled=true"), "NetworkPolicy")
    by_pod = {
        (one["metadata"]["namespace"], one["spec"]["podSelector"]["matchLabels"][COMPONENT_LABEL]): one["spec"] for one in found
    }
    assert set(by_pod) == {(namespace, component) for namespace in "ab" for component in (ENGINE_COMPONENT, TUNER_COMPONENT)}
    for (_, component), policy in by_pod.items():
        assert policy["podSelector"]["matchLabels"].items() <= children.labels("m", component).items()
        assert policy["policyTypes"] == ["Ingress", "Egress"]
    engine, tuner = by_pod["a", ENGINE_COMPONENT], by_pod["a", TUNER_COMPONENT]
    template = children.pod_template("m", parse_spec(SereDeploymentSpec, {"model": {"name": "x"}}), children.Defaults())
    (port,) = template["spec"]["containers"][0]["ports"]
    assert engine["ingress"] == [{"ports": [{"port": port["name"], "protocol": port["protocol"]}]}]
    assert "ingress" not in tuner, "nobody asks a tuning pod anything"
    reached = [{one["port"] for rule in policy["egress"] for one in rule["ports"]} for policy in (engine, tuner)]
    assert reached == [{53, 443}, {53, 443, 6443}]
    refused = helm("template", "sere", CHART, "--set", "networkPolicy.models.enabled=true")
    assert refused.returncode != 0
    assert "needs networkPolicy.models.namespaces or watchNamespaces" in refused.stderr


def test_notes_name_the_next_command(helm: Helm) -> None:
    done = helm("install", "sere", CHART, "--dry-run=client", "--namespace", "sere-system", "--set", "crds.keep=false")
    notes = done.stdout.partition("NOTES:")[2]
    assert "rollout status deployment/sere-operator" in notes
    assert "kubectl sere exact" in notes
    assert "CAUTION: crds.keep is false" in notes


VALUES = yaml.safe_load((CHART / "values.yaml").read_text())


@pytest.mark.parametrize("missing", [*VALUES, "metrics.dashboard", "metrics.podMonitor", "crds.takeOver", "engine.image.tag"])
def test_values_of_an_older_chart_get_the_defaults_of_this_one(helm: Helm, missing: str) -> None:
    """`helm upgrade --reuse-values` brings them alone: whatever came since is missing."""
    whole = helm("template", "sere", CHART)
    without = helm("template", "sere", CHART, "--set", f"{missing}=null")
    assert without.returncode == 0, without.stderr
    assert without.stdout == whole.stdout


def test_what_is_false_or_empty_stays_so(render: Render) -> None:
    assert not of_kind(render("metrics.service=false"), "Service")
    made = render("podDisruptionBudget.enabled=false", "rbac.create=false")
    assert not of_kind(made, "PodDisruptionBudget") and not of_kind(made, "ClusterRole")


def test_monitors_select_what_there_is(render: Render) -> None:
    objects = render("metrics.podMonitor.enabled=true", "metrics.serviceMonitor.enabled=true", "watchNamespaces={a,b}")
    engines, operator = only(objects, "PodMonitor"), only(objects, "ServiceMonitor")
    assert engines["spec"]["namespaceSelector"] == {"matchNames": ["a", "b"]}
    labels = children.labels("m", "engine")
    assert engines["spec"]["selector"]["matchLabels"].items() <= labels.items()
    (endpoint,) = engines["spec"]["podMetricsEndpoints"]
    template = children.pod_template("m", parse_spec(SereDeploymentSpec, {"model": {"name": "x"}}), children.Defaults())
    (container,) = template["spec"]["containers"]
    assert endpoint["port"] in [port["name"] for port in container["ports"]]
    service = only(objects, "Service")
    assert operator["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert only(render("metrics.podMonitor.enabled=true"), "PodMonitor")["spec"]["namespaceSelector"] == {"any": True}


def test_the_cluster_may_choose_the_user(render: Render) -> None:
    pod = only(render("podSecurityContext.enabled=false"), "Deployment")["spec"]["template"]["spec"]
    assert not {"runAsUser", "runAsGroup"} & set(pod["securityContext"])
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert only(render(), "Deployment")["spec"]["template"]["spec"]["securityContext"]["runAsUser"] == 10001


def test_only_named_secrets_may_be_read(render: Render) -> None:
    rules = [rule for role in of_kind(render("rbac.apiKeySecrets={a,b}"), "ClusterRole") for rule in role["rules"]]
    assert [rule for rule in rules if "secrets" in rule["resources"]] == [
        {"apiGroups": [""], "resources": ["secrets"], "resourceNames": ["a", "b"], "verbs": ["get"]}
    ]
