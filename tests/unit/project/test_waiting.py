"""Nobody who waits is left in silence: what is waited for, and for how long, stands on standard error."""

from __future__ import annotations

import io
import re
import subprocess
from pathlib import Path

import pytest
from rich.console import Console

from demo import screen
from tests.kit import ROOT


def patiently(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([ROOT / "tests/kit/patiently", *words], capture_output=True, text=True, check=False, timeout=30)


def test_a_long_command_says_what_it_is_and_how_large_its_folder_has_become(tmp_path: Path) -> None:
    (tmp_path / "package").write_bytes(bytes(3 << 20))
    said = tmp_path.with_name("said")  # it is there beside the folder, whose size is shown
    until_it_speaks = f"until [[ -s {said} ]]; do sleep 0.05; done; echo made; exit 7"
    command = [ROOT / "tests/kit/patiently", "-d", str(tmp_path), "the packages", "bash", "-c", until_it_speaks]
    with said.open("w") as file:
        ended = subprocess.run(command, stdout=subprocess.PIPE, stderr=file, text=True, check=False, timeout=60)
    assert (ended.returncode, ended.stdout) == (7, "made\n")
    lines = said.read_text().splitlines()
    assert len(lines) >= 2 and all(
        line.startswith("the packages: ") and line.endswith(f", 3.1MB in {tmp_path}") for line in lines
    )


def test_a_quick_command_is_not_spoken_of() -> None:
    ended = patiently("nothing to do", "true")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_a_quick_step_of_several_is_told_at_its_end() -> None:
    ended = patiently("-e", "1/4 the installer", "true")
    assert (ended.returncode, ended.stdout) == (0, "")
    assert re.fullmatch(r"1/4 the installer: \d s\n", ended.stderr), "0 s, or 1 s where a second of the clock ends meanwhile"


# Stands for python3, the virtual environment's python and uv: makes the environment, notes how it is called, and warns as pip does.
STUB = """#!/usr/bin/env bash
case "$*" in
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; cp "$0" "$3/bin/uv" ;;
  *"import torch"*) exit "$HAS_NO_TORCH" ;;
  *"pip install"*) echo "$*" >> "$CALLS"; [[ "$*" == *"--quiet --quiet"* || $0 == *uv ]] || echo WARNING >&2 ;;
esac
"""


@pytest.mark.parametrize("has_torch", [False, True])
def test_setup_shows_each_of_its_four_steps_and_no_warnings(has_torch: bool, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (stub := tmp_path / "bin" / "python3").write_text(STUB)
    stub.chmod(0o755)
    calls = tmp_path / "calls"
    environment = {"PATH": f"{stub.parent}:/usr/bin:/bin", "HAS_NO_TORCH": str(int(not has_torch)), "CALLS": str(calls)}
    command = ["make", "--no-print-directory", "setup", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    shown = done.stdout + done.stderr
    assert sorted(re.findall(r"^\d/4", shown, re.MULTILINE)) == ["1/4", "2/4", "3/4", "4/4"]
    assert "WARNING" not in shown
    assert len(calls.read_text().splitlines()) == 4 - has_torch


def test_installation_is_announced_with_its_size_before_anything_is_fetched() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (recipe,) = [part for part in makefile.split("\n\n") if "$(VENV)/.ready: " in part]
    steps = [line for line in recipe.splitlines() if "pip install" in line]
    assert "GB" in recipe.partition("pip install")[0]
    assert len(steps) == 4 and all("--quiet" in step or "$(ERRORS)" in step for step in steps)
    assert recipe.count("$(WAIT)") == len(steps)


@pytest.mark.parametrize("terminal", [False, True])
def test_the_demo_says_what_it_waits_for(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(screen, "console", Console(file=shown, force_terminal=terminal, width=80))
    with screen.waiting("the operator's pod"):
        screen.console.print("meanwhile")
    text = shown.getvalue()
    assert "waiting for the operator's pod" in text and "meanwhile" in text
    assert bool(re.search(r": \d+ s", text)) == terminal
