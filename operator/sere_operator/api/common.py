"""Pieces of a spec that several resources use: sources of data, limits, the engine, where pods may run."""

from __future__ import annotations

import re
from typing import Annotated, Any, Self, TypeVar

from pydantic import Field, ValidationError, model_validator
from sere_ext.contract.errors import UsageError
from sere_ext.contract.policy import Record
from sere_ext.contract.validation import explain

# Flags of `vllm serve` that the spec or the operator sets. In extraArgs they would fight with it.
MANAGED_FLAGS: dict[str, str] = {
    "--model": "spec.model",
    "--revision": "spec.model.revision",
    "--served-model-name": "spec.model",
    "--tensor-parallel-size": "spec.engine.tensorParallelSize",
    "-tp": "spec.engine.tensorParallelSize",
    "--max-model-len": "spec.engine.maxModelLen",
    "--host": "the operator itself",
    "--port": "the operator itself",
    "--additional-config": "spec.routing",
    "--max-num-active-seqs": "the tuner's load; leave it to spec.tuning.workload",
    "--disable-log-stats": "the operator itself, whose canary reads the statistics",
    "--worker-extension-cls": "the plug-in itself",
}

DnsName = Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")]
Text = Annotated[str, Field(min_length=1, max_length=1024)]
Uri = Annotated[
    str,
    Field(
        min_length=1,
        max_length=1024,
        pattern=r"^(pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/.*)?|file:///.+)$",
        description="pvc://claim/path, mounted read-only by the operator, or file:///path inside the image or a volume",
    ),
]
SimilarityUri = Annotated[
    str,
    Field(
        min_length=1,
        max_length=1024,
        pattern=r"^(configmap://[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[-._a-zA-Z0-9]+|pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?/.+|file:///.+)$",
        description="a similarity.safetensors: configmap://name/key (of shards the first), pvc://claim/path, or file:///path inside the image",
    ),
]
AbsolutePath = Annotated[str, Field(min_length=2, max_length=1024, pattern=r"^/[^:]+$")]
Quantity = Annotated[
    int | str,
    Field(description="a Kubernetes quantity, such as 1, 500m or 16Gi", json_schema_extra={"x-kubernetes-int-or-string": True}),
]
_PVC = re.compile(r"^pvc://(?P<claim>[^/]+)(?:/(?P<path>.*))?$")
_DURATION = re.compile(r"^(?:(?P<h>\d+)h)?(?:(?P<m>\d+)m)?(?:(?P<s>\d+)s)?$")
Duration = Annotated[
    str, Field(pattern=r"^([0-9]+h)?([0-9]+m)?([0-9]+s)?$", min_length=2, max_length=16, description="such as 90s, 30m, 1h30m")
]


class SpecError(UsageError):
    """A spec that cannot be carried out. The message names the field."""


T = TypeVar("T", bound=Record)


def parse_spec(model: type[T], data: Any, where: str = "spec") -> T:
    """Read part of a resource.

    Raises:
        SpecError: one sentence per problem, each beginning with the field's path, e.g. `spec.routing.mode: ...`.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise SpecError(explain(error, model, where)) from error


def parse_pvc(uri: str) -> tuple[str, str] | None:
    """(claim, path inside it) of a `pvc://` URI, or None for any other: `pvc://data/a/b.jsonl` -> ("data", "a/b.jsonl")."""
    match = _PVC.match(uri)
    return (match["claim"], (match["path"] or "").strip("/")) if match else None


def duration_seconds(text: str) -> int:
    """`1h30m` -> 5400. Raises SpecError on anything else than hours, minutes and seconds in that order."""
    match = _DURATION.match(text)
    if not text or match is None:
        raise SpecError(f"{text!r} is no duration; write it like 90s, 30m or 1h30m")
    return int(match["h"] or 0) * 3600 + int(match["m"] or 0) * 60 + int(match["s"] or 0)


class KeyRef(Record):
    """A key of a ConfigMap or Secret in the resource's own namespace."""

    name: Annotated[DnsName, Field(description="of the object")]
    key: Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9]+$", description="in its data")]


class Source(Record):
    """A file: by URI, or as a key of a ConfigMap (up to 1 MiB)."""

    uri: Uri | None = None
    config_map: KeyRef | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.uri is None) == (self.config_map is None):
            raise ValueError("give exactly one of uri and configMap")
        return self


class Artefact(Record):
    """A similarity artefact made before by `sere calibrate`. Pods get it by ConfigMap; so the operator must be able to read it."""

    uri: SimilarityUri


class Claim(Record):
    """A PersistentVolumeClaim in the resource's own namespace."""

    claim_name: Annotated[DnsName, Field(description="PersistentVolumeClaim in the same namespace")]


class Model(Record):
    """What is served: a model hub's name, or a directory by URI."""

    name: Annotated[Text | None, Field(description="name on the model hub, such as Qwen/Qwen3-30B-A3B")] = None
    revision: Annotated[Text | None, Field(description="commit, tag or branch; with uri: a label of your own")] = None
    token_secret: Annotated[KeyRef | None, Field(description="Secret that holds the hub's token")] = None
    cache: Annotated[Claim | None, Field(description="claim for downloaded weights; default: an emptyDir per pod")] = None
    uri: Annotated[Uri | None, Field(description="model directory instead of a name: pvc://claim/path")] = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.name is None) == (self.uri is None):
            raise ValueError("give exactly one of name and uri")
        if self.uri is not None and (self.token_secret or self.cache):
            raise ValueError("tokenSecret and cache are for a name on the model hub; leave them out with uri")
        return self


class SecretEnv(Record):
    secret_key_ref: Annotated[KeyRef, Field(description="key of a Secret")]


# An engine's variables by which its command, its libraries or the plug-in's settings would be others than the operator's.
MANAGED_VARIABLES = ("PATH",)
MANAGED_PREFIXES = ("LD_", "PYTHON", "SERE_")
MANAGED_VARIABLE = "is set by the operator or the image (PATH, LD_*, PYTHON*, SERE_*); remove it here, or build an image with it"


class EnvVar(Record):
    """An environment variable of the engine's container."""

    name: Annotated[
        str, Field(min_length=1, max_length=256, pattern=r"^[-._a-zA-Z][-._a-zA-Z0-9]*$", description="of the variable")
    ]
    value: Annotated[str | None, Field(max_length=4096, description="plain text")] = None
    value_from: Annotated[SecretEnv | None, Field(description="from a Secret")] = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.value is not None and self.value_from is not None:
            raise ValueError("give value or valueFrom, not both")
        if self.name in MANAGED_VARIABLES or self.name.startswith(MANAGED_PREFIXES):
            raise ValueError(f"{self.name} {MANAGED_VARIABLE}")
        return self


class Engine(Record):
    """How vLLM is run."""

    image: Annotated[Text | None, Field(description="Default: the image that the operator was installed with.")] = None
    tensor_parallel_size: Annotated[int, Field(ge=1, le=64, description="GPUs per pod that share the model. Default: 1.")] = 1
    max_model_len: Annotated[
        int | None, Field(ge=1, le=16_777_216, description="longest context, in tokens. Default: the model's.")
    ] = None
    extra_args: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=4096)], ...],
        Field(max_length=64, description="further arguments of `vllm serve`; flags that the spec sets are refused"),
    ] = ()
    env: Annotated[tuple[EnvVar, ...], Field(max_length=64, description="further environment variables")] = ()

    @model_validator(mode="after")
    def _no_managed_flags(self) -> Self:
        for argument in self.extra_args:
            # `--a_b`, `--a-b=1` and `--a-b.c=1` are forms of `--a-b` to vLLM.
            flag = re.split("[=.]", argument)[0].replace("_", "-")
            if flag in MANAGED_FLAGS:
                raise ValueError(f"extraArgs: {flag} is set by {MANAGED_FLAGS[flag]}; remove it here")
        return self


class Resources(Record):
    """Requests and limits of a container, as Kubernetes takes them."""

    requests: Annotated[dict[str, Quantity] | None, Field(max_length=16, description="by resource name")] = None
    limits: Annotated[
        dict[str, Quantity] | None, Field(max_length=16, description="by resource name, such as nvidia.com/gpu")
    ] = None


class VolumeMount(Record):
    """A further claim, mounted read-only into engine and tuner pods."""

    name: Annotated[
        str,
        Field(min_length=1, max_length=40, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", description="of the volume in the pod"),
    ]
    claim_name: Annotated[DnsName, Field(description="PersistentVolumeClaim in the same namespace")]
    mount_path: Annotated[AbsolutePath, Field(description="where it is mounted")]
    sub_path: Annotated[str | None, Field(max_length=1024, description="folder of the claim. Default: its root.")] = None


class Toleration(Record):
    """A taint that the pods tolerate, as in a pod's spec."""

    key: Annotated[str | None, Field(max_length=317, description="of the taint. Default: every key.")] = None
    operator: Annotated[
        str | None, Field(pattern="^(Exists|Equal)$", max_length=6, description="Exists or Equal. Default: Equal.")
    ] = None
    value: Annotated[str | None, Field(max_length=63, description="of the taint")] = None
    effect: Annotated[
        str | None,
        Field(
            pattern="^(NoSchedule|PreferNoSchedule|NoExecute)$",
            max_length=16,
            description="NoSchedule, PreferNoSchedule or NoExecute. Default: every effect.",
        ),
    ] = None
    toleration_seconds: Annotated[int | None, Field(description="how long NoExecute is tolerated. Default: for ever.")] = None


class Percentiles(Record):
    """Limits in milliseconds on percentiles of a latency over requests. One or more."""

    p50: Annotated[float | None, Field(ge=0.001, le=86_400_000, description="limit on the median, ms")] = None
    p95: Annotated[float | None, Field(ge=0.001, le=86_400_000, description="limit on the 95th percentile, ms")] = None
    p99: Annotated[float | None, Field(ge=0.001, le=86_400_000, description="limit on the 99th percentile, ms")] = None

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not self.to_json_dict():
            raise ValueError("give at least one of p50, p95 and p99")
        return self


class Slo(Record):
    """Latency limits, defined as `vllm bench serve` defines the quantities."""

    tpot_ms: Annotated[Percentiles | None, Field(description="time per output token after the first, ms")] = None
    ttft_ms: Annotated[Percentiles | None, Field(description="time to the first token, ms")] = None
    e2el_ms: Annotated[Percentiles | None, Field(description="time from request to last token, ms")] = None

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.tpot_ms is None and self.ttft_ms is None and self.e2el_ms is None:
            raise ValueError("give at least one of tpotMs, ttftMs and e2elMs")
        return self
