"""`sere doctor` on the real engine and the trained model, widened so that experts rule a step. Nothing here is a bound on a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit import ROOT


@pytest.mark.timeout(960)
def test_it_ends_with_a_ceiling_whose_steps_are_as_the_law_predicts(tmp_path: Path) -> None:
    model, items = tmp_path / "model", tmp_path / "items.jsonl"
    for script, *arguments in (
        ("widen", str(ROOT / "tests" / "assets" / "tiny_moe"), str(model)),
        ("items", "--split", "eval", "--count", "120", "--seed", "5", "--out", str(items)),
    ):
        subprocess.run(
            [sys.executable, "-m", f"tests.assets.make.{script}", *arguments], check=True, capture_output=True, cwd=ROOT
        )
    done = subprocess.run(
        [
            sys.executable, "-m", "sere_ext.cli.main", "doctor", str(model), "--data", str(items), "--answer-tokens", "24",
            "--max-model-len", "128", "--engine-extra-args", '[--dtype, float32, --enforce-eager, --max-num-seqs, "32"]',
            "--concurrency", "8", "--seconds", "20", "--json",
        ],
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["verdict"] in ("gain", "unknown"), found["sentence"]
    assert {"ceilings", "law", "steps", "answerTokens", "bytesPerSecond"} <= found.keys()
    assert 3 <= found["answerTokens"] <= 24
    steps = {(row["requests"], row["S"]): row for row in found["steps"]}
    sizes = {requests for requests, _ in steps}
    assert 8 in sizes and {S for _, S in steps} == {1, 2, 4}
    for requests in sizes:
        one, two, exact = (steps[requests, S] for S in (1, 2, 4))
        assert exact["exact"] and not one["exact"]
        assert one["slots"] == requests and two["slots"] == 2 * requests and exact["slots"] == 4 * requests
        assert one["activeExperts"] < two["activeExperts"] < exact["activeExperts"] <= 16
        for low, high in (one["predictedMs"][1:], found["foretoldMs"][str(requests)][1:]):
            assert low < high and low / 3 < one["measuredMs"] < high * 3, "fitted to all S, and to the others alone"
    ceiling = next(row for row in found["ceilings"] if row["asked"])
    value, low, high = ceiling["tpot"]
    assert ceiling["requests"] == 8 and low <= value <= high and high > 1
    assert 0 <= ceiling["promptsShare"] <= 1
    assert found["law"]["rounds"] >= 2
