"""The similarity artefact: measured right, written so that every wrong or damaged file is refused with a way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sere_ext.artifact import check_fits, read_similarity, sorted_neighbours, write_similarity
from sere_ext.calibrate import GramSum, frobenius, read_texts
from sere_ext.errors import SimilarityError, UnsupportedError, UsageError
from sere_ext.similarity import SimilarityMeta, model_config_digest, read_meta

CONFIG: dict[str, object] = {"model_type": "qwen3_moe", "num_experts": 3, "hidden_size": 8}


def artefact(path: Path, layers: tuple[int, ...] = (0, 2)) -> SimilarityMeta:
    rng = np.random.default_rng(0)
    matrices = {layer: rng.random((3, 3)).astype(np.float32) for layer in layers}
    meta = SimilarityMeta(
        model_type="qwen3_moe", model_name="tiny", config_digest=model_config_digest(CONFIG), data_digest="sha256:0",
        tokens=10, layers=layers, num_experts=3,
    )  # fmt: skip
    return write_similarity(path, meta, matrices)


def test_what_is_written_is_read_back_and_content_addressed(tmp_path: Path) -> None:
    first, second = artefact(tmp_path / "a.safetensors"), artefact(tmp_path / "b.safetensors")
    assert first.digest == second.digest
    assert first.digest.startswith("sha256:")
    loaded = read_similarity(tmp_path / "a.safetensors")
    assert loaded.meta == first == read_meta(tmp_path / "a.safetensors")
    assert sorted(loaded.matrices) == [0, 2]
    assert artefact(tmp_path / "c.safetensors", layers=(0,)).digest != first.digest
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == [], "no draft is left behind"


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "s.safetensors"
    artefact(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(SimilarityError, match=r"sere calibrate|make it again"):
        read_similarity(path)


def test_damage_in_the_matrices_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    artefact(path)
    raw = bytearray(path.read_bytes())
    raw[-2] ^= 0xFF
    path.write_bytes(raw)
    with pytest.raises(SimilarityError, match="does not match its digest"):
        read_similarity(path)


@pytest.mark.parametrize(
    ("config", "layers", "experts", "says"),
    [
        ({**CONFIG, "model_type": "deepseek_v2"}, (0, 2), 3, "qwen3_moe 'tiny' with 3 experts, this is deepseek_v2"),
        (CONFIG, (0, 1, 2), 3, r"MoE layers \[1\] are missing"),
        (CONFIG, (0, 2), 4, "3 experts, this model has 4"),
    ],
)
def test_a_file_of_another_model_is_refused(
    tmp_path: Path, config: dict[str, object], layers: tuple[int, ...], experts: int, says: str
) -> None:
    path = tmp_path / "s.safetensors"
    artefact(path)
    with pytest.raises(SimilarityError, match=f"made for another model: .*{says}.*run `sere calibrate`"):
        check_fits(read_similarity(path), path, config=config, layers=layers, experts=experts)
    check_fits(read_similarity(path), path, config=CONFIG, layers=(0, 2), experts=3)


def test_neighbours_are_sorted_and_ties_go_to_the_lower_id() -> None:
    matrix = np.array([[1, 0.5, np.nan, 0.5], [0, 1, 0.2, 0.9], [0.1, 0.1, 1, 0.1], [3, 2, 1, 1]], np.float32)
    ids, values = sorted_neighbours(matrix)
    assert ids.tolist() == [[1, 3, 2], [3, 2, 0], [0, 1, 3], [0, 1, 2]]
    assert ids.dtype == np.int32
    assert values[0].tolist() == [0.5, 0.5, -np.inf]
    assert sorted_neighbours(np.ones((1, 1), np.float32))[0].shape == (1, 0)


def experts_module(kind: str) -> Any:
    """Four experts, H = 8, I = 6; 1 is twice 0, so it answers alike up to scale."""
    torch.manual_seed(0)
    stacked = torch.nn.Module()
    stacked.num_experts, stacked.act_fn = 4, torch.nn.functional.silu  # type: ignore[assignment]
    stacked.gate_up_proj = torch.nn.Parameter(torch.randn(4, 12, 8))
    stacked.down_proj = torch.nn.Parameter(torch.randn(4, 8, 6))
    if kind == "stacked":
        return stacked

    class Expert(torch.nn.Module):
        def __init__(self, index: int) -> None:
            super().__init__()
            self.index = index

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            gate, up = (x @ stacked.gate_up_proj[self.index].T).chunk(2, -1)
            return (torch.nn.functional.silu(gate) * up) @ stacked.down_proj[self.index].T

    return torch.nn.ModuleList(Expert(i) for i in range(4))


@pytest.mark.parametrize("kind", ["stacked", "list"])
def test_streamed_frobenius_equals_the_definition(kind: str) -> None:
    """Against ||Ei - Ej||_F over all outputs held at once, and independent of how tokens were cut into chunks."""
    experts, inputs = experts_module(kind), torch.randn(37, 8)
    total = GramSum(experts)
    with torch.no_grad():
        for start in range(0, 37, 5):
            total.add(inputs[start : start + 5])
        stacked = experts_module("stacked")
        outputs = []
        for e in range(4):
            gate, up = (inputs @ stacked.gate_up_proj[e].T).chunk(2, -1)
            outputs.append(((torch.nn.functional.silu(gate) * up) @ stacked.down_proj[e].T).double())
    distance = torch.stack([torch.stack([(a - b).norm() for b in outputs]) for a in outputs])
    want = (1 - distance / distance.max()).numpy()
    got = frobenius(total.gram)
    assert total.tokens == 37
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.diag(got).tolist() == [1, 1, 1, 1]
    np.testing.assert_array_equal(got, got.T)


def test_experts_that_all_answer_the_same_are_all_alike() -> None:
    assert frobenius(np.ones((3, 3))).tolist() == np.ones((3, 3)).tolist()


def test_experts_of_an_unknown_form_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="Linear are not known"):
        GramSum(torch.nn.Linear(2, 2))


def test_calibration_texts(tmp_path: Path) -> None:
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text(json.dumps({"prompt": "1+1=", "answer": "2"}) + "\n\n" + json.dumps({"text": "t"}) + "\n")
    assert read_texts(jsonl) == ["1+1=2", "t"]
    plain = tmp_path / "a.txt"
    plain.write_text("one\ntwo\n")
    assert read_texts(plain) == ["one", "two"]
    for text, says in (("", "holds no calibration text"), ('{"x": 1}', ":1: each line should be"), ("[1]", ":1:"), ("{", ":1:")):
        jsonl.write_text(text)
        with pytest.raises(UsageError, match=says):
            read_texts(jsonl)
    with pytest.raises(UsageError, match="cannot read the calibration data"):
        read_texts(tmp_path / "missing.jsonl")
