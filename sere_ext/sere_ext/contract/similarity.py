"""The similarity artefact: per MoE layer one [E, E] matrix, in safetensors with versioned metadata. Torch-free header.

Tensors are named `layer.<model layer number>`, symmetric, diagonal 1, larger is more alike: float32 [E, E], or packed
(`SimilarityMeta.packing`) the strict upper triangle row by row, int8 [E (E - 1) / 2]. Everything needed to refuse a wrong file stands in the header, so the operator and the tuner can judge one
without reading matrices.
"""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from sere_ext.contract.errors import SimilarityError
from sere_ext.contract.policy import Record, canonical_json
from sere_ext.contract.shards import SHARD_MAGIC
from sere_ext.contract.validation import explain

SCHEMA_VERSION = 1
_MAX_HEADER_BYTES = 16 * 1024 * 1024

Metric = Literal["frobenius", "cosine", "cka"]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class Changes(Record):
    """How many assignments differ between two versions of the matrices (`sere_ext.similarity.stability`)."""

    nearest: Share  # of experts whose most similar one differs
    stand_in: Share  # of secondary experts whose most similar active one differs, over random active sets
    worst_layer: int  # where `nearest` is largest
    worst_nearest: Share


class Packing(Record):
    """The matrices in one byte per pair (`sere_ext.similarity.packing`)."""

    kind: Literal["int8"] = "int8"
    source_digest: str  # of the float32 artefact
    scales: tuple[tuple[float, float], ...]  # (low, step) in the order of `layers`
    changes: Changes  # against the float32 artefact


class SimilarityMeta(Record):
    """What a similarity artefact was made from and of."""

    schema_version: Literal[1] = 1
    metric: Metric = "frobenius"
    model_type: str  # config.json's model_type
    model_name: str
    model_revision: str = ""
    config_digest: str  # see model_config_digest
    data_digest: str  # sha256 of the calibration file
    tokens: Annotated[int, Field(ge=0)]  # calibration tokens seen per layer
    layers: tuple[int, ...]  # model layer numbers that have a matrix
    num_experts: Annotated[int, Field(ge=1)]
    # Unset fields are left out of the digest, so files from before a field existed keep theirs.
    stability: Changes | None = None  # between the two halves of the calibration texts
    packing: Packing | None = None
    digest: str = ""  # similarity_digest() of this metadata and the matrices' bytes

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.packing is not None and len(self.packing.scales) != len(self.layers):
            raise ValueError(f"packing has {len(self.packing.scales)} scales for {len(self.layers)} layers")
        return self


# What of a model's config.json decides whether similarity still fits: shape and routing, not serving details.
_CONFIG_KEYS = (
    "model_type", "hidden_size", "num_hidden_layers", "moe_intermediate_size", "intermediate_size", "num_experts",
    "num_local_experts", "n_routed_experts", "num_experts_per_tok", "vocab_size", "first_k_dense_replace",
    "decoder_sparse_step", "mlp_only_layers",
)  # fmt: skip


def names_folder(model: str) -> bool:
    """Whether a model's name is meant as a local folder: a name of the hub has one slash at most."""
    return model.startswith(("/", ".", "~")) or model.count("/") > 1


def language_config(config: dict[str, object]) -> dict[str, object]:
    """A decoded config.json with the settings of its language model on top, which multimodal models nest."""
    text = config.get("text_config")
    return {**config, **text} if isinstance(text, dict) else config


def model_config_digest(config: dict[str, object]) -> str:
    """Digest of the parts of a decoded config.json that similarity depends on. `sha256:` and 64 hex digits."""
    source = language_config(config)
    return "sha256:" + hashlib.sha256(canonical_json({key: source.get(key) for key in _CONFIG_KEYS})).hexdigest()


def similarity_digest(meta: SimilarityMeta, matrices: dict[int, bytes]) -> str:
    """Content address of the matrices (raw little-endian bytes as stored, by layer) and of what they were made from."""
    state = hashlib.sha256(canonical_json(meta.model_copy(update={"digest": ""}).to_json_dict()))
    for layer in sorted(matrices):
        state.update(str(layer).encode())
        state.update(matrices[layer])
    return "sha256:" + state.hexdigest()


def similarity_file(digest: str) -> str:
    """The name under which the artefact with this digest lies in a policy directory."""
    return f"similarity-{digest.removeprefix('sha256:')[:12]}.safetensors"


def read_meta(path: str | Path) -> SimilarityMeta:
    """Read and check the header alone, and that the file is as long as the header says.

    Raises:
        SimilarityError: missing, truncated, not safetensors, no `sere` metadata, or another schema version.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            if SHARD_MAGIC.startswith(head) and len(head) == 8:
                raise SimilarityError(f"{path} is one shard of a similarity file; put it together with `sere similarity join`")
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else _MAX_HEADER_BYTES + 1
            if length > _MAX_HEADER_BYTES:
                raise SimilarityError(f"{path} is no safetensors file; make one with `sere calibrate MODEL --data FILE`")
            header = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise SimilarityError(f"no similarity file at {path}; make one with `sere calibrate MODEL --data FILE`") from error
    except (OSError, ValueError) as error:
        raise SimilarityError(f"{path} is truncated or unreadable ({error}); make it again with `sere calibrate`") from error
    raw, end = _described(path, header)
    if size != 8 + length + end:
        raise SimilarityError(f"{path} is truncated: {size} bytes of {8 + length + end}; copy or make it again")
    if raw.get("schemaVersion") != SCHEMA_VERSION:
        raise SimilarityError(
            f"{path} has schema version {raw.get('schemaVersion')}, this release reads {SCHEMA_VERSION}; "
            "make it again with `sere calibrate`"
        )
    try:
        return SimilarityMeta.model_validate(raw)
    except ValidationError as error:
        raise SimilarityError(f"{path}: {explain(error, SimilarityMeta)}") from error


def _described(path: Path, header: Any) -> tuple[dict[str, Any], int]:
    """What a safetensors header says: the `sere` metadata, decoded, and where the last tensor ends (bytes)."""
    text = header.get("__metadata__", {}).get("sere") if isinstance(header, dict) else None
    if text is None:
        raise SimilarityError(f"{path} has no sere metadata, so it is no similarity file; make one with `sere calibrate`")
    try:
        end = max((int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__"), default=0)
        return dict(json.loads(text)), end
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise SimilarityError(f"{path} has a damaged header ({error}); copy it or make it again with `sere calibrate`") from error
