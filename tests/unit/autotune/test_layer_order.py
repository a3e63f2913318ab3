"""Which layers get the larger S first: the rule, the policies and counts of an order, and the measurement of it in a study."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import tuner as bench
from sere_autotune import planner, tuner
from sere_autotune.prepare import prepare
from sere_autotune.search.layer_order import Seen, describe, first_of, order_of, quarters, tells_nothing
from sere_autotune.search.replay import between, count
from sere_autotune.study.schema import LAYER_ORDER, counts_key
from sere_autotune.study.study import TuningStudy
from sere_autotune.trial.routing import Routing
from sere_autotune.tuning.space import Choice, Space, auto_buckets, spared_layers
from sere_ext.contract.errors import UnsupportedError
from sere_ext.contract.policy import EXACT_POLICY, MAX_LAYER_GROUPS, Kind, Policy
from tests.kit.planted import Quiet
from tests.kit.truth import WorldEngine
from tests.kit.worlds import LAYERS, World

ITEMS = 125
ORDERS = list(itertools.permutations(range(4)))  # of the quarters


def seen(*differ: int, wrong: tuple[int, ...] = (0, 0, 0, 0), items: int = ITEMS) -> list[Seen]:
    return [Seen(items, *counts) for counts in zip(differ, wrong, strict=True)]


def ordered(layers: int, order: tuple[int, ...]) -> tuple[int, ...]:
    """Positions of so many layers, the quarters in the order that is given."""
    return tuple(position for quarter in order for position in quarters(layers)[quarter])


def larger(policy: Policy, layers: tuple[int, ...], bucket: int = 0) -> list[int]:
    """S of a bucket in every layer."""
    return [policy.table_for(layer)[bucket].S or 0 for layer in layers]


# The rule.


@pytest.mark.parametrize("layers", [4, 5, 6, 7, 8, 26, 27, 48, 61, 94])
def test_quarters_are_neighbours_and_what_each_step_of_s_adds(layers: int) -> None:
    parts = quarters(layers)
    assert [position for part in parts for position in part] == list(range(layers))
    for step in range(4):
        spared = spared_layers(Choice(Kind.TOPK, 2 + step / 4), range(layers))
        assert list(spared) == [position for part in parts[:step] for position in part]


def test_the_quarter_under_which_fewest_answers_differ_comes_first() -> None:
    assert order_of(seen(98, 51, 55, 97), 8) == (2, 3, 4, 5, 6, 7, 0, 1)


def test_wrong_answers_decide_between_quarters_with_as_many_that_differ() -> None:
    assert order_of(seen(90, 50, 50, 90, wrong=(20, 9, 8, 20)), 4) == (2, 1, 0, 3)
    assert order_of(seen(50, 90, 90, 50), 4) == (0, 3, 1, 2), "what is equal stays in the model's order"


def test_shares_are_compared_where_a_block_ended_early() -> None:
    cut = [Seen(125, 80, 0), Seen(50, 30, 0), Seen(125, 40, 0), Seen(125, 81, 0)]
    assert order_of(cut, 4) == (2, 1, 0, 3)


@pytest.mark.parametrize(("best", "order"), [(64, (1, 0, 2, 3)), (65, ()), (80, ())])
def test_a_difference_that_chance_explains_leaves_the_layers_as_they_are(best: int, order: tuple[int, ...]) -> None:
    """Two standard errors between two shares around 0.58 of 125 items are 0.125; 64 against 80 are 0.128 apart, 65 are 0.120."""
    assert order_of(seen(80, best, 80, 80), 4) == order


def test_where_nothing_was_compared_the_layers_stay_as_they_are() -> None:
    assert order_of([Seen(0, 0, 0), *seen(90, 50, 50, 90)[1:]], 4) == ()


def test_nearly_all_answers_tell_nothing_unless_one_quarter_stands_out() -> None:
    assert tells_nothing(seen(120, 113, 125, 125))
    assert not tells_nothing(seen(120, 112, 125, 125))


def test_what_was_found_is_one_sentence_with_layer_numbers() -> None:
    numbers = range(1, 9)  # layer 0 is dense
    assert describe(seen(98, 51, 55, 97), numbers) == (
        "the larger S goes first to layers 3-4: 41% of 125 answers differ from exact routing's with it there, 78% with it in layers 1-2"
    )
    assert "layer 6: " in describe(seen(98, 51, 55, 97), (5, 6, 7, 8))
    assert describe(seen(50, 51, 52, 53), numbers).endswith("(40% to 42% of 125 answers differ from exact routing's)")


# Policies and counts.


@pytest.mark.parametrize("layers", [4, 5, 6, 8, 27, 61])
def test_every_layer_has_the_table_that_the_order_gives_it(layers: int) -> None:
    """In all orders of the quarters, with three buckets whose S steps down in different layers, and dense layers between."""
    numbers = tuple(range(1, 2 * layers, 2))
    table = (Choice(Kind.TOPK, 2.25), Choice(Kind.SERE, 1.5, 0.3), Choice(Kind.OEA, 2.75, 0.0, 0.5))
    for order in ORDERS:
        positions = ordered(layers, order)
        some = Space(auto_buckets([4, 16, 64], [0] * 3), (Kind.TOPK, Kind.SERE, Kind.OEA), 8, layers=numbers, order=positions)
        policy = some.policy(table)
        for bucket, choice in enumerate(table):
            most = [numbers[position] for position in positions[: round(choice.S % 1 * layers)]]
            assert larger(policy, numbers, bucket) == [int(choice.S) + (layer in most) for layer in numbers]
        assert len(policy.layer_groups) <= MAX_LAYER_GROUPS


def test_neighbours_with_equal_tables_are_one_group() -> None:
    some = Space(auto_buckets([16], [0]), (Kind.TOPK,), 8, layers=tuple(range(8)), order=ordered(8, (2, 1, 3, 0)))
    (group,) = some.policy((Choice(Kind.TOPK, 1.5),)).layer_groups
    assert (group.first_layer, group.last_layer, group.buckets[0].S) == (2, 5, 2)
    apart = replace(some, order=ordered(8, (3, 1, 2, 0))).policy((Choice(Kind.TOPK, 1.5),))
    assert [(group.first_layer, group.last_layer) for group in apart.layer_groups] == [(2, 3), (6, 7)]
    assert apart.buckets[0].S == 1


def test_the_models_own_order_is_the_same_policy_named_or_not() -> None:
    some = Space(auto_buckets([16], [0]), (Kind.TOPK,), 8, layers=tuple(range(1, 28)))
    for S in (1.25, 1.5, 1.75, 2.0):
        table = (Choice(Kind.TOPK, S),)
        assert some.policy(table) == replace(some, order=tuple(range(27))).policy(table)


@pytest.mark.parametrize("layers", [4, 6, 27])
def test_rows_between_two_values_of_s_are_those_of_the_layers_of_the_policy(layers: int) -> None:
    numbers = tuple(range(layers))
    for order, S, share in itertools.product(ORDERS, (1.0, 1.25, 1.5, 2.75), (0.0, 0.5)):
        some = Space(auto_buckets([16], [0]), (Kind.OEA,), 8, layers=numbers, order=ordered(layers, order))
        choice = Choice(Kind.OEA, S, 0.0, share if S > 1 else 0.0)
        rows = between(choice, some.order, lambda whole: np.tile([whole.S, whole.share], (layers, 1)))
        policy = some.policy((choice,))
        assert rows.tolist() == [[row.S, row.min_share or 0.0] for layer in numbers for row in policy.table_for(layer)]


def test_counts_are_those_of_the_layers_in_order() -> None:
    routing = Routing.assumed(32, 8, 16)
    choice = Choice(Kind.TOPK, 2.5)
    each = [
        [count(replace(routing, calls=(calls,)), None, [replace(choice, S=S)]).active[0] for S in (2.0, 3.0)]
        for calls in routing.calls
    ]
    expected = np.mean([each[0][0], each[1][1], each[2][0], each[3][1]])
    assert count(routing, None, [choice], (3, 1, 0, 2)).active == pytest.approx(expected)
    own = count(routing, None, [choice]).active
    assert own == pytest.approx(np.mean([each[0][1], each[1][1], each[2][0], each[3][0]]))
    assert (count(routing, None, [choice], tuple(reversed(range(48)))).active == own).all(), "of layers that were not recorded"


def test_the_order_of_one_quarter_has_it_first() -> None:
    assert first_of(range(2, 4), 6) == (2, 3, 0, 1, 4, 5)


def test_a_made_up_engine_knows_a_policy_of_any_order() -> None:
    world = World("ramp", 3)
    every = set(world.candidates())
    for order in ORDERS:
        space = replace(world.space, order=ordered(LAYERS, order))
        for choice in (Choice(Kind.TOPK, 1.25), Choice(Kind.OEA, 1.5, 0.0, 0.5), Choice(Kind.SERE, 2.75, 0.3)):
            policy = space.policy((choice,))
            found = world.choice_of(policy)
            assert (found.kind, found.S, found.rho, found.share) == (choice.kind, choice.S, choice.rho, choice.share)
            assert world.counts(found)[1] <= world.top_k
            assert found in every


# In a study.


@pytest.mark.parametrize(
    ("search", "sought"),
    [
        ({"trials": 16}, True), ({"trials": 15}, False), ({"trials": 60, "layerGroups": False}, False),
        ({"trials": 60, "sValues": [1, 2]}, False), ({"trials": 60, "sValues": [1, 2.25]}, True),
    ],
)  # fmt: skip
def test_an_order_is_sought_where_it_is_used_and_pays(tmp_path: Path, search: dict[str, Any], sought: bool) -> None:
    changes = {f"search__{name}": value for name, value in search.items()}
    spec = bench.Ground(tmp_path, 100).spec(World("ramp", 3), 1, 0, **changes)
    assert planner.seeks_order(spec.search) is sought
    trials = spec.search.trials * planner.estimated_trial_seconds(spec, None)
    assert planner.search_seconds(spec, None) == pytest.approx(trials + sought * planner.estimated_trial_seconds(spec, None, 4))


class Stopping(WorldEngine):
    """Ends the tuner before the block that it is told to, and keeps every policy that it was asked for."""

    def __init__(self, world: World, stop: Callable[[list[Policy]], bool]) -> None:
        super().__init__(world, 1)
        self.asked: list[Policy] = []
        self.ends = stop
        self.recorded_under: Policy | None = None

    def block(self, *args: Any, **kwargs: Any) -> Any:
        self.asked.append(self.policy)
        if self.ends(self.asked):
            raise KeyboardInterrupt
        return super().block(*args, **kwargs)

    def record(self) -> None:
        self.recorded_under = self.policy


def at_a_trial(asked: list[Policy]) -> bool:
    """Whether the last policy is a trial's: the first ones have a whole S, and the measurement of an order has not."""
    return asked[-1].uses_rerouting() and not asked[-1].layer_groups


def measured(engine: Stopping) -> list[list[int]]:
    """S in every layer of each policy by which an order was measured."""
    return [larger(policy, tuple(range(LAYERS))) for policy in engine.asked if policy.layer_groups]


def harmful(seed: int = 3) -> World:
    """A world whose late layers count most, and whose errors show in few items."""
    world = World("ramp", seed)
    world.harm = 2.0
    return world


def tune(spec: Any, engine: WorldEngine, report: Quiet | None = None) -> Any:
    def make(given: Any, similarity: str | None, on_start: Any) -> WorldEngine:
        on_start(True)
        return engine

    return tuner.tune(prepare(spec), make, report or Quiet())


def stopped(spec: Any, engine: WorldEngine, report: Quiet | None = None) -> list[int] | None:
    """The order that a study has after its tuner was ended."""
    with pytest.raises(KeyboardInterrupt):
        tune(spec, engine, report)
    study = TuningStudy(Path(spec.out), None)
    try:
        return study.get(LAYER_ORDER)
    finally:
        study.close()


TOPK = {"search__policies": ["topk"], "search__minShare": [0.0]}


def test_the_order_is_measured_once_whatever_kills_the_tuner(tmp_path: Path) -> None:
    """In its second quarter, in the first trial, and in the next one."""
    world = harmful()
    spec = bench.Ground(tmp_path, 7000).spec(world, 1, 16, **TOPK, search__itemsPerTrial=1000)
    first, second, third = Stopping(world, lambda asked: sum(bool(p.layer_groups) for p in asked) == 2), *(
        Stopping(world, at_a_trial) for _ in range(2)
    )  # fmt: skip
    assert stopped(spec, first) is None
    assert len(measured(first)) == 2
    order = stopped(spec, second)
    assert order is not None and order[:2] == [4, 5]
    assert measured(second) == [[2, 2, 1, 1, 1, 1], [1, 1, 2, 1, 1, 1], [1, 1, 1, 2, 1, 1], [1, 1, 1, 1, 2, 2]]
    assert second.recorded_under == EXACT_POLICY
    assert stopped(spec, third) == order
    assert len(third.asked) == 1, "neither the order nor the noise floor is measured again"
    study = TuningStudy(Path(spec.out), None)
    counts = study.get(counts_key(0))
    study.close()
    space = replace(world.space, kinds=(Kind.TOPK,), shares=(0.0,))
    assert counts is not None and counts.active == count(world.seen, None, space.choices(), order).active.tolist()


def test_a_search_that_is_raised_to_more_trials_keeps_its_order(tmp_path: Path) -> None:
    """Trials hold for the order that they were measured with."""
    world = harmful()
    spec = bench.Ground(tmp_path, 3000).spec(world, 1, 8, **TOPK)
    assert stopped(spec, Stopping(world, at_a_trial)) == []
    more = spec.model_copy(update={"search": spec.search.model_copy(update={"trials": 30})})
    engine = Stopping(world, at_a_trial)
    assert stopped(more, engine) == []
    assert not measured(engine)


class Refusing(Stopping):
    """Is of a model whose router cannot have kind topk."""

    def block(self, *args: Any, **kwargs: Any) -> Any:
        if any(bucket.kind is Kind.TOPK for bucket in self.policy.buckets):
            raise UnsupportedError("this router has no topk")
        return super().block(*args, **kwargs)


def test_where_topk_is_refused_the_first_layers_keep_the_larger_s(tmp_path: Path) -> None:
    world, report = harmful(), Quiet()
    spec = bench.Ground(tmp_path, 3000).spec(world, 1, 16, search__policies=["oea"], search__minShare=[0.0])
    assert stopped(spec, Refusing(world, at_a_trial), report) == []
    assert (
        "the larger S goes first to the first layers: no other order could be measured (this router has no topk)" in report.steps
    )


class Strange(Stopping):
    """Answers every item otherwise than exact routing where some layer keeps one expert."""

    def block(self, *args: Any, **kwargs: Any) -> Any:
        report = super().block(*args, **kwargs)
        if self.policy.uses_rerouting() and 1 in larger(self.policy, tuple(range(LAYERS))):
            report.block.sent = [replace(sent, text=f"{sent.text}?") for sent in report.block.sent]
        return report


def test_where_nearly_every_answer_differs_it_is_measured_once_more_with_a_larger_s(tmp_path: Path) -> None:
    world = harmful()
    engine = Strange(world, at_a_trial)
    stopped(bench.Ground(tmp_path, 3000).spec(world, 1, 16, **TOPK), engine)
    assert [sorted(set(kept)) for kept in measured(engine)] == [[1, 2]] * 4 + [[2, 3]] * 4


@pytest.mark.parametrize(
    ("law", "harm", "first", "layers"), [("ramp", 1.0, [4, 5], "layers 4-5"), ("cliff", 0.3, [0, 1], "layers 0-1")]
)
def test_a_whole_study_finds_the_layers_that_count_most(
    tmp_path: Path, law: str, harm: float, first: list[int], layers: str
) -> None:
    """What it ends with has the larger S there, since every S that it may try is a fraction."""
    world, report = World(law, 3), Quiet()
    world.harm = harm
    fractions = [S + step / 4 for S in range(1, 8) for step in (1, 2, 3)]
    spec = bench.Ground(tmp_path, 7000).spec(world, 1, 16, **TOPK, search__sValues=fractions, search__itemsPerTrial=1000)
    finished = tune(spec, WorldEngine(world, 1), report)
    assert any(step.startswith(f"the larger S goes first to {layers}: ") for step in report.steps), report.steps
    assert finished.profile is not None, finished.outcome.message
    kept = larger(Policy.parse(finished.profile["spec"]["policy"]), tuple(range(LAYERS)))
    assert [kept[layer] for layer in first] == [max(kept)] * 2 and min(kept) == max(kept) - 1
