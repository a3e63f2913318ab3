"""Recorded router calls replayed through the kernel: what is counted is what an engine would count."""

import numpy as np
import pytest

from sere_autotune.search.replay import count, layer_states, mix, rerouted
from sere_autotune.trial.routing import Routing
from sere_autotune.tuning.space import EXACT, Choice
from sere_autotune.tuning.spec import BucketEdges
from sere_ext.contract.policy import Bucket, Kind
from sere_ext.routing import kernel


@pytest.fixture
def routing() -> Routing:
    return Routing.assumed(32, 8, 16)


def test_counts_are_those_of_the_kernel(routing: Routing) -> None:
    """Active experts as the kernel's own counters have them, at a fifth of a step's experts and at all of them."""
    for kind, S in ((Kind.TOPK, 2), (Kind.OEA, 1), (Kind.SERE, 3)):
        found = count(routing, None, [EXACT, Choice(kind, S)])
        (state, *_) = layer_states(routing, None)
        active = []
        for index, calls in enumerate(routing.calls):
            state = layer_states(routing, None)[index]
            state.load_table((Bucket(min_tokens=1, kind=kind, S=S),))
            for call in calls:
                rerouted(state, call)
            active.append(state.counters[0, kernel.ACTIVE_AFTER] / len(calls))
        assert found.active[1] == pytest.approx(np.mean(active))


def test_exact_routing_moves_nothing_and_topk_drops_what_it_does_not_keep(routing: Routing) -> None:
    found = count(routing, None, [EXACT, *(Choice(Kind.TOPK, S) for S in range(1, 8))])
    assert found.moved[0] == 0
    assert found.slots == pytest.approx([8, 1, 2, 3, 4, 5, 6, 7])
    dropped = [
        np.mean([1 - call.weights[:, :S].sum(axis=1).mean() for layer in routing.calls for call in layer]) for S in range(1, 8)
    ]
    assert found.moved[1:] == pytest.approx(dropped, abs=1e-6)
    assert (np.diff(found.active[1:]) > 0).all()


def test_between_two_whole_numbers_the_first_layers_keep_more(routing: Routing) -> None:
    low, half, high = (Choice(Kind.TOPK, S) for S in (2, 2.5, 3))
    found = count(routing, None, [EXACT, low, half, high])
    assert found.slots[2] == pytest.approx(2.5)
    assert found.active[1] < found.active[2] < found.active[3]


def test_a_larger_rho_moves_less_weight(routing: Routing) -> None:
    alike = np.random.default_rng(0).random((32, 32)).astype(np.float32)
    alike = np.maximum(alike, alike.T)
    found = count(routing, [alike] * 4, [EXACT, *(Choice(Kind.SERE, 1, rho) for rho in (0.0, 0.8, 0.95))])
    assert found.moved[1] > found.moved[2] > found.moved[3] > 0
    assert found.active[1] < found.active[2] < found.active[3] <= found.active[0]


def test_assumed_calls_touch_as_many_experts_as_published_models_do() -> None:
    """arXiv 2511.02237 measured 27.9 active experts of 128 at 16 tokens and top-3, and 53.5 at top-8."""
    found = count(Routing.assumed(128, 8, 16), None, [EXACT, Choice(Kind.TOPK, 3)])
    assert found.active[0] == pytest.approx(53.5, rel=0.1)
    assert found.active[1] == pytest.approx(27.9, rel=0.1)


def test_the_steps_of_a_bucket_alone_are_taken(routing: Routing) -> None:
    assert routing.within(BucketEdges(min_tokens=17), 16) is None
    inside = routing.within(BucketEdges(min_tokens=8, max_tokens=16), 16)
    assert inside is not None and len(inside.calls[0]) == len(routing.calls[0])


@pytest.mark.parametrize(("typical", "sizes"), [(16, [15, 16, 18]), (12, [11]), (40, [33])])
def test_steps_are_counted_that_are_as_large_as_most_and_not_those_of_a_blocks_ends(typical: float, sizes: list[int]) -> None:
    """A block of 16 requests begins and ends with smaller steps, and prompts make some larger; the nearest stand in where none is alike."""
    tokens = (4, 8, 11, 15, 16, 18, 24, 33, 128)
    recorded = Routing((tuple(Routing.assumed(16, 4, count).calls[0][0] for count in tokens),) * 2)
    found = recorded.within(BucketEdges(min_tokens=8, max_tokens=64), typical)
    assert found is not None and [[len(call.ids) for call in layer] for layer in found.calls] == [sizes, sizes]


def test_a_mix_counts_an_expert_that_a_token_has_twice() -> None:
    found = mix(np.array([[1, 1, 2]], np.int32), np.array([[0.25, 0.5, 0.25]], np.float32), 4)
    assert found.tolist() == [[0, 0.75, 0.25, 0]]
