"""ConfigMap `sere-openings` on a real API server: tuners that share nothing else count each other's openings of held-out items."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sere_autotune.result.publish import Access, Publisher, Target
from sere_autotune.study.ledger import Ledger
from sere_ext.contract.errors import PublishError
from tests.kit.operator_process import World, eventually

from .test_operator import node, world
from .test_tenant import tuning_job

__all__ = ["node", "world"]  # fixtures

MODEL, OTHER = "sha256:" + "ab" * 32, "sha256:" + "cd" * 32
ITEMS = [f"{number:016x}" for number in range(2000)]
Pods = Callable[..., Ledger]


@pytest.fixture
def pods(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pods:
    """Ledgers of tuning pods: `pods("a", "disk1")` is one of run `a`, with its rights, on an empty disk of its own."""
    tokens: dict[str, str] = {}

    def made(run: str, disk: str, model: str = MODEL) -> Ledger:
        if run not in tokens:
            world.apply(tuning_job(run))
            eventually(lambda: world.get("RoleBinding", f"{run}-tuner"), 30, "the run's rights")
            line = ["kubectl", "-n", world.namespace, "create", "token", f"{run}-tuner"]
            tokens[run] = subprocess.run(line, check=True, capture_output=True, text=True, timeout=60).stdout.strip()
        reached = world.client.client.configuration
        access = Access(reached.host, lambda: tokens[run], reached.ssl_ca_cert)
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / disk))
        return Ledger(model, tmp_path / disk / "out", Publisher(Target(world.namespace, f"{run}-result"), access))

    return made


def test_runs_that_open_the_same_items_at_once_are_counted_one_after_the_other(world: World, pods: Pods) -> None:
    ledgers = [pods("ab"[number % 2], f"disk{number}") for number in range(8)]
    other = [pods("ab"[number % 2], f"other{number}", OTHER) for number in range(2)]
    with ThreadPoolExecutor(10) as at_once:
        same = [at_once.submit(ledger.open, ITEMS, f"study{number}") for number, ledger in enumerate(ledgers)]
        elsewhere = [at_once.submit(ledger.open, ITEMS, f"other{number}") for number, ledger in enumerate(other)]
        assert sorted(opened.result() for opened in same) == list(range(8))
        assert sorted(opened.result() for opened in elsewhere) == [0, 1], "another model's items are others"
    late = pods("a", "late")
    assert late.openings(ITEMS, None) == 8
    assert sorted(late.openings(ITEMS, f"study{number}") for number in range(8)) == list(range(8)), "a resumed study counts once"
    for run in ("a", "b"):
        world.delete("SereTuningJob", run)
    eventually(lambda: not world.items("Job"), 120, "the runs are gone")
    found = world.get("ConfigMap", "sere-openings")
    assert sorted(found["data"]) == ["ab" * 8, "cd" * 8], "what they opened stays known"
    world.delete("ConfigMap", "sere-openings")


def test_a_ledger_that_is_full_opens_nothing_and_says_what_to_do(world: World, pods: Pods) -> None:
    pods("a", "disk", OTHER).open(ITEMS, "before")
    many = [f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}" for number in range(120_000)]
    ledger = pods("a", "full")
    with pytest.raises(PublishError, match=r"has no room for 120,000 of model abababababababab: .*delete the key of a model"):
        ledger.open(many, "one")
    assert ledger.openings(many, None) == 0
    assert ledger.open(many[:30_000], "two") == 0, "30,000 items of a model fit"
    assert pods("a", "other", OTHER).openings(ITEMS, None) == 1, "nobody's openings were lost"
