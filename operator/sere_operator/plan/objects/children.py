"""The objects that a SereDeployment owns, as the dicts that the operator applies. Pure builders.

Neither the policy nor the SLO stands in the pod template: a change of them is a change of ConfigMaps (`volume`) and of pods'
annotations, so it can never restart a pod.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from sere_ext.contract.names import ENGINE_PORT
from sere_ext.contract.volume import POD_OVERRIDE, POD_POLICY, POD_REFRESH
from sere_operator.api import meta
from sere_operator.api.deployment import SereDeploymentSpec
from sere_operator.plan.objects import drift, pods
from sere_operator.plan.objects.merging import with_template
from sere_operator.plan.objects.revision import as_annotations, revision

Object = dict[str, Any]

# A pod ends in three steps: it is taken out of the Service's endpoints everywhere, it finishes its requests
# (spec.engine.shutdown.graceSeconds), its processes end.
LEAVE_S = 5
END_S = 25
ROLLED_OUT_LABELS = (meta.INSTANCE_LABEL, meta.MANAGED_BY_LABEL, meta.COMPONENT_LABEL)


@dataclass(frozen=True)
class Defaults:
    """What the operator was installed with.

    engine_image       of SereDeployments that name none
    image_pull_policy  of engine and tuner pods
    """

    engine_image: str = "sere-engine:0.1.0"
    image_pull_policy: str = "IfNotPresent"


def owner_reference(owner: Object) -> Object:
    return {
        "apiVersion": owner["apiVersion"],
        "kind": owner["kind"],
        "name": owner["metadata"]["name"],
        "uid": owner["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def owned(owner: Object, child: Object) -> bool:
    """Only an object that names the owner's uid as its controller is ours; equal names prove nothing."""
    references = child["metadata"].get("ownerReferences") or []
    return any(reference.get("uid") == owner["metadata"]["uid"] and reference.get("controller") for reference in references)


def controlled(child: Object) -> bool:
    """Whether an object has any controller."""
    return any(reference.get("controller") for reference in child["metadata"].get("ownerReferences") or [])


def applied_by(child: Object, manager: str) -> bool:
    """Whether this field manager has server-side applied an object."""
    entries = child["metadata"].get("managedFields") or []
    return any(entry.get("manager") == manager and entry.get("operation") == "Apply" for entry in entries)


def ours(owner: Object, child: Object) -> bool:
    """Whether a child is owned, or was: deleting its owner with `--cascade=orphan` leaves it without a controller.

    Such a child still has our labels, and our field manager has applied it.
    """
    if owned(owner, child):
        return True
    told = child["metadata"].get("labels") or {}
    label = {meta.MANAGED_BY_LABEL: meta.FIELD_MANAGER, meta.INSTANCE_LABEL: meta.label_value(owner["metadata"]["name"])}
    labelled = all(told.get(key) == value for key, value in label.items())
    return labelled and not controlled(child) and applied_by(child, meta.FIELD_MANAGER)


def labels(name: str, component: str) -> dict[str, str]:
    """Labels of every child. The selector of the pods is a part of them, so they never change for a name."""
    return {
        meta.NAME_LABEL: "sere",
        meta.INSTANCE_LABEL: meta.label_value(name),
        meta.MANAGED_BY_LABEL: meta.FIELD_MANAGER,
        meta.COMPONENT_LABEL: component,
        meta.DEPLOYMENT_LABEL: meta.label_value(name),
    }


def selector(name: str) -> dict[str, str]:
    whole = labels(name, meta.ENGINE_COMPONENT)
    return {key: whole[key] for key in ROLLED_OUT_LABELS}


def text(labels_wanted: Mapping[str, str]) -> str:
    """Labels as a label selector: `a=b,c=d`."""
    return ",".join(f"{key}={value}" for key, value in labels_wanted.items())


def names(name: str) -> dict[str, str]:
    """Names of a SereDeployment's children by kind; shards of artefacts are named in `meta.policy_shards`."""
    return {
        "Deployment": deployment_name(name),
        "Service": service_name(name),
        "ConfigMap": meta.policy_config_map(name),
        "PodDisruptionBudget": meta.fit_name(name),
        "HorizontalPodAutoscaler": meta.fit_name(name),
    }


def base(address: str) -> str:
    """`http://<address>:<port>` of a pod or Service, with an IPv6 address in brackets."""
    return f"http://[{address}]:{ENGINE_PORT}" if ":" in address else f"http://{address}:{ENGINE_PORT}"


def pod_base(pod: Object) -> str | None:
    """Where a running pod answers; None while it has no address or does not run."""
    status = pod.get("status") or {}
    address = status.get("podIP")
    return base(address) if address and status.get("phase") == "Running" else None


def metadata(owner: Object, name: str, component: str = meta.ENGINE_COMPONENT) -> Object:
    return {
        "name": name,
        "namespace": owner["metadata"]["namespace"],
        "labels": labels(owner["metadata"]["name"], component),
        "ownerReferences": [owner_reference(owner)],
    }


def served_name(name: str, spec: SereDeploymentSpec) -> str:
    """The `model` that clients send: the hub's name, or the resource's own where the model is a path."""
    return spec.model.name or name


def served_by(pod: Object, otherwise: str) -> str:
    """The `model` that this pod answers to. It may be of a spec before."""
    args = next((c.get("args") or [] for c in pod["spec"]["containers"] if c["name"] == "engine"), [])
    return next((value for flag, value in pairwise(args) if flag == "--served-model-name"), otherwise)


def made_of(pod: Object, template: Object) -> bool:
    """Whether a pod runs what this template's engine would: its image, arguments, environment and volumes. Not on what."""
    told = ("name", "image", "args", "env")
    wanted, found = template["spec"], pod["spec"]
    containers = [{key: container[key] for key in told if key in container} for container in wanted["containers"]]
    return drift.difference({"containers": containers, "volumes": wanted["volumes"]}, found) is None


def policy_volume(name: str) -> Object:
    """One projected volume, so that a digest never shows with the old ConfigMap (separate volumes were seen to).

    It has every shard's ConfigMap that there may ever be, as optional: whichever are there at a time, the template stays.
    """
    annotation = {
        POD_POLICY: meta.POLICY_ANNOTATION,
        POD_OVERRIDE: meta.OVERRIDE_ANNOTATION,
        POD_REFRESH: meta.REFRESH_ANNOTATION,
    }
    items = [
        {"path": path, "fieldRef": {"apiVersion": "v1", "fieldPath": f"metadata.annotations['{key}']"}}
        for path, key in annotation.items()
    ]
    shards = [{"configMap": {"name": shard, "optional": True}} for shard in meta.policy_shards(name)]
    sources = [{"downwardAPI": {"items": items}}, {"configMap": {"name": meta.policy_config_map(name)}}, *shards]
    return {"name": "policy", "projected": {"defaultMode": 0o444, "sources": sources}}


def pod_template(name: str, spec: SereDeploymentSpec, defaults: Defaults) -> Object:
    """The engine pod. `sere serve` is `vllm serve` with the plug-in's routes and file watcher on."""
    storage = pods.Storage()
    model = pods.model_path(spec.model, storage)
    storage.extra(spec.volumes)
    storage.scratch()
    storage.volumes.append(policy_volume(name))
    storage.mounts.append({"name": "policy", "mountPath": pods.POLICY_DIR, "readOnly": True})

    engine = spec.engine
    args = ["serve", model, "--port", str(ENGINE_PORT), "--served-model-name", served_name(name, spec)]
    if spec.model.name is not None and spec.model.revision:
        args += ["--revision", spec.model.revision]
    if engine.tensor_parallel_size > 1:
        args += ["--tensor-parallel-size", str(engine.tensor_parallel_size)]
    if engine.max_model_len is not None:
        args += ["--max-model-len", str(engine.max_model_len)]
    grace_s = engine.shutdown.grace_seconds
    args += ["--shutdown-timeout", str(grace_s), *engine.extra_args]

    fixed = {"SERE_POLICY_DIR": pods.POLICY_DIR}

    def probe(path: str, **timing: int) -> Object:
        return {"httpGet": {"path": path, "port": "http"}, **timing}

    container: Object = {
        "name": "engine",
        "image": engine.image or defaults.engine_image,
        "imagePullPolicy": defaults.image_pull_policy,
        "command": ["sere"],
        "args": args,
        "env": pods.with_api_key(pods.environment(spec.model, engine.env, fixed), engine.api_key_secret),
        "ports": [{"name": "http", "containerPort": ENGINE_PORT, "protocol": "TCP"}],
        # Loading may take an hour; a fixed liveness delay kills big loads (kserve#5062), a startup probe does not.
        "startupProbe": probe("/health", periodSeconds=5, timeoutSeconds=5, failureThreshold=1440),
        # Patient: an engine on a busy node answers late, and taking it out of the Service would only load the others more.
        "readinessProbe": probe("/sere/ready", periodSeconds=5, timeoutSeconds=10, failureThreshold=3),
        "livenessProbe": probe("/health", periodSeconds=20, timeoutSeconds=10, failureThreshold=6),
        # Endpoints are taken out before the server stops to listen, so that no request meets a closed port.
        "lifecycle": {"preStop": {"sleep": {"seconds": LEAVE_S}}},
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": pods.CONTAINER_SECURITY,
        "volumeMounts": storage.mounts,
    }
    if spec.resources is not None:
        container["resources"] = pods.resources(spec.resources)
    template: Object = {
        "metadata": {"labels": labels(name, meta.ENGINE_COMPONENT)},
        "spec": {
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,  # a Service called vllm would set VLLM_PORT, which vLLM reads
            "securityContext": pods.POD_SECURITY,
            "terminationGracePeriodSeconds": LEAVE_S + grace_s + END_S,
            **pods.scheduling(spec.node_selector, spec.tolerations, spec.runtime_class_name),
            "containers": [container],
            "volumes": storage.volumes,
        },
    }
    return with_template(template, spec.pod_template)


def deployment(owner: Object, spec: SereDeploymentSpec, defaults: Defaults, *, first: bool = False) -> Object:
    """The Deployment of the engine pods.

    Args:
        first: there is none yet.
    """
    name = owner["metadata"]["name"]
    template = pod_template(name, spec, defaults)
    body: Object = {
        "selector": {"matchLabels": selector(name)},
        "strategy": {
            "type": "RollingUpdate",
            "rollingUpdate": {"maxSurge": spec.rollout.surge, "maxUnavailable": spec.rollout.unavailable},
        },
        "progressDeadlineSeconds": 7200,
        "revisionHistoryLimit": 3,
        "template": template,
    }
    if spec.wanted_replicas is not None:
        body["replicas"] = spec.wanted_replicas
    elif first and spec.autoscaling is not None:
        body["replicas"] = spec.autoscaling.min  # handed over once it is there; an autoscaler of the user may come later
    annotated = {**metadata(owner, deployment_name(name)), "annotations": as_annotations(revision(spec), template)}
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": annotated, "spec": body}


def deployment_name(name: str) -> str:
    """Deployments may have 253 characters, but their pods' hostnames are cut at 63; stay below."""
    return meta.fit_name(name, 46)


def service_name(name: str) -> str:
    return meta.fit_name(name)


def service(owner: Object) -> Object:
    name = owner["metadata"]["name"]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(owner, service_name(name)),
        "spec": {
            "type": "ClusterIP",
            "selector": selector(name),
            "ports": [{"name": "http", "port": ENGINE_PORT, "targetPort": "http", "protocol": "TCP"}],
        },
    }


def disruption_budget(owner: Object, spec: SereDeploymentSpec) -> Object:
    """At least one pod at a time may be drained, or nodes could never be emptied."""
    name = owner["metadata"]["name"]
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": metadata(owner, meta.fit_name(name)),
        "spec": {
            "maxUnavailable": max(1, spec.rollout.unavailable),
            "unhealthyPodEvictionPolicy": "AlwaysAllow",  # a pod that serves nobody must not keep a node from being drained
            "selector": {"matchLabels": selector(name)},
        },
    }


def autoscaler(owner: Object, spec: SereDeploymentSpec) -> Object | None:
    """None where the spec asks for none, or names no metric: then the user brings one."""
    wanted, name = spec.autoscaling, owner["metadata"]["name"]
    if wanted is None or wanted.metric is None:
        return None
    target = {"type": "AverageValue", "averageValue": wanted.metric.average_value}
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": metadata(owner, meta.fit_name(name)),
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": deployment_name(name)},
            "minReplicas": wanted.min,
            "maxReplicas": wanted.max,
            "metrics": [{"type": "Pods", "pods": {"metric": {"name": wanted.metric.name}, "target": target}}],
        },
    }


def replicas_handed_over(spec: SereDeploymentSpec, live: Object | None) -> Object | None:
    """The live number of pods, to be applied under `meta.REPLICAS_MANAGER`, before the operator gives up the field.

    A field that its last owner leaves out goes to its default: turning autoscaling on would drop to one pod. None where
    the operator does not own the field.
    """
    if spec.wanted_replicas is not None or live is None:
        return None
    for entry in live["metadata"].get("managedFields") or []:
        ours = entry.get("manager") == meta.FIELD_MANAGER and entry.get("operation") == "Apply"
        if ours and "f:replicas" in (entry.get("fieldsV1") or {}).get("f:spec", {}):
            named = {key: live["metadata"][key] for key in ("name", "namespace")}
            replicas = live["spec"].get("replicas", 1)
            return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": named, "spec": {"replicas": replicas}}
    return None
