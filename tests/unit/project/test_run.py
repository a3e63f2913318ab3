"""`tests/run`: a rung that waits for engines or pods is tried once more, and the summary counts each test once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.kit import ROOT, counts

PASSES_THE_SECOND_TIME = """
from pathlib import Path
import pytest

def test_slow():
    seen = Path("seen")
    again = seen.exists()
    seen.touch()
    assert again

def test_quick():
    pass

@pytest.mark.skip(reason="not here")
def test_left_out():
    pass
"""


def run(root: Path, *rungs: str) -> subprocess.CompletedProcess[str]:
    """`tests/run` in a tree of its own that has the engine's rung alone, with the real pytest."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "PYTEST_ADDOPTS": "-p no:randomly"}
    return subprocess.run([root / "tests/run", *rungs], capture_output=True, text=True, timeout=120, check=False, env=environment)


def tree(root: Path, test: str) -> Path:
    (root / "tests/engine").mkdir(parents=True)
    shutil.copy(ROOT / "tests/run", root / "tests/run")
    (root / "tests/engine/test_engine.py").write_text(test)
    (root / "build/test").mkdir(parents=True)
    stale = '<testsuites><testsuite><testcase classname="a" name="b"><failure/></testcase></testsuite></testsuites>'
    for name in ("engine-first", "engine", "unit"):
        (root / f"build/test/{name}.xml").write_text(stale)
    return root


def test_a_test_that_passes_at_the_second_attempt_is_counted_once_and_both_attempts_are_kept(tmp_path: Path) -> None:
    done = run(tree(tmp_path, PASSES_THE_SECOND_TIME), "engine")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "2 passed (1 of them at the second attempt), 0 failed, 1 skipped"
    assert "(at the second attempt: see the first above)" in done.stdout
    first, last = (counts.outcomes(tmp_path / f"build/test/{name}.xml") for name in ("engine-first", "engine"))
    assert sorted(first.values()) == ["failed", "passed", "skipped"] and list(last.values()) == ["passed"]


def test_a_test_that_fails_twice_is_one_failure(tmp_path: Path) -> None:
    done = run(tree(tmp_path, "def test_a():\n    raise SystemError\n\ndef test_b():\n    pass\n"), "engine")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "1 passed, 1 failed, 0 skipped"


def test_a_test_whose_fixture_fails_after_it_is_one_failure(tmp_path: Path) -> None:
    cases = '<testcase classname="a" name="b"><failure/></testcase><testcase classname="a" name="b"><error/></testcase>'
    (tmp_path / "unit.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    assert counts.sentence(["unit", "lint"], tmp_path) == "0 passed, 1 failed, 0 skipped"
