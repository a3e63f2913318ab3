"""Names that people and programs meet: the API group, labels, annotations, and how long names are shortened."""

from __future__ import annotations

import hashlib
from typing import Final

from sere_ext.contract.names import API_VERSION, GROUP, VERSION
from sere_ext.contract.policy import EXACT
from sere_ext.contract.volume import POLICY_SHARDS

__all__ = ["API_VERSION", "GROUP", "VERSION"]  # spelled in the contract, read from here like the other names

DEPLOYMENT_KIND: Final = "SereDeployment"
TUNING_JOB_KIND: Final = "SereTuningJob"
PROFILE_KIND: Final = "SereProfile"

DEPLOYMENTS: Final = "seredeployments"  # plural resource names, as in URLs and RBAC
TUNING_JOBS: Final = "seretuningjobs"
PROFILES: Final = "sereprofiles"

FIELD_MANAGER: Final = "sere-operator"  # of everything that the operator applies
REPLICAS_MANAGER: Final = "sere-operator-replicas"  # of the live number of pods while an autoscaler takes it over
KUBECTL_FIELD_MANAGER: Final = "kubectl-sere"  # of the kill switch, so that the operator never undoes it

# Annotations of a pod; the first three are projected into it as files (ARCHITECTURE.md, declarative source).
POLICY_ANNOTATION: Final = f"{GROUP}/policy"  # digest that this pod is to run; absent: the ConfigMap's `stable`
OVERRIDE_ANNOTATION: Final = f"{GROUP}/override"  # OVERRIDE_EXACT or absent; also on the SereDeployment
REFRESH_ANNOTATION: Final = f"{GROUP}/refresh"  # a nonce; a change makes the kubelet refresh the volume at once
CONFIG_HASH_ANNOTATION: Final = f"{GROUP}/config-hash"  # of what the operator last applied to a child
SUSPENDED_ANNOTATION: Final = f"{GROUP}/suspended"  # of a tuning Job: whether the operator has suspended it
DECIDED_ANNOTATION: Final = f"{GROUP}/decided"  # hash of what the operator wrote into the policy ConfigMap
REVISION_ANNOTATION: Final = f"{GROUP}/revision"  # of the model and engine that a Deployment's pods are of
TEMPLATE_ANNOTATION: Final = f"{GROUP}/template"  # the pod template that the operator last applied to a Deployment
# Annotations of a SereDeployment that people set.
ROLLBACK_ANNOTATION: Final = f"{GROUP}/rollback"  # digest of the policy to give up; cleared by removing it
RETUNE_ANNOTATION: Final = f"{GROUP}/tune-again"  # name of the SereTuningJob to run once more, with its whole budget
APPROVED_ANNOTATION: Final = f"{GROUP}/approved"  # digest that may be promoted where rollout.approval is Manual
OVERRIDE_EXACT: Final = EXACT

# Labels. The pods of one SereDeployment are `{MANAGED_BY: FIELD_MANAGER, INSTANCE: name}`.
NAME_LABEL: Final = "app.kubernetes.io/name"
INSTANCE_LABEL: Final = "app.kubernetes.io/instance"
MANAGED_BY_LABEL: Final = "app.kubernetes.io/managed-by"
COMPONENT_LABEL: Final = "app.kubernetes.io/component"
DEPLOYMENT_LABEL: Final = f"{GROUP}/deployment"  # the owning SereDeployment's label value (see `label_value`)
ENGINE_COMPONENT: Final = "engine"
TUNER_COMPONENT: Final = "tuner"
SHARD_COMPONENT: Final = "policy-shard"

MAX_NAME: Final = 63  # RFC 1123 label: Services, labels, and pod names' prefixes
_HASH_LENGTH: Final = 8


def fit_name(name: str, limit: int = MAX_NAME) -> str:
    """`name` if it has at most `limit` characters, else its head and a hash of the whole, so that two long names differ.

    The result ends in a letter or digit as RFC 1123 asks, given that `name` does.
    """
    if len(name) <= limit:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:_HASH_LENGTH]
    return f"{name[: limit - _HASH_LENGTH - 1].rstrip('-.')}-{digest}"


def child_name(parent: str, suffix: str, limit: int = MAX_NAME) -> str:
    """Name of a child object, `<parent>-<suffix>`, with the parent shortened where the whole is too long.

    The suffix is always kept whole, so that children of one parent have different names that people recognise.
    """
    whole = f"{parent}-{suffix}"
    return whole if len(whole) <= limit else f"{fit_name(parent, limit - len(suffix) - 1)}-{suffix}"


def policy_config_map(deployment: str) -> str:
    """Name of the ConfigMap that holds `stable` and every policy by digest."""
    return child_name(deployment, "policy", 253)


def policy_shards(deployment: str) -> list[str]:
    """Names of the ConfigMaps beside it, each for one shard of a similarity artefact."""
    return [child_name(deployment, f"policy-shard-{index}", 253) for index in range(POLICY_SHARDS)]


def label_value(name: str) -> str:
    """A resource's name (up to 253 characters) as a label value (up to 63)."""
    return fit_name(name)


def engine_selector(deployment: str) -> str:
    """Label selector of the pods that serve one SereDeployment. It never changes for a name."""
    labels = {INSTANCE_LABEL: label_value(deployment), MANAGED_BY_LABEL: FIELD_MANAGER, COMPONENT_LABEL: ENGINE_COMPONENT}
    return ",".join(f"{key}={value}" for key, value in labels.items())
