"""Pieces of a spec that several resources use: sources of data, the engine, volumes, where pods may run."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar, Final, TypeVar

from pydantic import Field, ValidationError

from sere_ext.contract.constraints import Constrained, Constraint, at_most_one, exactly_one, rule
from sere_ext.contract.errors import SpecError
from sere_ext.contract.record import Record
from sere_ext.contract.tuning import EngineOptions
from sere_ext.contract.validation import explain

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
_PART = r"\.?[-_A-Za-z0-9][-._A-Za-z0-9]*"  # of a path; never `.` or `..`
RELATIVE_PATH: Final = f"^{_PART}(/{_PART})*$"
AbsolutePath = Annotated[str, Field(min_length=2, max_length=1024, pattern=f"^(/{_PART})+$")]
Quantity = Annotated[
    int | str,
    Field(description="a Kubernetes quantity, such as 1, 500m or 16Gi", json_schema_extra={"x-kubernetes-int-or-string": True}),
]
_PVC = re.compile(r"^pvc://(?P<claim>[^/]+)(?:/(?P<path>.*))?$")
_DURATION = re.compile(r"^(?:(?P<h>\d+)h)?(?:(?P<m>\d+)m)?(?:(?P<s>\d+)s)?$")
Duration = Annotated[
    str, Field(pattern=r"^([0-9]+h)?([0-9]+m)?([0-9]+s)?$", min_length=2, max_length=16, description="such as 90s, 30m, 1h30m")
]


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


OperatorName = Annotated[str, Field(max_length=512, description="namespace/lease of the operator that looks after it")]


class Challenger(Record):
    """Another operator that sees this resource and has asked whether its owner is still there."""

    name: Annotated[str, Field(max_length=512, description="of the operator that asks")]
    since: Annotated[str, Field(json_schema_extra={"format": "date-time"}, description="when it asked")]


class KeyRef(Record):
    """A key of a ConfigMap or Secret in the resource's own namespace."""

    name: Annotated[DnsName, Field(description="name of the object")]
    key: Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9]+$", description="key in the object's data")]


class Source(Constrained):
    """A file: by URI, or as a key of a ConfigMap (up to 1 MiB)."""

    constraints: ClassVar = (exactly_one("uri", "config_map"),)

    uri: Uri | None = None
    config_map: KeyRef | None = None


class Artefact(Record):
    """A similarity artefact made before by `sere calibrate`. Pods get it by ConfigMap; so the operator must be able to read it."""

    uri: SimilarityUri


class Claim(Record):
    """A PersistentVolumeClaim in the resource's own namespace."""

    claim_name: Annotated[DnsName, Field(description="PersistentVolumeClaim in the same namespace")]


class Model(Constrained):
    """What is served: a model hub's name, or a directory by URI."""

    constraints: ClassVar = (
        exactly_one("name", "uri"),
        rule(
            "!has(self.uri) || !(has(self.tokenSecret) || has(self.cache))",
            "tokenSecret and cache are for a name on the model hub; leave them out with uri",
            lambda model: model.uri is None or not (model.token_secret or model.cache),
        ),
    )

    name: Annotated[
        str | None,
        Field(
            min_length=1,
            max_length=253,
            pattern=r"^[A-Za-z0-9][-._A-Za-z0-9]*(/[A-Za-z0-9][-._A-Za-z0-9]*)?$",
            description="name on the model hub, such as Qwen/Qwen3-30B-A3B",
        ),
    ] = None
    revision: Annotated[
        str | None,
        Field(
            min_length=1,
            max_length=253,
            pattern=r"^[A-Za-z0-9][-._/A-Za-z0-9]*$",
            description="commit, tag or branch; with uri: a label of your own",
        ),
    ] = None
    token_secret: Annotated[KeyRef | None, Field(description="Secret that holds the hub's token")] = None
    cache: Annotated[Claim | None, Field(description="claim for downloaded weights; default: an emptyDir per pod")] = None
    uri: Annotated[Uri | None, Field(description="model directory instead of a name: pvc://claim/path")] = None


class SecretEnv(Record):
    secret_key_ref: Annotated[KeyRef, Field(description="key of a Secret")]


# An engine's variables by which its command, its libraries or the plug-in's settings would be others than the operator's.
MANAGED_VARIABLES: Final = ("PATH",)
MANAGED_PREFIXES: Final = ("LD_", "PYTHON", "SERE_")
MANAGED_VARIABLE: Final = (
    "is set by the operator or the image (PATH, LD_*, PYTHON*, SERE_*); remove it here, or build an image with it"
)


def _managed(variable: EnvVar) -> str | None:
    managed = variable.name in MANAGED_VARIABLES or variable.name.startswith(MANAGED_PREFIXES)
    return f"{variable.name} {MANAGED_VARIABLE}" if managed else None


class EnvVar(Constrained):
    """An environment variable of the engine's container."""

    constraints: ClassVar = (
        at_most_one("value", "value_from"),
        Constraint(
            f"!(self.name in {list(MANAGED_VARIABLES)} || {list(MANAGED_PREFIXES)}.exists(b, self.name.startsWith(b)))",
            f"this variable {MANAGED_VARIABLE}",
            _managed,
            f"self.name + ' {MANAGED_VARIABLE}'",
        ),
    )

    name: Annotated[
        str, Field(min_length=1, max_length=256, pattern=r"^[-._a-zA-Z][-._a-zA-Z0-9]*$", description="name of the variable")
    ]
    value: Annotated[str | None, Field(max_length=4096, description="plain text")] = None
    value_from: Annotated[SecretEnv | None, Field(description="from a Secret")] = None


class Shutdown(Record):
    """How a pod ends: it is taken out of the Service, then it finishes what it answers."""

    grace_seconds: Annotated[
        int, Field(ge=0, le=86_400, description="for requests in flight; then they are aborted. Default: 120.")
    ] = 120


class Engine(EngineOptions):
    """How vLLM is run."""

    image: Annotated[Text | None, Field(description="Default: the image that the operator was installed with.")] = None
    env: Annotated[tuple[EnvVar, ...], Field(max_length=64, description="further environment variables")] = ()
    api_key_secret: Annotated[
        KeyRef | None,
        Field(
            description="Secret with the key that clients must send. The operator sends it too, and needs the right to read it."
        ),
    ] = None
    shutdown: Annotated[Shutdown, Field(description="how a pod ends")] = Shutdown()


class Resources(Record):
    """Requests and limits of a container, as Kubernetes takes them."""

    requests: Annotated[dict[str, Quantity] | None, Field(max_length=16, description="by resource name")] = None
    limits: Annotated[
        dict[str, Quantity] | None, Field(max_length=16, description="by resource name, such as nvidia.com/gpu")
    ] = None


# Paths at which the operator mounts models, data, policies and writable folders.
RESERVED_PATHS: Final = (
    "/dev", "/etc/sere", "/etc/sere-data", "/etc/sere-tuning", "/mnt/pvc", "/proc", "/sys", "/tmp", "/var/cache/sere",
    "/var/lib/sere", "/var/run/secrets",
)  # fmt: skip


EMPTY_AT_FIRST: Final = "/tmp"  # a volume below it hides nothing


def _is_free(path: str) -> bool:
    """Whether no reserved path lies at, above or below a path."""
    return not any(
        path == r or (r != EMPTY_AT_FIRST and path.startswith(r + "/")) or r.startswith(path + "/") for r in RESERVED_PATHS
    )


class VolumeMount(Constrained):
    """A further claim, mounted read-only into engine and tuner pods."""

    constraints: ClassVar = (
        rule(
            f"!{list(RESERVED_PATHS)}.exists(r, self.mountPath == r || (r != '{EMPTY_AT_FIRST}' && "
            "self.mountPath.startsWith(r + '/')) || r.startsWith(self.mountPath + '/'))",
            f"mountPath hides what the operator mounts; choose one that is not at, above or below {', '.join(RESERVED_PATHS)}",
            lambda volume: _is_free(volume.mount_path),
            field="mountPath",
        ),
    )

    name: Annotated[
        str,
        Field(min_length=1, max_length=40, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", description="of the volume in the pod"),
    ]
    claim_name: Annotated[DnsName, Field(description="PersistentVolumeClaim in the same namespace")]
    mount_path: Annotated[AbsolutePath, Field(description="where it is mounted")]
    sub_path: Annotated[
        str | None,
        Field(max_length=1024, pattern=RELATIVE_PATH, description="folder of the claim. Default: its root."),
    ] = None


Volumes = Annotated[tuple[VolumeMount, ...], Field(max_length=16, description="further claims, mounted read-only")]


def volumes_apart(field: str) -> tuple[Constraint, ...]:
    """Rules of a record with a list of volumes: no two of one name, and no two at one place or one below the other.

    Args:
        field: of the list, by its Python name, which is its outside name as well.
    """
    here = f"self.{field}"
    return (
        rule(
            f"!has({here}) || {here}.all(v, {here}.exists_one(w, w.name == v.name))",
            f"{field}: two volumes have one name; give each its own",
            lambda record: _apart(volume.name for volume in getattr(record, field)),
            field=field,
        ),
        rule(
            f"!has({here}) || {here}.all(v, {here}.exists_one(w, w.mountPath == v.mountPath || "
            "v.mountPath.startsWith(w.mountPath + '/')))",
            f"{field}: a volume is mounted at or below the mountPath of another one, which hides it; give each its own",
            lambda record: not _nested(volume.mount_path for volume in getattr(record, field)),
            field=field,
        ),
    )


def volumes_beside_tuning() -> Constraint:
    """Rule of a record with `volumes` and `tuning.volumes`, which the tuning pod mounts both."""
    return rule(
        "!has(self.volumes) || !has(self.tuning) || !has(self.tuning.volumes) || self.volumes.all(v, self.tuning.volumes.all(w, "
        "v.name != w.name && !(v.mountPath + '/').startsWith(w.mountPath + '/') && "
        "!(w.mountPath + '/').startsWith(v.mountPath + '/')))",
        "tuning.volumes: a volume has the name or the mountPath of one of spec.volumes, or lies above or below it; the tuning pod "
        "mounts both, so give each its own",
        lambda record: _fit_beside(record.volumes, record.tuning.volumes if record.tuning is not None else ()),
    )


def _fit_beside(some: tuple[VolumeMount, ...], others: tuple[VolumeMount, ...]) -> bool:
    both = (*some, *others)
    return _apart(v.name for v in both) and not _nested(v.mount_path for v in both)


def _apart(names: Iterable[str]) -> bool:
    listed = list(names)
    return len(listed) == len(set(listed))


def _nested(paths: Iterable[str]) -> bool:
    listed = sorted(f"{path}/" for path in paths)
    return any(after.startswith(before) for before, after in itertools.pairwise(listed))


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


class ContestedField(Record):
    """A field that the operator put back, and that somebody else changed again."""

    object: Annotated[str, Field(description="kind and name")]
    field: Annotated[str, Field(description="path in the object")]
    times: Annotated[int, Field(description="that it was changed; above 2 it is left as it is")]
    at: Annotated[str, Field(json_schema_extra={"format": "date-time"}, description="the last time")]


ContestedFields = Annotated[
    tuple[ContestedField, ...], Field(max_length=32, description="fields of children that somebody else changes, too")
]
