"""The similarity artefact: measured right, written so that every wrong or damaged file is refused with a way out."""

from __future__ import annotations

import base64
import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from sere_ext.contract.errors import SimilarityError
from sere_ext.contract.model_config import model_config_digest
from sere_ext.contract.similarity import Changes, SimilarityMeta, read_meta, similarity_digest, verified_digest
from sere_ext.similarity.file import check_fits, packed_meta, read_similarity, sorted_neighbours, write_similarity
from sere_ext.similarity.heatmap import render
from sere_ext.similarity.packing import pack, unpack
from sere_ext.similarity.stability import changes, describe
from tests.kit.matrices import symmetric

CONFIG: dict[str, object] = {"model_type": "qwen3_moe", "num_experts": 3, "hidden_size": 8}


def artefact(path: Path, layers: tuple[int, ...] = (0, 2)) -> SimilarityMeta:
    rng = np.random.default_rng(0)
    matrices = {layer: symmetric(rng.random((3, 3))) for layer in layers}
    return write_similarity(path, described(layers), matrices)


def described(layers: tuple[int, ...] = (0,)) -> SimilarityMeta:
    return SimilarityMeta(
        model_type="qwen3_moe", model_name="tiny", config_digest=model_config_digest(CONFIG), data_digest="sha256:0",
        tokens=10, layers=layers, num_experts=3,
    )  # fmt: skip


def forge(path: Path, tensor: Any, **changed: Any) -> Path:
    """A file that is right in itself (length, digest) but for what is forged."""
    meta = described().model_copy(update={"digest": similarity_digest(described(), {0: tensor.tobytes()})})
    save_file({"layer.0": tensor}, path, metadata={"sere": json.dumps({**meta.to_json_dict(), **changed})})
    return path


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


GOOD = symmetric(np.random.default_rng(1).random((3, 3)))


@pytest.mark.parametrize(
    ("tensor", "changed", "says"),
    [
        (GOOD, {"schemaVersion": 7}, "has schema version 7, this release reads 1"),
        (GOOD, {"metric": "rbf"}, r"metric: .* \(got 'rbf'\)"),
        (GOOD, {"surprise": 1}, "surprise: unknown field"),
        (GOOD[:2], {}, r"layer.0 should be float32 \[3, 3\], it is float32 \[2, 3\]"),
        (GOOD.astype(np.float64), {}, r"it is float64 \[3, 3\]"),
        (GOOD, {"layers": [1]}, r"layer.1 should be float32 \[3, 3\], it is missing"),
        (
            np.where(np.eye(3) * [[0, 1, 0]], np.nan, GOOD).astype(np.float32),
            {},
            "layer.0 has no number for expert 1 with itself",
        ),
        (
            GOOD + np.float32(0.1) * np.triu(np.ones((3, 3), np.float32), 1),
            {},
            r"layer.0 is not symmetric: \[0, 1\] is 1\.04\d+, \[1, 0\] is 0\.94",
        ),
    ],
)
def test_a_wrong_file_is_refused_with_what_is_wrong(tmp_path: Path, tensor: Any, changed: dict[str, Any], says: str) -> None:
    with pytest.raises(SimilarityError, match=says):
        read_similarity(forge(tmp_path / "s.safetensors", tensor, **changed))
    read_similarity(forge(tmp_path / "right.safetensors", GOOD))


@pytest.mark.parametrize("sere", ["[1]", "no json", "7"])
def test_a_header_that_is_no_metadata_is_refused(tmp_path: Path, sere: str) -> None:
    save_file({"layer.0": GOOD}, tmp_path / "s.safetensors", metadata={"sere": sere})
    with pytest.raises(SimilarityError, match="damaged header"):
        read_meta(tmp_path / "s.safetensors")
    (tmp_path / "s.safetensors").write_bytes(struct.pack("<Q", 2) + b"[]")
    with pytest.raises(SimilarityError, match="no sere metadata"):
        read_meta(tmp_path / "s.safetensors")


def test_a_wrong_matrix_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(SimilarityError, match="not symmetric"):
        write_similarity(tmp_path / "s", described(), {0: np.arange(9, dtype=np.float32).reshape(3, 3)})
    assert list(tmp_path.iterdir()) == []


def test_digests_of_files_from_before_a_field_existed_stay() -> None:
    """Pinned: profiles and policies hold these digests."""
    assert similarity_digest(described(), {0: bytes(36)}) == PINNED


PINNED = "sha256:2c19202b0ea46a948e81fdf59b432825957e5bd8fcbe3c49d6a7f185849be226"


@given(st.integers(1, 12), st.floats(0, 1), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_a_packed_matrix_is_off_by_half_a_step_at_most(experts: int, a: float, b: float, seed: int) -> None:
    matrix = symmetric(min(a, b) + abs(a - b) * np.random.default_rng(seed).random((experts, experts)))
    triangle, (low, step) = pack(matrix)
    assert triangle.dtype == np.int8 and triangle.shape == (experts * (experts - 1) // 2,)
    back = unpack(triangle, (low, step), experts)
    assert step <= abs(a - b) / 255 + 1e-6
    np.testing.assert_allclose(back, matrix, atol=step / 2 + 1e-6)
    np.testing.assert_array_equal(back, back.T)


def test_packed_files_are_read_like_others_and_say_what_packing_changed(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    matrices = {n: symmetric(rng.random((64, 64))) for n in (1, 3)}
    meta = described((1, 3)).model_copy(update={"num_experts": 64})
    plain = write_similarity(tmp_path / "p", meta, matrices)
    similarity = read_similarity(tmp_path / "p")
    packed = write_similarity(tmp_path / "q", packed_meta(similarity), matrices)
    back = read_similarity(tmp_path / "q")
    assert packed.packing is not None and packed.packing.source_digest == plain.digest != packed.digest
    assert packed.packing.changes == changes(matrices, back.matrices), "what was stored is what a reader gets"
    assert 0 < packed.packing.changes.nearest < 0.3
    assert (tmp_path / "q").stat().st_size < 2 * 64 * 63 // 2 + 2000
    check_fits(back, "q", config=CONFIG, layers=(1, 3), experts=64)
    for path in ("p", "q"):
        assert verified_digest((tmp_path / path).read_bytes()) == read_meta(tmp_path / path).digest
    with pytest.raises(SimilarityError, match="packed already"):
        packed_meta(back)
    matrices[1][0, 1] = matrices[1][1, 0] = np.nan
    write_similarity(tmp_path / "n", meta, matrices)
    with pytest.raises(SimilarityError, match=r"layer.1 holds values that are no numbers"):
        packed_meta(read_similarity(tmp_path / "n"))
    raw = bytearray((tmp_path / "q").read_bytes())
    raw[-3] ^= 1
    (tmp_path / "q").write_bytes(raw)
    with pytest.raises(SimilarityError, match="does not match its digest"):
        read_similarity(tmp_path / "q")


def test_changed_assignments_are_counted_by_who_stands_in_for_whom() -> None:
    before = symmetric(np.array([[1, 0.9, 0.1, 0.2], [0.9, 1, 0.3, 0.2], [0.1, 0.3, 1, 0.8], [0.2, 0.2, 0.8, 1]]))
    assert changes({5: before}, {5: before * 0.5 + 0.1}) == Changes(nearest=0, stand_in=0, worst_layer=5, worst_nearest=0)
    after = before.copy()
    after[0, 2] = after[2, 0] = 0.95  # expert 0 now goes to 2, expert 2 to 0; 1 and 3 stay
    found = changes({5: before, 6: before}, {5: after, 6: before})
    assert (found.nearest, found.worst_layer, found.worst_nearest) == (0.25, 5, 0.5)
    assert changes({5: before, 6: before}, {5: before, 6: after}).worst_layer == 6
    assert describe(found).startswith("25.0 % of nearest experts and ")
    # With one active expert nobody has a choice, so a stand-in can differ only where several are active.
    assert found.stand_in == 0
    many = np.random.default_rng(0).random((16, 16))
    moved = changes({0: symmetric(many)}, {0: symmetric(many.T[::-1, ::-1])})
    assert 0.5 < moved.stand_in <= 1 and 0.5 < moved.nearest <= 1


def test_the_page_of_heat_maps_needs_nothing_from_outside(tmp_path: Path) -> None:
    artefact(tmp_path / "s", layers=(0, 2))
    similarity = read_similarity(tmp_path / "s")
    page = render(similarity)
    assert "http" not in page and "src=" not in page and "{" + "title}" not in page
    assert page.count("<figure>") == 2 and "layer 2" in page and similarity.meta.digest in page
    levels = [base64.b64decode(part.split('"')[0]) for part in page.split('data-levels="')[1:]]
    assert list(levels[1]) == np.rint(similarity.matrices[2].clip(0, 1) * 255).astype(int).reshape(-1).tolist()
    named = similarity.meta.model_copy(update={"model_name": "<b>"})
    assert "<b>" not in render(type(similarity)(named, similarity.matrices))
