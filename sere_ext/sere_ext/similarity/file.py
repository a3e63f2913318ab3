"""Similarity files with their matrices, and the neighbour lists that kernels use. No pickle anywhere.

The header is `sere_ext.contract.similarity`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sere_ext.contract.errors import SimilarityError
from sere_ext.contract.files import write_whole
from sere_ext.contract.model_config import model_config_digest
from sere_ext.contract.similarity import Packing, SimilarityMeta, meta_of, read_content, similarity_digest
from sere_ext.similarity.packing import Matrix, pack, unpack

_ASYMMETRY = 1e-5  # rounding of whoever made the file


@dataclass(frozen=True)
class Similarity:
    """A similarity file in memory: its header, and one [E, E] float32 matrix by model layer number."""

    meta: SimilarityMeta
    matrices: dict[int, Matrix]


def write_similarity(path: str | Path, meta: SimilarityMeta, matrices: dict[int, Matrix]) -> SimilarityMeta:
    """Write atomically (temporary file, rename); returns the metadata with layers and digest filled in.

    Args:
        meta: where it has `packing`, the matrices are packed by it (`packed_meta` makes such metadata).

    Raises:
        SimilarityError: a matrix is not symmetric or has no diagonal; such a file would be refused at reading.
    """
    from safetensors.numpy import save

    stored = dict(sorted(matrices.items()))
    for layer, matrix in stored.items():
        _check_matrix(str(path), layer, matrix)
    tensors: dict[int, np.ndarray[Any, Any]]
    if meta.packing is not None:
        tensors = {layer: pack(matrix)[0] for layer, matrix in stored.items()}
    else:
        tensors = {layer: np.ascontiguousarray(matrix, dtype="<f4") for layer, matrix in stored.items()}
    meta = meta.model_copy(update={"layers": tuple(stored), "digest": ""})
    meta = meta.model_copy(update={"digest": similarity_digest(meta, {n: t.tobytes() for n, t in tensors.items()})})
    text = json.dumps(meta.to_json_dict())
    write_whole(path, save({f"layer.{n}": t for n, t in tensors.items()}, metadata={"sere": text}))
    return meta


def read_similarity(path: str | Path) -> Similarity:
    """Read header and matrices, packed or not, and check shapes, digest and symmetry.

    Raises:
        SimilarityError: see `contract.similarity.read_meta`, and `parse_similarity`.
    """
    content, _ = read_content(path)
    return parse_similarity(content, str(path))


def parse_similarity(content: bytes, path: str) -> Similarity:
    """Check and unpack a whole similarity file in memory.

    Args:
        path: names the file in messages.

    Raises:
        SimilarityError: see `contract.similarity.read_meta`; also a wrong shape, content that its digest does not match, a matrix
            that is not symmetric or whose diagonal is not a number.
    """
    from safetensors.numpy import load

    meta = meta_of(content, path)
    try:
        tensors = load(content)
    except Exception as error:  # safetensors raises its own type for each kind of damage
        raise SimilarityError(f"{path} is damaged ({error}); make it again with `sere calibrate`") from error
    experts, packed = meta.num_experts, meta.packing is not None
    shape, dtype = ((experts * (experts - 1) // 2,), np.int8) if packed else ((experts, experts), np.float32)
    stored: dict[int, np.ndarray[Any, Any]] = {}
    for layer in meta.layers:
        tensor = tensors.get(f"layer.{layer}")
        if tensor is None or tensor.shape != shape or tensor.dtype != dtype:
            found = "is missing" if tensor is None else f"is {tensor.dtype} {list(tensor.shape)}"
            raise SimilarityError(
                f"{path}: layer.{layer} should be {np.dtype(dtype)} {list(shape)}, it {found}; make it again with `sere calibrate`"
            )
        stored[layer] = tensor
    if similarity_digest(meta, {n: t.tobytes() for n, t in stored.items()}) != meta.digest:
        raise SimilarityError(f"{path} is damaged: its content does not match its digest; copy or make it again")
    scales = meta.packing.scales if meta.packing is not None else ()
    matrices = {n: unpack(stored[n], s, experts) for n, s in zip(meta.layers, scales, strict=True)} if packed else stored
    for layer, matrix in matrices.items():
        _check_matrix(path, layer, matrix)
    return Similarity(meta, matrices)


def packed_meta(similarity: Similarity) -> SimilarityMeta:
    """The metadata with which `write_similarity` packs these matrices; says how many assignments packing changes.

    Raises:
        SimilarityError: the matrices are packed already, or hold NaN or infinity, which a byte cannot store.
    """
    from sere_ext.similarity.stability import changes

    meta = similarity.meta
    if meta.packing is not None:
        raise SimilarityError(f"the similarity of {meta.model_name} is packed already ({meta.packing.kind})")
    scales, after = [], {}
    for layer, matrix in sorted(similarity.matrices.items()):
        if not np.isfinite(matrix).all():
            raise SimilarityError(f"layer.{layer} holds values that are no numbers, which a byte cannot store; calibrate anew")
        triangle, scale = pack(matrix)
        scales.append(scale)
        after[layer] = unpack(triangle, scale, meta.num_experts)
    packing = Packing(source_digest=meta.digest, scales=tuple(scales), changes=changes(similarity.matrices, after))
    return meta.model_copy(update={"packing": packing})


def _check_matrix(where: str, layer: int, matrix: Matrix) -> None:
    """Raise SimilarityError unless the matrix is symmetric with numbers on its diagonal. NaN elsewhere is the least similar of all."""
    bad = np.flatnonzero(~np.isfinite(np.diag(matrix)))
    if bad.size:
        raise SimilarityError(f"{where}: layer.{layer} has no number for expert {bad[0]} with itself; calibrate anew")
    differ = np.argwhere(~np.isclose(matrix, matrix.T, rtol=0, atol=_ASYMMETRY, equal_nan=True))
    if differ.size:
        i, j = map(int, differ[0])
        raise SimilarityError(
            f"{where}: layer.{layer} is not symmetric: [{i}, {j}] is {matrix[i, j]:.6g}, [{j}, {i}] is {matrix[j, i]:.6g}; "
            "make it again with `sere calibrate`"
        )


def check_fits(
    similarity: Similarity, path: str | Path, *, config: dict[str, object], layers: tuple[int, ...], experts: int
) -> None:
    """Raise SimilarityError unless the artefact was made for this model (config.json's decoded content)."""
    meta = similarity.meta
    other = None
    if meta.config_digest != model_config_digest(config):
        other = f"{meta.model_type} '{meta.model_name}' with {meta.num_experts} experts, this is {config.get('model_type')}"
    elif meta.num_experts != experts:
        other = f"{meta.num_experts} experts, this model has {experts}"
    elif missing := sorted(set(layers) - set(meta.layers)):
        other = f"layers {list(meta.layers)}, the model's MoE layers {missing} are missing"
    if other:
        raise SimilarityError(f"{path} was made for another model: {other}; run `sere calibrate` on the model that is served")


def sorted_neighbours(matrix: Matrix) -> tuple[np.ndarray[Any, Any], Matrix]:
    """Per expert the others by falling similarity.

    Args:
        matrix: [E, E] float32. NaN counts as the least similar of all.

    Returns:
        ids int32 [E, E - 1] and similarities float32 [E, E - 1]; ties go to the lower id.
    """
    experts = matrix.shape[0]
    values = np.where(np.isnan(matrix), -np.inf, matrix).astype(np.float32)
    order = np.argsort(-values, axis=1, kind="stable")
    others = order[order != np.arange(experts)[:, None]].reshape(experts, max(experts - 1, 0))
    return others.astype(np.int32), np.take_along_axis(values, others, axis=1)
