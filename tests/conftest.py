"""Assertions in what tests share show their values, as those in tests do; no test reads or writes what is the user's."""

import os
import tempfile
from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("tests.kit.reroute_contract", "tests.kit.planted")

# For fixtures of sessions, and for what they start; modules and single tests get folders of their own below.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="sere-state-")


@pytest.fixture(scope="module", autouse=True)
def _own_state_of_a_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the fixtures of one module open is not opened to those of the next, which may have made the same items."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(autouse=True)
def _own_state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tuner's ledger of opened items is the user's; each test has one of its own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
