"""Assertions in what tests share show their values, as those in tests do."""

import pytest

pytest.register_assert_rewrite("reroute_contract", "planted")
