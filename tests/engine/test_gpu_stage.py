"""The stage that measures decode steps on a GPU, on the CPU's engine with tiny dimensions: everything but the figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.gpu import tuner
from tests.kit import ROOT

COMMAND_S = 540  # that one stage may take: an engine alone may start for five minutes on busy cores


def test_decode_steps_with_known_routing(tmp_path: Path) -> None:
    """Half the tokens route evenly, half with the skew; the policy changes under a running batch and exact answers return."""
    out = tmp_path / "serve.json"
    command = [sys.executable, "-m", "benchmarks.gpu.serve", "--tiny"]
    done = subprocess.run(
        [*command, "--folder", str(tmp_path), "--out", str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=COMMAND_S,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(out.read_text())
    assert result["sameAgain"]["changedUnderS1"] > 0
    assert result["sameAgain"]["returnsExactly"]
    cells = {(cell["routing"], cell["arm"]): cell for cell in result["cells"]}
    assert len(cells) == len(result["cells"]) == 2 * 6
    for kind in ("uniform", "skewed"):
        exact, least = cells[kind, "exact"], cells[kind, "sere S=1"]
        # Two layers, 6 steps of 8 tokens; 32 experts, top-4.
        assert abs(exact["active"] / exact["activeDrawn"] - 1) < 0.12, exact
        assert least["active"] < 0.6 * exact["active"]
        assert cells[kind, "topk 2"]["slots"] == 2
        assert exact["slots"] == 4
        assert exact["boundMs"] > least["boundMs"] > 0
    assert cells["skewed", "exact"]["active"] < cells["uniform", "exact"]["active"]
    assert done.stdout.rstrip().endswith(str(out)), "the table is the last thing it prints"


def test_the_tuners_stage_runs_to_its_end(tmp_path: Path) -> None:
    """Two tuning runs, or one where no policy is faster or the time ends: each leaves its figures and their table."""
    out = tmp_path / "tuner.json"
    command = [sys.executable, "-m", "benchmarks.gpu.tuner", "--tiny", "--folder", str(tmp_path / "work"), "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=COMMAND_S)
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(out.read_text())
    probe = result["probe"]
    trials = result.get("summary", {}).get("trials") or probe["trials"]
    lines = [line.split() for line in done.stdout.splitlines()]
    head = lines.index(" ".join(tuner.HEAD).split())
    assert [line[0] for line in lines[head + 1 : lines.index([], head)]] == [str(trial["number"]) for trial in trials]
    if probe["trials"] or probe["outcome"] not in (tuner.TIMED_OUT, tuner.SPENT):
        assert probe["trials"][0]["policy"] == "exact"
    assert ("summary" in result) != ("problem" in result), (
        "a limit was found between exact routing and a policy, or why there is none"
    )
    assert [check["target"] for check in result["checks"]] == [
        check.target for check in tuner.checks(None, None, result.get("limitMs"))
    ]
    assert done.stdout.rstrip().endswith(str(out)), "the table is the last thing it prints"
