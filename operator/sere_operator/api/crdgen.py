"""The three CustomResourceDefinitions, generated: `python -m sere_operator.api.crdgen [DIR]` writes manifests/crd/*.yaml."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sere_ext.contract.record import Record
from sere_operator.api import meta
from sere_operator.api.deployment import SereDeploymentSpec
from sere_operator.api.deployment_status import SereDeploymentStatus
from sere_operator.api.profile import SereProfileSpec
from sere_operator.api.rules import JOB_NAME, RULES, SERVICE_NAME, Rule
from sere_operator.api.schema import structural_schema
from sere_operator.api.tuning import SereTuningJobSpec, SereTuningJobStatus

HEADER = "# Generated from the models by `python -m sere_operator.api.crdgen`. Edit those, not this.\n"
CATEGORY = "sere-all"  # `kubectl get sere-all`; `sere` alone is the short name of SereDeployment


@dataclass(frozen=True)
class Column:
    """A column of `kubectl get`. Priority above 0 shows with `-o wide` only."""

    name: str
    path: str
    type: str = "string"
    priority: int = 0

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "jsonPath": self.path, "type": self.type, "priority": self.priority}


AGE = Column("Age", ".metadata.creationTimestamp", "date")


@dataclass(frozen=True)
class Definition:
    """What tells one resource from the others."""

    kind: str
    plural: str
    short_name: str
    description: str
    spec: type[Record]
    status: type[Record] | None  # None: nothing is told about it
    columns: tuple[Column, ...]
    scale: bool = False
    rules: tuple[Rule, ...] = ()  # on the whole object, of whose metadata a rule sees the name alone

    @property
    def file_name(self) -> str:
        return f"{self.plural}.yaml"

    def to_dict(self) -> dict[str, Any]:
        """The CustomResourceDefinition object."""
        subresources: dict[str, Any] = {"status": {}} if self.status is not None else {}
        if self.scale:
            subresources["scale"] = {
                "specReplicasPath": ".spec.replicas",
                "statusReplicasPath": ".status.replicas",
                "labelSelectorPath": ".status.selector",
            }
        schema: dict[str, Any] = {
            "type": "object",
            "description": self.description,
            "required": ["spec"],
            "properties": {
                "apiVersion": {"type": "string"},
                "kind": {"type": "string"},
                "metadata": {"type": "object"},
                "spec": structural_schema(self.spec, RULES),
                **({"status": structural_schema(self.status, RULES)} if self.status is not None else {}),
            },
        }
        if self.rules:
            schema["x-kubernetes-validations"] = [rule.to_dict() for rule in self.rules]
        return {
            "apiVersion": "apiextensions.k8s.io/v1",
            "kind": "CustomResourceDefinition",
            "metadata": {"name": f"{self.plural}.{meta.GROUP}"},
            "spec": {
                "group": meta.GROUP,
                "scope": "Namespaced",
                "names": {
                    "kind": self.kind,
                    "listKind": f"{self.kind}List",
                    "plural": self.plural,
                    "singular": self.kind.lower(),
                    "shortNames": [self.short_name],
                    "categories": [CATEGORY],
                },
                "versions": [
                    {
                        "name": meta.VERSION,
                        "served": True,
                        "storage": True,
                        "additionalPrinterColumns": [column.to_dict() for column in self.columns],
                        "subresources": subresources,
                        "schema": {"openAPIV3Schema": schema},
                    }
                ],
            },
        }


DEFINITIONS = (
    Definition(
        meta.DEPLOYMENT_KIND,
        meta.DEPLOYMENTS,
        "sere",
        "A served model and how its experts are routed.",
        SereDeploymentSpec,
        SereDeploymentStatus,
        (
            Column("Ready", ".status.ready"),
            Column("Routing", ".status.routing"),
            Column("Policy", ".status.policy.stable"),
            Column("TPOT-P95", ".status.tpotP95"),
            Column("Speedup", ".status.speedup"),
            Column("Accuracy", ".status.accuracy"),
            AGE,
            Column("Message", '.status.conditions[?(@.type=="Ready")].message'),
        ),
        scale=True,
        rules=(SERVICE_NAME,),
    ),
    Definition(
        meta.TUNING_JOB_KIND,
        meta.TUNING_JOBS,
        "seretune",
        "One run of the tuner, with an immutable copy of what is tuned.",
        SereTuningJobSpec,
        SereTuningJobStatus,
        (
            Column("Trials", ".status.progress"),
            Column("Outcome", ".status.outcome"),
            Column("Feasible", '.status.conditions[?(@.type=="Feasible")].status'),
            Column("Profile", ".status.profile"),
            Column("Device-Hours", ".status.deviceHours", priority=1),
            AGE,
            Column("Message", '.status.conditions[?(@.type=="Complete")].message'),
        ),
        rules=(JOB_NAME,),
    ),
    Definition(
        meta.PROFILE_KIND,
        meta.PROFILES,
        "sereprof",
        "A tuned routing policy, what it holds for, and the evidence. Immutable; its name stands for its content.",
        SereProfileSpec,
        None,
        (
            Column("Model", ".spec.key.modelName"),
            Column("Device", ".spec.key.device"),
            Column("Engine", ".spec.key.engineVersion"),
            Column("Certified", ".spec.evidence.certified", "boolean"),
            Column("Speedup", ".spec.evidence.speedup.value", "number"),
            Column("Drop", ".spec.evidence.accuracy.dropPoints", "number"),
            AGE,
        ),
    ),
)


def render(definition: Definition) -> str:
    """The file's whole text."""
    return HEADER + yaml.safe_dump(definition.to_dict(), sort_keys=False, width=120, allow_unicode=True)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for definition in DEFINITIONS:
        (folder / definition.file_name).write_text(render(definition))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "manifests/crd"))
