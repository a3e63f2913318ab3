"""Steps of an open loop: their sizes under every choice, what is counted and predicted of them, and the ranges that take them."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from sere_autotune.doctor.finding import Finding, Shares, judge
from sere_autotune.doctor.fit import Sample, fit
from sere_autotune.search.open_loop import count_open, least_size
from sere_autotune.search.posterior import Observation, PolicyModel
from sere_autotune.search.replay import count
from sere_autotune.study.schema import EDGES, counts_key
from sere_autotune.study.study import TuningStudy
from sere_autotune.trial.routing import Routing
from sere_autotune.tuning.space import EXACT, Choice, auto_buckets
from sere_ext.contract.policy import Kind
from tests.kit.planted import PlantedEngine, run, spec_for, write_items

TOKENS, SHARES = 32, Shares(32, 0.6, 0.2)
CHOICES = [EXACT, *(Choice(kind, S / 2) for kind in (Kind.TOPK, Kind.OEA) for S in range(2, 15))]


@pytest.fixture(scope="module")
def routing() -> Routing:
    return Routing.assumed(64, 8, TOKENS)


def step(routing: Routing, choice: Choice, size: float) -> float:
    """Time of a step with a share `size` of the tokens, counted at just that size, over an exact step with all of them."""
    exact, found = count(routing, None, [EXACT]), count(routing.thinned(size), None, [choice])
    slots = size * float(found.slots[0] / exact.slots[0])
    return 1 - SHARES.active * (1 - float(found.active[0] / exact.active[0])) - SHARES.slots * (1 - slots)


def settled(routing: Routing, choice: Choice) -> float:
    """The size that the steps of a choice come to, each step as many requests as the one before took time for."""
    size = 1.0
    for _ in range(30):
        size = step(routing, choice, size)
    return size


def test_thinned_steps_keep_their_share_of_tokens_evenly_spaced(routing: Routing) -> None:
    (call, *_), (few, *_) = routing.calls[0], routing.thinned(0.25).calls[0]
    assert (
        (few.logits == call.logits[::4]).all() and (few.ids == call.ids[::4]).all() and (few.weights == call.weights[::4]).all()
    )
    assert routing.thinned(0.001).tokens == len(routing.calls[0]), "a step has one token at least"
    assert routing.thinned(1.0).tokens == routing.tokens == TOKENS * len(routing.calls[0])


def test_a_choice_is_counted_at_the_size_that_its_own_speed_leaves(routing: Routing) -> None:
    found, at_exact = count_open(routing, None, CHOICES, (), SHARES), count(routing, None, CHOICES)
    assert found.size[0] == 1 and found.active[0] == at_exact.active[0], "exact routing's steps are as they were recorded"
    for index in (1, 3, 14, 16):
        size = settled(routing, CHOICES[index])
        assert size < step(routing, CHOICES[index], 1.0) - 0.1, "half as long is in flight, hence fewer experts still"
        assert found.size[index] == pytest.approx(size, abs=0.03)
        own = count(routing.thinned(size), None, [CHOICES[index]])
        assert found.active[index] == pytest.approx(own.active[0], abs=0.03 * at_exact.active[0])
        assert found.moved[index] == pytest.approx(own.moved[0], abs=0.03)
    assert found.slots[CHOICES.index(Choice(Kind.TOPK, 2))] == 2, "slots are those of a token at every size"


def test_steps_of_one_token_stay_as_they_are() -> None:
    found = count_open(Routing.assumed(64, 8, 1), None, CHOICES, (), SHARES)
    assert found.size.tolist() == [1.0] * len(CHOICES)
    assert (found.active == count(Routing.assumed(64, 8, 1), None, CHOICES).active).all()


def test_predicted_speeds_are_those_of_the_open_loop(routing: Routing) -> None:
    """The model sees the slow half of the choices, and says what the fast ones will do."""
    truth = np.array([settled(routing, choice) for choice in CHOICES])
    noise = random.Random(0)
    fast = [i for i, choice in enumerate(CHOICES) if i and choice.S < 3]
    seen = [
        Observation(0, choice, 0, 0, 0, float(-np.log(truth[i])) + noise.gauss(0, 0.02))
        for i, choice in enumerate(CHOICES)
        if i and i not in fast
    ]
    model = PolicyModel(CHOICES, [count_open(routing, None, CHOICES, (), SHARES)], 0.01)
    model.fit(seen, seed=0)
    predicted = np.exp(model.log_speed(0).mean(axis=0))
    assert predicted[fast] == pytest.approx(1 / truth[fast], rel=0.1)
    assert (1 / truth[fast]).max() > 3


def ceiling(sizes: tuple[int, ...], base_s: float = 0.001) -> Finding:
    """Of a machine on which 64 experts take 0.3 ms each, with a load of 16 requests."""
    noise = random.Random(0)
    samples = []
    for number in range(4):
        for batch in sizes:
            for S in (1, 2, 4, 8):
                active = 64 * (1 - (1 - 1 / 64) ** (batch * S))
                seconds = (base_s + 3e-4 * active) * noise.lognormvariate(0, 0.002)
                samples.append(Sample(number, batch, S, seconds, 0.01, active, batch * S))
    return judge(fit(samples), 8, [16], None, 1.02, None)


def test_the_fewest_requests_are_those_that_the_fastest_policy_leaves() -> None:
    """An exact step of 16 requests takes 17.6 ms; under S = 1 one of 4 takes 2.2 ms, and nothing is known of smaller ones."""
    assert least_size(ceiling((4, 16, 64))) == pytest.approx(2.2 / 17.6, rel=0.05)
    slow = ceiling((4, 16, 64), base_s=0.02)
    alone = ceiling((16,), base_s=0.02)
    assert least_size(slow) < least_size(alone) < 1
    assert least_size(alone) == pytest.approx(1 / alone.figures["ceilings"][0]["decodeStep"][0], rel=0.01)
    assert least_size(None) == least_size(Finding("unknown", "cannot tell")) == 1


def test_the_lowest_range_of_an_open_loop_takes_the_steps_of_the_fastest_policy() -> None:
    assert [auto_buckets([0], [16.2], least=least)[0].min_tokens for least in (1.0, 0.6, 0.3, 0.01)] == [8, 8, 4, 1]


def test_a_study_of_an_open_loop_counts_tunes_and_checks_the_sizes_that_policies_will_have(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.jsonl", 4000)
    edges = {}
    for name, load in (("open", {"workload__load__requestsPerSecond": 20}), ("closed", {"workload__load__concurrency": [15]})):
        spec = spec_for(tmp_path / name, items, search__trials=8, **load)
        finished = run(spec, PlantedEngine(experts_share=0.9))
        study = TuningStudy(tmp_path / name, None)
        found, counted = study.get(EDGES), study.get(counts_key(0))
        assert found is not None and counted is not None and counted.size[0] == 1
        (edge,) = found
        assumed = Routing.assumed(32, 4, 15)  # of so many tokens are exact routing's steps at either load
        assert counted.active[0] == count(assumed, None, [EXACT]).active[0]
        edges[name] = edge.min_tokens
        if name == "closed":
            assert set(counted.size) == {1.0}
            continue
        assert min(counted.size) < 0.6
        result = finished.summary["ladder"][finished.summary["chosen"] - 1]["result"]
        assert f"{edge.min_tokens} requests at a time" in [part["name"] for part in result["parts"]]
    assert edges["closed"] == 15 // 2 and edges["open"] < edges["closed"] - 1
