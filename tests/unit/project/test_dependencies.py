"""What pyproject.toml declares for a part is what that part imports, lazily or not."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib

import pytest

from sere_ext.cli.missing import EXTRA
from tests.kit import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = {"pyyaml": "yaml"}  # where a distribution's module has another name
WITH_ENGINE = {"torch", "transformers", "huggingface_hub", "fastapi"}  # what vLLM brings, in versions that it chooses
PARTS = {
    "sere_ext/sere_ext": ("similarity", "vllm"),
    "autotune/sere_autotune": ("autotune", "vllm"),
    "operator/sere_operator": ("operator",),
}


def declared(requirements: list[str]) -> set[str]:
    """The modules of requirements; `sere[similarity]` stands for that extra's."""
    found: set[str] = set()
    for text in requirements:
        if own := re.match(r"sere\[(\w+)\]", text):
            found |= declared(PROJECT["optional-dependencies"][own[1]])
            continue
        name = re.split(r"[<>=~!\[]", text)[0].strip().lower()
        found.add(MODULES.get(name, name.replace("-", "_")))
    return found


def imported(folder: str) -> set[str]:
    listed = subprocess.run(["git", "ls-files", folder], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    found: set[str] = set()
    for file in (file for file in listed if file.endswith(".py")):
        for node in ast.walk(ast.parse((ROOT / file).read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return {name for name in found if name not in sys.stdlib_module_names and not name.startswith("sere_")}


BASE = declared(PROJECT["dependencies"])
BROUGHT = {"pydantic_core", "urllib3"}  # pydantic's own core; what the kubernetes client's errors are of


@pytest.mark.parametrize("part", PARTS)
def test_what_a_part_imports_is_declared_for_it(part: str) -> None:
    extras = set().union(*(declared(PROJECT["optional-dependencies"][extra]) for extra in PARTS[part]))
    with_engine = WITH_ENGINE if "vllm" in PARTS[part] else set()
    assert imported(part) - BASE - BROUGHT - extras - with_engine == set()


def test_what_is_declared_is_imported() -> None:
    everything = set().union(*(imported(part) for part in PARTS))
    assert BASE - everything == set()
    for part, extras in PARTS.items():
        for extra in extras:
            own = [text for text in PROJECT["optional-dependencies"][extra] if not text.startswith("sere[")]
            assert declared(own) - imported(part) - ({"prometheus_client"} if part.startswith("autotune") else set()) == set(), (
                part
            )


def test_the_hint_for_a_missing_module_names_an_extra_that_brings_it() -> None:
    for module, extra in EXTRA.items():
        assert module in declared(PROJECT["optional-dependencies"][extra]) | (WITH_ENGINE if extra == "vllm" else set()), module
    brought = declared([f"sere[{extra}]" for extra in PROJECT["optional-dependencies"] if extra != "dev"])
    assert brought <= set(EXTRA)
