"""The header of a similarity file: per MoE layer one [E, E] matrix, in safetensors with versioned metadata.

Tensors are named `layer.<model layer number>`, symmetric, diagonal 1, larger is more alike: float32 [E, E], or packed
(`SimilarityMeta.packing`) the strict upper triangle row by row, int8 [E (E - 1) / 2]. Everything needed to refuse a wrong file
stands in the header, so the operator and the tuner can judge a file without reading matrices.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, Self

from pydantic import Field, ValidationError, model_validator

from sere_ext.contract.errors import SimilarityError
from sere_ext.contract.record import Record, canonical_json
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


def similarity_digest(meta: SimilarityMeta, matrices: dict[int, bytes]) -> str:
    """Content address of the matrices (raw little-endian bytes as stored, by layer) and of what they were made from."""
    state = hashlib.sha256(canonical_json(meta.model_copy(update={"digest": ""}).to_json_dict()))
    for layer in sorted(matrices):
        state.update(str(layer).encode())
        state.update(matrices[layer])
    return "sha256:" + state.hexdigest()


def read_meta(path: str | Path) -> SimilarityMeta:
    """Read and check the header alone, and that the file is as long as the header says.

    Raises:
        SimilarityError: missing, truncated, not safetensors, no `sere` metadata, or another schema version.
    """
    with _readable(path), Path(path).open("rb") as file:
        return _header(file, Path(path).stat().st_size, str(path)).meta


def read_content(path: str | Path) -> tuple[bytes, SimilarityMeta]:
    """The whole file, for a process elsewhere, with its header, which is checked as in `read_meta`."""
    with _readable(path):
        content = Path(path).read_bytes()
    return content, meta_of(content, str(path))


def meta_of(content: bytes, where: str) -> SimilarityMeta:
    """The header of a file in memory, checked as in `read_meta`; `where` names the file in messages."""
    return _header(io.BytesIO(content), len(content), where).meta


@contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise SimilarityError(f"no similarity file at {path}; make one with `sere calibrate MODEL --data FILE`") from error
    except OSError as error:
        raise SimilarityError(f"{path} is truncated or unreadable ({error}); make it again with `sere calibrate`") from error


def verified_digest(content: bytes) -> str:
    """The digest of a similarity file, recomputed from its matrices.

    Args:
        content: the whole file.

    Raises:
        SimilarityError: see `read_meta`; also content that does not match its digest.
    """
    where = "the similarity artefact"
    header = _header(io.BytesIO(content), len(content), where)
    matrices = {layer: content[header.start + begin : header.start + end] for layer, (begin, end) in header.spans.items()}
    digest = similarity_digest(header.meta, matrices)
    if digest != header.meta.digest:
        raise SimilarityError(f"{where} says it is {header.meta.digest}, its content is {digest}; make it again")
    return digest


@dataclass(frozen=True)
class _Header:
    meta: SimilarityMeta
    start: int  # bytes before the matrices
    spans: dict[int, tuple[int, int]]  # by layer: first byte of its matrix and the one after its last, from `start`


def _header(file: BinaryIO, size: int, where: str) -> _Header:
    """The header of a similarity file: 8 bytes of length (little-endian), that many bytes of JSON, then the matrices.

    Args:
        size: bytes of the whole file.
        where: the file's name in messages.

    Raises:
        SimilarityError: see `read_meta`.
    """
    head = file.read(8)
    if SHARD_MAGIC.startswith(head) and len(head) == 8:
        raise SimilarityError(f"{where} is one shard of a similarity file; put it together with `sere similarity join`")
    length = struct.unpack("<Q", head)[0] if len(head) == 8 else _MAX_HEADER_BYTES + 1
    if length > _MAX_HEADER_BYTES:
        raise SimilarityError(f"{where} is no safetensors file; make one with `sere calibrate MODEL --data FILE`")
    try:
        header = json.loads(file.read(length))
    except ValueError as error:
        raise SimilarityError(f"{where} is truncated or unreadable ({error}); make it again with `sere calibrate`") from error
    text = (header.pop("__metadata__", None) or {}).get("sere") if isinstance(header, dict) else None
    if text is None:
        raise SimilarityError(f"{where} has no sere metadata, so it is no similarity file; make one with `sere calibrate`")
    try:
        raw = dict(json.loads(text))
        spans = {
            int(name.removeprefix("layer.")): (int(entry["data_offsets"][0]), int(entry["data_offsets"][1]))
            for name, entry in header.items()
        }
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise SimilarityError(
            f"{where} has a damaged header ({error}); copy it or make it again with `sere calibrate`"
        ) from error
    whole = 8 + length + max((end for _, end in spans.values()), default=0)
    if size != whole:
        raise SimilarityError(f"{where} is truncated: {size} bytes of {whole}; copy or make it again")
    if raw.get("schemaVersion") != SCHEMA_VERSION:
        raise SimilarityError(
            f"{where} has schema version {raw.get('schemaVersion')}, this release reads {SCHEMA_VERSION}; "
            "make it again with `sere calibrate`"
        )
    try:
        return _Header(SimilarityMeta.model_validate(raw), 8 + length, spans)
    except ValidationError as error:
        raise SimilarityError(f"{where}: {explain(error, SimilarityMeta)}") from error
