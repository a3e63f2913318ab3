"""Assertions in what tests share show their values, as those in tests do; no test reads or writes what is the user's."""

import os
import tempfile

import pytest

pytest.register_assert_rewrite("tests.kit.reroute_contract", "tests.kit.planted")

# For fixtures of modules and sessions, and for what they start; single tests get a folder of their own below.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="sere-state-")


@pytest.fixture(autouse=True)
def _own_state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tuner's ledger of opened items is the user's; each test has one of its own."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
