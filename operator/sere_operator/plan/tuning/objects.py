"""The objects that a SereTuningJob owns: rights, the tuner's input, its result's place, and the Job that runs it. Pure.

The tuner writes a ConfigMap that is named and made beforehand, and beside it those that hold its similarity artefact; its
rights end there.
"""

from __future__ import annotations

import json
import re

from sere_ext.contract.config_maps import config_map_name
from sere_ext.contract.errors import ExitCode
from sere_ext.contract.names import OPENINGS_NAME
from sere_ext.contract.tuning import SearchBudget
from sere_ext.contract.volume import POLICY_SHARDS
from sere_operator.api import meta
from sere_operator.api.tuning import SereTuningJobSpec
from sere_operator.plan.objects import children, pods
from sere_operator.plan.objects.children import Defaults
from sere_operator.plan.objects.merging import with_template
from sere_operator.plan.snapshot import Object, TuningSnapshot

TUNING_DIR = "/etc/sere-tuning"
RUN_DIR = "/var/lib/sere"
# Exit codes of `sere tune` that are answers; running it again would say the same.
_NO_ANSWERS = (ExitCode.DONE, ExitCode.UNPUBLISHED, ExitCode.STOPPED)
FINAL_EXIT_CODES = sorted(int(code) for code in ExitCode if code not in _NO_ANSWERS)
RETRIES = 6  # pods after one that crashed, where the study is kept


def run_name(name: str) -> str:
    """Name of a SereTuningJob's Job, ServiceAccount, Role and RoleBinding, `NAME-tuner` (at most 63 characters).

    Never the SereTuningJob's own name, which its author chooses: a job called like an existing ServiceAccount would run as it.
    """
    return meta.child_name(name, "tuner")


def input_name(name: str) -> str:
    return meta.child_name(name, "input")


def result_name(name: str) -> str:
    return meta.child_name(name, "result")


def result_names(name: str) -> list[str]:
    """Every ConfigMap that the tuner may write: its result, and those that hold its similarity artefact in pieces."""
    return [result_name(name), *(config_map_name(result_name(name), index) for index in range(1, POLICY_SHARDS + 1))]


def tuning_file(spec: SereTuningJobSpec, storage: pods.Storage, folder: str = "run") -> Object:
    """tuning.yaml as `sere tune` reads it, with every URI turned into the path at which it is mounted.

    Args:
        folder: of this run's study; the folder above it holds what runs share (the ledger of opened items).
    """
    tuning, accuracy = spec.tuning, spec.accuracy
    engine: Object = {"tensorParallelSize": spec.engine.tensor_parallel_size, "extraArgs": list(spec.engine.extra_args)}
    if spec.engine.max_model_len is not None:
        engine["maxModelLen"] = spec.engine.max_model_len
    whole: Object = {"model": pods.model_path(spec.model, storage), "engine": engine}
    if spec.model.name is not None and spec.model.revision:
        whole["revision"] = spec.model.revision
    if tuning.similarity is not None and tuning.similarity.calibrate is not None:
        whole["calibrate"] = {"data": storage.source(tuning.similarity.calibrate)}
    elif tuning.similarity is not None and tuning.similarity.uri is not None:
        whole["similarity"] = storage.uri(tuning.similarity.uri)
    workload = tuning.workload.to_json_dict()
    if tuning.workload.dataset is not None:
        workload["dataset"] = storage.source(tuning.workload.dataset)
    whole["workload"] = workload
    whole["slo"] = spec.slo.to_json_dict()
    tasks = []
    for task in accuracy.tasks:
        fields = {key: value for key, value in task.to_json_dict().items() if key not in ("uri", "configMap")}
        tasks.append({"file": storage.source(task), **fields})
    whole["accuracy"] = {**accuracy.to_json_dict(), "tasks": tasks}
    budget = tuning.model_dump(mode="json", by_alias=True, include=set(SearchBudget.model_fields))
    whole["search"] = {**(tuning.search.to_json_dict() if tuning.search else {}), **budget}
    if tuning.certify:
        whole["certify"] = tuning.certify.to_json_dict()
    whole["out"] = f"{RUN_DIR}/{folder}"
    return whole


def labels(snapshot: TuningSnapshot, spec: SereTuningJobSpec) -> dict[str, str]:
    found = children.labels(snapshot.name, meta.TUNER_COMPONENT)
    found[meta.DEPLOYMENT_LABEL] = meta.label_value(spec.deployment or snapshot.name)
    return found


def study_folder(snapshot: TuningSnapshot) -> str:
    """The folder of the run's study, below RUN_DIR.

    It is this run's alone, since one of the same name that was deleted and made again begins anew; but a run that takes back
    orphaned objects goes on in the folder that their input names.
    """
    live = snapshot.child("ConfigMap", input_name(snapshot.name))
    if live is not None and children.ours(snapshot.object, live):
        named = re.search(r'"out": "([^"]*)"', (live.get("data") or {}).get("tuning.yaml", ""))
        folder = named[1].removeprefix(f"{RUN_DIR}/") if named else ""
        if re.fullmatch(re.escape(snapshot.name) + "-[0-9a-z]{1,8}", folder):
            return folder
    return f"{snapshot.name}-{str(snapshot.object['metadata']['uid'])[:8]}"


def build(snapshot: TuningSnapshot, spec: SereTuningJobSpec, defaults: Defaults) -> list[Object]:
    """The children in the order in which they are needed: rights, input, the result's place, the Job."""
    owner, name, namespace = snapshot.object, snapshot.name, snapshot.namespace
    metadata = {"namespace": namespace, "labels": labels(snapshot, spec), "ownerReferences": [children.owner_reference(owner)]}
    storage = pods.Storage()
    text = json.dumps(tuning_file(spec, storage, study_folder(snapshot)), indent=2)  # JSON is YAML
    names = [*result_names(name), OPENINGS_NAME]
    rules = [{"apiGroups": [""], "resources": ["configmaps"], "resourceNames": names, "verbs": ["create", "patch"]}]
    run = run_name(name)
    rbac = "rbac.authorization.k8s.io"
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": run, **metadata}},
        {"apiVersion": f"{rbac}/v1", "kind": "Role", "metadata": {"name": run, **metadata}, "rules": rules},
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "RoleBinding",
            "metadata": {"name": run, **metadata},
            "roleRef": {"apiGroup": rbac, "kind": "Role", "name": run},
            "subjects": [{"kind": "ServiceAccount", "name": run, "namespace": namespace}],
        },
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": input_name(name), **metadata},
            "data": {"tuning.yaml": text},
        },
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": result_name(name), **metadata}},
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": run, **metadata, "annotations": {meta.SUSPENDED_ANNOTATION: str(spec.suspend).lower()}},
            "spec": job_spec(snapshot, spec, defaults, storage),
        },
    ]


def job_spec(snapshot: TuningSnapshot, spec: SereTuningJobSpec, defaults: Defaults, storage: pods.Storage) -> Object:
    """One pod of the tuner's own container. An answer ends the Job.

    Where the study is kept, a pod that was lost is replaced by one that goes on; where it goes with its pod, another pod
    would spend the budget anew, so the Job fails instead.
    """
    storage.extra((*spec.volumes, *spec.tuning.volumes))
    storage.scratch()
    kept = spec.tuning.storage
    if kept is None:
        storage.empty("run", RUN_DIR)
    else:
        storage.claim(kept.claim_name, RUN_DIR, name="run", read_only=False)
    storage.volumes.append({"name": "tuning", "configMap": {"name": input_name(snapshot.name)}})
    storage.mounts.append({"name": "tuning", "mountPath": TUNING_DIR, "readOnly": True})
    target = f"configmap/{snapshot.namespace}/{result_name(snapshot.name)}"
    container: Object = {
        "name": "tuner",
        "image": spec.engine.image or defaults.engine_image,
        "imagePullPolicy": defaults.image_pull_policy,
        "command": ["sere"],
        "args": ["tune", "-f", f"{TUNING_DIR}/tuning.yaml", "--publish", target],
        "env": pods.environment(spec.model, spec.engine.env, {"XDG_STATE_HOME": f"{RUN_DIR}/state"}),
        "securityContext": pods.CONTAINER_SECURITY,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": storage.mounts,
    }
    wanted = spec.tuning.resources or spec.resources
    if wanted is not None:
        container["resources"] = pods.resources(wanted)
    rules: list[Object] = [
        {"action": "FailJob", "onExitCodes": {"containerName": "tuner", "operator": "In", "values": FINAL_EXIT_CODES}}
    ]
    if kept is not None:
        rules.append({"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]})
    return {
        "backoffLimit": 0 if kept is None else RETRIES,
        "suspend": spec.suspend,
        "podFailurePolicy": {"rules": rules},
        "template": with_template(
            {
                "metadata": {"labels": labels(snapshot, spec)},
                "spec": {
                    "restartPolicy": "Never",
                    "serviceAccountName": run_name(snapshot.name),
                    "enableServiceLinks": False,
                    "securityContext": pods.POD_SECURITY,
                    "terminationGracePeriodSeconds": 60,
                    **pods.scheduling(spec.node_selector, spec.tolerations, spec.runtime_class_name),
                    "containers": [container],
                    "volumes": storage.volumes,
                },
            },
            spec.tuning.pod_template,
        ),
    }
