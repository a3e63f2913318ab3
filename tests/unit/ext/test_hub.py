"""A branch of the hub that has moved is another model: what names a model is its commit, read from the hub client's cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from sere_ext.similarity.hub import commit_of, model_config_dict

COMMITS = ("0123456789abcdef0123456789abcdef01234567", "fedcba9876543210fedcba9876543210fedcba98")


def point(cache: Path, commit: str) -> None:
    """Let branch main of org/model mean this commit, as the hub's client keeps it."""
    model = cache / "models--org--model"
    for folder in ("refs", f"snapshots/{commit}"):
        (model / folder).mkdir(parents=True, exist_ok=True)
    (model / "refs/main").write_text(commit)
    (model / "snapshots" / commit / "config.json").write_text('{"model_type": "qwen3_moe"}')


def test_the_commit_is_named_and_a_branch_that_moves_is_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for commit in COMMITS:
        point(tmp_path, commit)
        assert model_config_dict("org/model")["model_type"] == "qwen3_moe"
        assert commit_of("org/model") == commit
        assert commit_of("org/model", "main") == commit
    assert commit_of("org/model", COMMITS[0]) == COMMITS[0], "a commit that is asked for by its name"


def test_a_folder_has_no_commit(tmp_path: Path) -> None:
    assert commit_of(str(tmp_path)) == ""
