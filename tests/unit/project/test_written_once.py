"""What crosses a border between parts is spelled in one module; everything else imports it."""

from __future__ import annotations

import re
import subprocess

import pytest

from tests.kit import ROOT

FOLDERS = ("sere_ext", "autotune", "operator", "demo", "benchmarks", "tests/kit")


@pytest.mark.parametrize(
    ("spelling", "home"),
    [
        (r"""["']pod\.(policy|override|refresh)["']""", "volume.py"),
        (r"\.key\.json", "volume.py"),
        (r"""["']policyDigest["']""", None),
        (r"""split\(["']\|["']""", None),
    ],
)
def test_is_spelled_in_one_module_of_the_contract_or_made_from_its_fields(spelling: str, home: str | None) -> None:
    files = subprocess.run(["git", "ls-files", *FOLDERS], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    found = {f for f in files if f.endswith(".py") and re.search(spelling, (ROOT / f).read_text())}
    assert found == ({f"sere_ext/sere_ext/contract/{home}"} if home else set())
