"""The paired blocks of a certificate as an engine is asked for them: what is alike within a pair, and what is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sere_autotune.certify.stage import certify
from sere_autotune.outcome import Ending
from sere_autotune.trial.items import Item, load_items, split
from sere_autotune.trial.load import Load
from sere_ext.contract.errors import CannotCertifyError
from sere_ext.contract.policy import EXACT_POLICY, Policy
from tests.kit.planted import PlantedEngine, run, spec_for, write_items

GOOD = Policy.parse({"buckets": [{"minTokens": 8, "maxTokens": 64, "kind": "topk", "S": 3}]})
PAIRS = 10


@dataclass(frozen=True)
class Asked:
    """One block as the engine was asked for it."""

    exact: bool
    load: Load
    items: tuple[str, ...]
    expected_s: float | None
    deadline_s: float


class Recording(PlantedEngine):
    """Keeps what it is asked for; its answers to the `hard` items, by prompt, are all wrong."""

    def __init__(self, hard: Sequence[Item] = ()) -> None:
        super().__init__()
        self.asked: list[Asked] = []
        self.hard = {item.prompt for item in hard}

    def right(self, prompt: str, lost: float, gained: float) -> bool:
        return prompt not in self.hard and super().right(prompt, lost, gained)

    def block(self, requests: Any, load: Load, *args: Any, **kwargs: Any) -> Any:
        report = super().block(requests, load, *args, **kwargs)
        self.asked.append(
            Asked(
                self.policy == EXACT_POLICY,
                load,
                tuple(request.item.digest for request in requests),
                kwargs.get("expected_s"),
                self.cut[-1],
            )
        )
        return report


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Asked, Asked]]:
    """The blocks of one certificate at a rate of arrivals, two and two."""
    folder = tmp_path_factory.mktemp("blocks")
    spec = spec_for(
        folder / "out", write_items(folder / "items.jsonl", 6000), certify__pairs=PAIRS, workload__load__requestsPerSecond=20,
        accuracy__maxDropPoints=5, slo__e2elMs__p95=10_000,
    )  # fmt: skip
    engine = Recording()
    run(spec, engine, only=GOOD)
    held_out = {item.digest for item in split(load_items(spec.accuracy), spec.accuracy.search_items)[1]}
    certified = [asked for asked in engine.asked if held_out & set(asked.items)][-2 * PAIRS :]
    return list(zip(certified[0::2], certified[1::2], strict=True))


def test_both_routings_of_a_pair_get_the_same_items_and_arrivals(pairs: list[tuple[Asked, Asked]]) -> None:
    for first, second in pairs:
        assert {first.exact, second.exact} == {True, False}
        assert (first.load, first.items) == (second.load, second.items)


def test_which_routing_comes_first_is_drawn_by_lot(pairs: list[tuple[Asked, Asked]]) -> None:
    """Always the same order would take a machine that grows slower for a slower routing."""
    first = [pair[0].exact for pair in pairs]
    assert 2 <= sum(first) <= PAIRS - 2


def test_each_pair_has_items_and_arrivals_of_its_own(pairs: list[tuple[Asked, Asked]]) -> None:
    assert len({pair[0].items for pair in pairs}) == len({pair[0].load.seed for pair in pairs}) == PAIRS
    seen = [item for pair in pairs for item in pair[0].items]
    assert len(seen) == len(set(seen)), "an item is opened in one pair alone while there are enough"


def test_a_block_is_warmed_up_and_its_engine_is_given_a_few_times_its_length(pairs: list[tuple[Asked, Asked]]) -> None:
    for asked in (asked for pair in pairs for asked in pair):
        assert asked.load.warmup == 18, "three residences of 0.3 s at 20 requests/s"
        assert asked.expected_s is not None and 0 < asked.expected_s < asked.deadline_s, (
            "a hung engine costs a block, not the budget"
        )


@pytest.mark.parametrize("hard", ["all items", "the held-out items alone"])
def test_items_that_exact_routing_cannot_answer_certify_no_given_policy(hard: str, tmp_path: Path) -> None:
    """Also where the search items are answered, so that the first block of the certificate is the first to show it."""
    spec = spec_for(tmp_path / "out", write_items(tmp_path / "items.jsonl", 3000), certify__pairs=PAIRS)
    items = load_items(spec.accuracy)
    held_out = split(items, spec.accuracy.search_items)[1]
    engine = Recording(items if hard == "all items" else held_out)
    outcome = run(spec, engine, only=GOOD).outcome
    assert outcome.ending is Ending.CANNOT_CERTIFY
    assert outcome.message.startswith("exact routing is right on 0 of")
    opened = [asked for asked in engine.asked if {item.digest for item in held_out} & set(asked.items)]
    assert len(opened) <= 2, "the first block of exact routing ends it"


class NoStudy:
    """A study in which nothing was kept yet."""

    def get(self, key: Any) -> None:
        return None


class Unopened:
    """A ledger of which nothing may be opened."""

    def open(self, items: Sequence[str], study: str) -> int:
        raise AssertionError("the held-out items were opened")


def test_a_ladder_that_can_hardly_certify_leaves_the_held_out_items_unopened() -> None:
    """An opening costs level for ever, so it is not spent on a chance of one in a hundred."""
    asked: Any = SimpleNamespace(study=NoStudy(), advisory=False, max_drop=0.01, alpha=0.05, cert_items=500)
    hopeless: Any = SimpleNamespace(power=0.01, discordance=0.05, drop=0.005, describe="topk 1")
    ledger: Any = Unopened()
    with pytest.raises(CannotCertifyError, match=r"a chance of 1% only, about [\d,]+ items are needed. They were left unopened"):
        certify(asked, [hopeless], ledger)


def test_a_speed_that_is_undecided_gets_as_many_pairs_again_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.kit.planted.truth", lambda policy: (0.0, 0.0, 1.0))
    spec = spec_for(tmp_path / "out", write_items(tmp_path / "items.jsonl", 6000), certify__pairs=3, accuracy__maxDropPoints=5)
    held_out = {item.digest for item in split(load_items(spec.accuracy), spec.accuracy.search_items)[1]}
    engine = Recording()
    finished = run(spec, engine, only=GOOD)
    opened = [asked for asked in engine.asked if held_out & set(asked.items)]
    assert len(opened) == 2 * (2 * 3)
    assert "not shown to be faster" in finished.outcome.message
