"""Each folder of the three packages says in one sentence what it is for."""

from __future__ import annotations

import ast
import subprocess
from pathlib import Path

import pytest

from tests.kit import ROOT

LISTED = subprocess.run(
    ["git", "ls-files", "sere_ext", "autotune", "operator"], cwd=ROOT, capture_output=True, text=True, check=True
).stdout.split()
FOLDERS = sorted({str(Path(file).parent) for file in LISTED if file.endswith(".py") and Path(file).name != "hatch_build.py"})


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_says_what_it_is_for(folder: str) -> None:
    said = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text()))
    assert said and said.partition("\n")[0].endswith(".")
