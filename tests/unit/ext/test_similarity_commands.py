"""`sere similarity`: show, pack, shard, join, on real files; errors end with one sentence and exit code 2."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from sere_ext.cli.commands import register
from sere_ext.contract.errors import UsageError
from sere_ext.contract.similarity import Changes, SimilarityMeta, read_meta
from sere_ext.similarity.file import write_similarity
from tests.kit.matrices import symmetric

EXPERTS = 32


def sere(*words: object) -> Result:
    app = typer.Typer()
    register(app)
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def similarity(tmp_path: Path) -> Path:
    matrix = symmetric(np.random.default_rng(0).random((EXPERTS, EXPERTS)).astype(np.float32))
    meta = SimilarityMeta(
        model_type="m", model_name="tiny", model_revision="0a1b", config_digest="sha256:0", data_digest="sha256:1", tokens=7,
        layers=(4,), num_experts=EXPERTS, stability=Changes(nearest=0.25, stand_in=0.125, worst_layer=4, worst_nearest=0.25),
    )  # fmt: skip
    write_similarity(tmp_path / "s.safetensors", meta, {4: matrix})
    return tmp_path / "s.safetensors"


def test_show_says_what_it_is_and_how_far_it_can_be_trusted(similarity: Path, tmp_path: Path) -> None:
    shown = sere("similarity", "show", similarity, "--report", tmp_path / "r.html")
    assert shown.exit_code == 0
    assert "layer 4: nearest expert" in shown.output
    assert "stability: 25.0 % of nearest experts and 12.5 % of stand-ins" in shown.output
    assert f"1 layers, 32 experts, 7 tokens, tiny at 0a1b, {read_meta(similarity).digest}" in shown.output
    assert "layer 4" in (tmp_path / "r.html").read_text()
    assert json.loads(sere("similarity", "show", similarity, "--json").output) == read_meta(similarity).to_json_dict()


def test_packed_sharded_and_joined_it_is_the_same_file(similarity: Path, tmp_path: Path) -> None:
    packed = tmp_path / "p.safetensors"
    said = sere("similarity", "pack", similarity, "--out", packed)
    assert said.exit_code == 0 and "packing changes" in said.output and read_meta(packed).digest in said.output
    assert packed.stat().st_size < similarity.stat().st_size / 2
    listed = sere("similarity", "shard", packed, "--name", "tiny", "--max-kib", 1)
    assert "routing.similarity.uri: configmap://tiny-1/shard-001-of-00" in listed.stderr
    folder = tmp_path / "mounted"
    folder.mkdir()
    for item in json.loads(listed.stdout)["items"]:
        for key, encoded in item["binaryData"].items():
            (folder / key).write_bytes(base64.b64decode(encoded))
    assert len(list(folder.iterdir())) > 1
    joined = tmp_path / "j.safetensors"
    assert sere("similarity", "join", folder, "--out", joined).exit_code == 0
    assert joined.read_bytes() == packed.read_bytes()
    next(folder.iterdir()).unlink()
    failed = sere("similarity", "join", folder, "--out", tmp_path / "k.safetensors")
    assert isinstance(failed.exception, UsageError) and "is missing" in str(failed.exception)
    assert not (tmp_path / "k.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["similarity", "show", "none"], "no similarity file at none"),
        (["similarity", "pack", "none", "--out", "x"], "no similarity file at none"),
        (["similarity", "join", "none", "--out", "x"], "cannot read the shard none"),
        (["calibrate", "m", "--data", "d", "--out", "nowhere/x"], "there is no folder nowhere"),
        (["calibrate", "m", "--data", "d", "--out", "x", "--report", "nowhere/x.html"], "there is no folder nowhere"),
        (["calibrate", "m", "--data", "d", "--out", "x", "--metric", "rbf"], "--metric rbf is not known"),
        (["calibrate", "m", "--data", "d", "--out", "x", "--layers", "9-3"], "--layers 9-3: give the first and the last"),
    ],
)
def test_errors_say_what_to_do(words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    failed = sere(*words)
    assert isinstance(failed.exception, UsageError) and says in str(failed.exception)
    assert failed.exception.exit_code == 2
    assert list(tmp_path.iterdir()) == []
