"""Reading and writing the similarity artefact's matrices, and the neighbour lists that kernels use.

The header's types are in `similarity.py` (torch-free); here are the tensors. No pickle anywhere.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sere_ext.errors import SimilarityError
from sere_ext.similarity import SimilarityMeta, model_config_digest, read_meta, similarity_digest

Matrix = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True)
class Similarity:
    """A loaded artefact: header and one [E, E] float32 matrix per model layer number."""

    meta: SimilarityMeta
    matrices: dict[int, Matrix]


def write_similarity(path: str | Path, meta: SimilarityMeta, matrices: dict[int, Matrix]) -> SimilarityMeta:
    """Write atomically (temporary file, rename); returns the metadata with the digest filled in."""
    from safetensors.numpy import save

    little = {layer: np.ascontiguousarray(matrix, dtype="<f4") for layer, matrix in sorted(matrices.items())}
    meta = meta.model_copy(update={"layers": tuple(little), "digest": ""})
    meta = meta.model_copy(update={"digest": similarity_digest(meta, {n: m.tobytes() for n, m in little.items()})})
    text = json.dumps(meta.to_json_dict())
    path = Path(path)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(save({f"layer.{n}": m for n, m in little.items()}, metadata={"sere": text}))
    draft.replace(path)
    return meta


def read_similarity(path: str | Path) -> Similarity:
    """Read header and matrices, and check shape and digest.

    Raises:
        SimilarityError: see `similarity.read_meta`; also a wrong shape, or content that its digest does not match.
    """
    from safetensors.numpy import load

    meta = read_meta(path)
    try:
        tensors = load(Path(path).read_bytes())
    except Exception as error:  # safetensors raises its own type for each kind of damage
        raise SimilarityError(f"{path} is damaged ({error}); make it again with `sere calibrate`") from error
    matrices: dict[int, Matrix] = {}
    for layer in meta.layers:
        matrix = tensors.get(f"layer.{layer}")
        if matrix is None or matrix.shape != (meta.num_experts, meta.num_experts) or matrix.dtype != np.float32:
            shape = f"[{meta.num_experts}, {meta.num_experts}]"
            raise SimilarityError(f"{path}: layer.{layer} should be float32 {shape}; make it again with `sere calibrate`")
        matrices[layer] = matrix
    if similarity_digest(meta, {n: m.tobytes() for n, m in matrices.items()}) != meta.digest:
        raise SimilarityError(f"{path} is damaged: its content does not match its digest; copy or make it again")
    return Similarity(meta, matrices)


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


def model_config_dict(model: str, revision: str | None = None) -> dict[str, object]:
    """The decoded config.json of a model directory or hub name, as `model_config_digest` expects it."""
    local = Path(model) / "config.json"
    if local.is_file():
        decoded: dict[str, object] = json.loads(local.read_text())
        return decoded
    from transformers import PretrainedConfig

    return dict(PretrainedConfig.get_config_dict(model, revision=revision)[0])
