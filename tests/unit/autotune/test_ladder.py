"""From trials to a ladder: the model of the search, and which policies a certificate is tried for."""

import functools
import itertools
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sere_autotune.search.ladder import best_ladder, pick_ladder, worth
from sere_autotune.search.posterior import Observation, PolicyModel, best_table
from sere_autotune.search.replay import Counts, count
from sere_autotune.trial.engine import EXACT_BY_SIZE, median_step
from sere_autotune.trial.routing import Routing
from sere_autotune.trial.stats import power, rough_power
from sere_autotune.tuning.space import EXACT, Choice, Space, auto_buckets
from sere_autotune.tuning.spec import BucketEdges
from sere_ext.contract.errors import UsageError
from sere_ext.contract.policy import Kind
from sere_ext.contract.state import CounterRow

TOP_K = 4


def world(choice: Choice) -> tuple[float, float, float]:
    """(excess discordance, drop, log speed-up) of a planted world, not by the model's formulas; minShare saves more than it costs."""
    worth, kept = (choice.S - 1) * np.exp(-0.7 * choice.share), (choice.S - 1) * np.exp(-1.5 * choice.share)
    excess = {Kind.SERE: 0.08, Kind.TOPK: 0.2, Kind.OEA: 0.1}[choice.kind] * np.exp(-1.6 * worth - 2.5 * choice.rho)
    gain = {Kind.SERE: 0.5, Kind.TOPK: 0.55, Kind.OEA: 0.45}[choice.kind] * np.exp(-0.6 * kept - 0.8 * choice.rho)
    return excess, 0.6 * excess, gain


SHARES = (0.0, 0.5, 0.7)


def space(buckets: int = 1, shares: tuple[float, ...] = (0.0,)) -> Space:
    edges = auto_buckets([4, 16, 64][:buckets], [0, 0, 0][:buckets])
    return Space(edges, (Kind.SERE, Kind.TOPK, Kind.OEA), TOP_K, shares=shares)


@functools.cache
def counted(shares: tuple[float, ...] = (0.0,)) -> Counts:
    """What the choices do to 16 experts, top-4, at 16 tokens."""
    alike = np.random.default_rng(0).random((16, 16)).astype(np.float32)
    alike = np.maximum(alike, alike.T)
    np.fill_diagonal(alike, 1.0)
    return count(Routing.assumed(16, TOP_K, 16), [alike] * 4, space(shares=shares).choices())


def empty(shares: tuple[float, ...] = (0.0,)) -> PolicyModel:
    return PolicyModel(space(shares=shares).choices(), [counted(shares)], 0.001)


def fitted(
    trials: int, seed: int, items: int = 500, shares: tuple[float, ...] = (0.0,), speed_noise: float = 0.03, limit: float = 0.01
) -> PolicyModel:
    """After so many trials as a search makes them: the paper's settings, then any setting of any kind, in the last third an untried candidate of the ladder."""
    rng = np.random.default_rng(seed)
    model = empty(shares)
    seen: list[Observation] = []
    for number in range(trials):
        first = [(2, 0.1), (2, 0.0), (1, 0.1)]
        kind = model.kinds[rng.integers(len(model.kinds))]
        settings = [choice for choice in model.choices if choice.kind is kind]
        choice = Choice(Kind.SERE, *first[number]) if number < len(first) else settings[rng.integers(len(settings))]
        if number >= trials - trials // 3:
            model.fit(seen, seed + number)
            ladder = pick_ladder(model, limit, 1, 0.001, np.ones((1, len(model.choices)), bool), items=3000)
            untried = [pick.table[0] for pick in ladder if pick.table[0] not in {o.choice for o in seen}]
            choice = untried[0] if untried else choice
        excess, _, gain = world(choice)
        losses, gains = rng.poisson(items * excess * 0.8), rng.poisson(items * excess * 0.2)
        seen.append(Observation(0, choice, items, int(losses), int(gains), gain + rng.normal(0, speed_noise)))
    model.fit(seen, seed + 1000)
    return model


def test_the_model_ranks_after_a_dozen_trials_and_the_ladder_keeps_the_budget() -> None:
    broken, regrets = 0, []
    for seed in range(3):
        model = fitted(12, seed)
        ladder = pick_ladder(model, 0.01, 3, 0.001, np.ones((1, len(model.choices)), bool), items=3000)
        assert [c.speedup for c in ladder] == sorted(c.speedup for c in ladder)
        broken += world(ladder[0].table[0])[1] > 0.01
        gain = max(world(pick.table[0])[2] for pick in ladder if world(pick.table[0])[1] <= 0.01)
        best = max(world(c)[2] for c in model.choices[1:] if world(c)[1] <= 0.01)
        regrets.append(best - gain)
    assert broken == 0
    assert np.median(regrets) < 0.15  # of a log speed-up near 0.3


@pytest.mark.parametrize("speed_noise", [0.03, 0.3], ids=["steady times", "noisy neighbours"])
def test_one_candidate_after_few_small_trials_certifies_nearly_always(speed_noise: float) -> None:
    """The demo's case: 8 trials of 160 items, a limit of 2 points, 1,100 items to certify. A fast guess gains nothing."""
    chances = []
    for seed in range(6):
        model = fitted(8, seed, items=160, speed_noise=speed_noise, limit=0.02)
        found = pick_ladder(model, 0.02, 1, 0.001, np.ones((1, len(model.choices)), bool), items=1100)
        excess, drop, _ = world(found[0].table[0]) if found else (0.0, 1.0, 0.0)
        chances.append(power(1100, 0.001 + excess, drop, 0.02, 0.05))
    assert np.mean(chances) > 0.9, chances


def test_speeds_are_learnt_from_counts_with_the_scatter_of_blocks() -> None:
    """A step of which experts are 60 % and slots 20 %. Said to be as uncertain as it is, on a quiet machine and beside neighbours."""
    counts, tried = counted(), [Choice(Kind.SERE, S, rho) for S in (1, 2, 3) for rho in (0.0, 0.5)] + [Choice(Kind.TOPK, 2)]
    step = 0.2 + 0.6 * counts.active / counts.active[0] + 0.2 * counts.slots / counts.slots[0]
    for noise, most in ((0.03, 0.05), (0.3, 0.35)):
        off, errors = [], []
        for seed in range(6):
            rng = np.random.default_rng(seed)
            model = empty()
            true = {c: -np.log(step[i]) for i, c in enumerate(model.choices)}
            model.fit([Observation(0, c, 160, 0, 0, true[c] + rng.normal(0, noise)) for c in tried], 0)
            errors.append(np.abs(model.log_speed(0).mean(axis=0) - -np.log(step)).mean())
            said = model.log_speed(0)[:, 1:]
            off.append(np.abs((said.mean(axis=0) - -np.log(step[1:])) / said.std(axis=0)).mean())
        assert np.mean(errors) < most, (noise, errors)
        assert np.mean(off) < 1.3, (noise, off)


def test_what_was_measured_of_a_choice_counts_for_more_than_the_formula_says_of_it() -> None:
    """In this world a token that keeps three experts loses more than one that keeps two, which no setting of the formula allows."""
    model = empty()
    two, three = Choice(Kind.TOPK, 2), Choice(Kind.TOPK, 3)
    model.fit([Observation(0, two, 2000, 3, 2, 0.2), Observation(0, three, 500, 12, 1, 0.2)], 1)
    drop = dict(zip(model.choices, model.drop(0).mean(axis=0), strict=True))
    assert drop[two] < 0.005 < drop[three]


class Posterior:
    """Stands in for a model of one bucket: two draws of every choice's drop and log speed-up, equally likely; no gains of items."""

    buckets = 1

    def __init__(self, drops: dict[Choice, tuple[float, float]], speeds: dict[Choice, tuple[float, float]]) -> None:
        self.choices = [EXACT, *drops]
        self.drops, self.speeds = ([(0.0, 0.0), *values.values()] for values in (drops, speeds))

    def drop(self, bucket: int) -> NDArray[np.float64]:
        return np.array(self.drops).T

    excess = drop

    def log_speed(self, bucket: int) -> NDArray[np.float64]:
        return np.array(self.speeds).T


SAFE, LUCKY, NOTHING = Choice(Kind.SERE, 2), Choice(Kind.SERE, 1, 0.4), Choice(Kind.TOPK, 3)


@pytest.mark.parametrize(
    ("drops", "speeds", "why"),
    [
        (
            (0.001, 0.0185),
            (0.5, 0.3),
            "a speed that one lucky block has shown does not outweigh that now and then nothing is certified",
        ),
        ((0.001, 0.001), (0.3, 0.0), "half of the posterior says that it gains nothing"),
    ],
)
def test_one_candidate_is_of_those_that_certify_and_gain_most_surely(
    drops: tuple[float, float], speeds: tuple[float, float], why: str
) -> None:
    model: Any = Posterior(
        {SAFE: (0.001, 0.002), LUCKY: drops, NOTHING: (0.0, 0.0)},
        {SAFE: (0.16, 0.2), LUCKY: speeds, NOTHING: (0.01, 0.01)},
    )
    allowed = np.ones((1, 4), bool)
    (first, *_) = pick_ladder(model, 0.02, 1, 0.001, allowed, items=1000)
    assert first.table == (SAFE,), why
    model.drops[2], model.speeds[2] = (0.001, 0.002), (0.3, 0.3)
    assert pick_ladder(model, 0.02, 1, 0.001, allowed, items=1000)[0].table == (LUCKY,), "as sure as the other, and faster"
    allowed[0, 1:3] = False
    assert pick_ladder(model, 0.02, 1, 0.001, allowed, items=1000) == [], "what gains under 2 % needs no certificate"


def test_a_safe_candidate_comes_before_a_daring_one_where_there_is_room_for_both() -> None:
    model: Any = Posterior(
        {SAFE: (0.001, 0.002), LUCKY: (0.004, 0.0185), NOTHING: (0.0, 0.0)},
        {SAFE: (0.16, 0.2), LUCKY: (0.5, 0.5), NOTHING: (0.01, 0.01)},
    )
    found = pick_ladder(model, 0.02, 3, 0.001, np.ones((1, 4), bool), items=1000)
    assert [pick.table for pick in found] == [(SAFE,), (LUCKY,)]


def test_the_best_ladder_is_nearly_that_of_brute_force() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        speed = np.sort(rng.random((9, 1)), axis=0) + 0.02 * rng.normal(size=(9, 40))
        chance = np.clip(1.2 - 1.4 * np.linspace(0, 1, 9)[:, None] * rng.random((1, 40)) ** 0.5, 0, 1)
        every = [ladder for n in range(4) for ladder in itertools.combinations(range(9), n)]
        best = max(worth(speed, chance, ladder) for ladder in every)
        assert worth(speed, chance, tuple(best_ladder(speed, chance, 3))) >= best - 0.01


@pytest.mark.parametrize(("d", "drop"), [(0.01, 0.0), (0.05, 0.005), (0.05, 0.02), (0.1, 0.03)])
def test_rough_power_is_near_the_exact_one(d: float, drop: float) -> None:
    rough = rough_power(1100, np.array([d]), np.array([drop]), 0.02, 0.05)[0]
    assert rough == pytest.approx(power(1100, d, drop, 0.02, 0.05), abs=0.06)


def test_drop_falls_in_both_thresholds_whatever_was_seen() -> None:
    model = fitted(6, 3)
    drop = model.drop(0).mean(axis=0)
    at = {choice: drop[i] for i, choice in enumerate(model.choices)}
    assert at[EXACT] == 0
    for rho in (0.0, 0.3, 0.6):
        assert at[Choice(Kind.SERE, 1, rho)] >= at[Choice(Kind.SERE, 2, rho)] >= at[Choice(Kind.SERE, 3, rho)]
    assert at[Choice(Kind.SERE, 1, 0.2)] >= at[Choice(Kind.SERE, 1, 0.7)]


def test_in_every_draw_a_larger_min_share_costs_accuracy_and_gains_speed() -> None:
    model = empty(SHARES)
    model.fit([], 3)  # what was measured of a choice may differ from the formula
    for kind, S, rho in ((Kind.SERE, 2, 0.3), (Kind.TOPK, 3, 0.0), (Kind.OEA, 2, 0.0)):
        at = [model.choices.index(Choice(kind, S, rho, share)) for share in SHARES]
        for values in (model.drop(0)[:, at], model.log_speed(0)[:, at]):
            assert (np.diff(values, axis=1) >= 0).all()  # equal where a draw is at its least, e^-20
            assert (np.diff(values.mean(axis=0)) > 0).all()


def test_an_unmeasured_speed_does_not_move_the_model() -> None:
    model = empty()
    model.fit([Observation(0, Choice(Kind.SERE, 1, 0.0), 100, 20, 2, float("nan"))], 0)
    assert np.isfinite(model.log_speed(0)).all()


def test_best_table_over_buckets_is_the_best_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    for _ in range(30):
        speeds = np.concatenate([np.zeros((3, 1)), np.sort(rng.random((3, 7)), axis=1)], axis=1)
        drops = np.concatenate([np.zeros((3, 1)), np.sort(rng.random((3, 7)) * 0.03, axis=1)], axis=1)
        picks = best_table(speeds, drops, 0.01)
        value = sum(speeds[b, i] for b, i in enumerate(picks))
        assert np.mean([drops[b, i] for b, i in enumerate(picks)]) <= 0.01
        best = max(
            speeds[0, i] + speeds[1, j] + speeds[2, k]
            for i in range(8)
            for j in range(8)
            for k in range(8)
            if (drops[0, i] + drops[1, j] + drops[2, k]) / 3 <= 0.01
        )
        assert value >= best - 0.12  # costs are rounded up by a 400th of the budget


def test_best_table_of_one_bucket_is_exact_and_forbidden_choices_stay_out() -> None:
    speeds, drops = np.array([[0.0, 0.5, 0.3]]), np.array([[0.0, 0.02, 0.004]])
    assert best_table(speeds, drops, 0.01) == [2]
    assert best_table(speeds, drops, 0.05) == [1]
    assert best_table(speeds, drops, 0.05, np.array([[False, False, False]])) == [0]


def test_buckets_meet_between_the_levels() -> None:
    assert auto_buckets([16], [0]) == (BucketEdges(min_tokens=8, max_tokens=64),)
    assert [(e.min_tokens, e.max_tokens) for e in auto_buckets([4, 16, 64], [0, 0, 0])] == [(2, 8), (9, 32), (33, 256)]
    assert auto_buckets([0], [14.7])[0].min_tokens == 7  # an open loop's bucket comes from its measured batch


def test_buckets_come_from_the_sizes_of_steps_where_requests_bring_drafts() -> None:
    """Three drafts for each of 4, 16 and 64 requests: steps of 16, 64 and 256 tokens, which no bucket may miss."""
    assert auto_buckets([16], [16], [62.5]) == (BucketEdges(min_tokens=8, max_tokens=248),)
    edges = auto_buckets([4, 16, 64], [4, 16, 64], [15.8, 63.1, None])
    assert [(e.min_tokens, e.max_tokens) for e in edges] == [(2, 32), (33, 63), (64, 256)]
    edges = auto_buckets([4, 16, 64], [4, 16, 64], [15.8, 63.1, 250.0])
    assert [(e.min_tokens, e.max_tokens) for e in edges] == [(2, 32), (33, 125), (126, 1000)]
    assert auto_buckets([4, 16], [4, 16], [40.0, 40.0])[1].min_tokens == 41, (
        "steps that prefills fill alike still make two ranges"
    )


def test_the_median_step_comes_from_counts_by_size() -> None:
    rows = [
        CounterRow(digest="exact", bucket="other", calls=50),  # steps of idle ranks
        CounterRow(digest="exact", bucket="16-31", calls=300, tokens=300 * 17),
        CounterRow(digest="exact", bucket="32-63", calls=500, tokens=500 * 60),
        CounterRow(digest="exact", bucket="512-1023", calls=20, tokens=20 * 900),  # prefills
    ]
    assert median_step(rows) == 60
    assert median_step(rows[:1]) is None
    assert EXACT_BY_SIZE.digest == "exact"
    assert EXACT_BY_SIZE.buckets[5].label == "32-63"


def test_params_and_tables_are_the_same_thing() -> None:
    some = space(2)
    table = (Choice(Kind.SERE, 2, 0.35), Choice(Kind.TOPK, 3))
    assert some.table(some.params(table)) == table
    assert some.policy(some.exact()).digest == "exact"
    assert [b.min_tokens for b in some.policy(table).buckets] == [2, 9]


def test_min_share_is_in_the_space_where_s_leaves_something_to_leave_out() -> None:
    assert not any("share" in name for name in space().distributions())
    some = space(2, SHARES)
    assert {c.share for c in some.choices() if c.S > 1} == set(SHARES)
    assert {c.share for c in some.choices() if c.S == 1} == {0.0}
    table = (Choice(Kind.OEA, 2, 0.0, 0.7), Choice(Kind.SERE, 2, 0.35, 0.5))
    assert some.table(some.params(table)) == table
    assert [b.min_share for b in some.policy(table).buckets] == [0.7, 0.5]
    assert some.table(some.params((EXACT, Choice(Kind.TOPK, 1, 0.0, 0.5)))) == (EXACT, Choice(Kind.TOPK, 1))


def test_shares_without_0_still_let_exact_routing_be_a_trial() -> None:
    some = space(1, (0.5, 0.7))
    params = some.params(some.exact())
    assert all(some.distributions()[name]._contains(some.distributions()[name].to_internal_repr(v)) for name, v in params.items())
    assert some.table(params) == some.exact()


def test_min_share_holds_in_the_layers_that_keep_two_experts() -> None:
    some = Space(auto_buckets([16], [0]), (Kind.OEA,), TOP_K, shares=SHARES, layers=(0, 1, 2, 3))
    policy = some.policy((Choice(Kind.OEA, 1.5, 0.0, 0.5),))
    assert [[(b.S, b.min_share) for b in policy.table_for(layer)] for layer in range(4)] == [[(2, 0.5)]] * 2 + [[(1, None)]] * 2


def test_a_quarter_step_is_a_quarter_of_the_layers() -> None:
    """Each layer routes as its own table says: S + 1 in the first layers, as many as the fraction asks for."""
    layers = tuple(range(1, 9))  # layer 0 is dense
    some = Space(auto_buckets([4, 16], [0, 0]), (Kind.TOPK, Kind.SERE), TOP_K, layers=layers)
    low, high = Choice(Kind.TOPK, 2.25), Choice(Kind.SERE, 1.75, 0.3)
    assert {low, high} <= set(some.choices())
    assert some.table(some.params((low, high))) == (low, high)
    policy = some.policy((low, high))
    kept = [[bucket.S for bucket in policy.table_for(layer)] for layer in layers]
    assert kept == [[3, 2], [3, 2], [2, 2], [2, 2], [2, 2], [2, 2], [2, 1], [2, 1]]
    assert {bucket.rho for layer in layers for bucket in policy.table_for(layer) if bucket.kind is Kind.SERE} == {0.3}


def test_exact_buckets_stay_exact_in_every_layer_group() -> None:
    some = Space(auto_buckets([4, 16], [0, 0]), (Kind.TOPK,), TOP_K, layers=(0, 1, 2, 3))
    policy = some.policy((EXACT, Choice(Kind.TOPK, 2.5)))
    assert [[b.min_tokens for b in policy.table_for(layer)] for layer in range(4)] == [[9]] * 4
    assert some.policy(some.exact()).digest == "exact"


def test_with_too_few_layers_the_step_is_whole() -> None:
    for layers in ((), (0, 1, 2)):
        assert {c.S for c in Space(auto_buckets([16], [0]), (Kind.TOPK,), TOP_K, layers=layers).choices()} == {1, 2, 3}


def test_given_values_of_s_are_all_that_is_tried() -> None:
    space = Space(auto_buckets([16], [0]), (Kind.TOPK, Kind.OEA), TOP_K, layers=(0, 1, 2, 3), s_values=(2.25, 2.5))
    assert {(c.kind, c.S) for c in space.choices()[1:]} == {(k, s) for k in (Kind.TOPK, Kind.OEA) for s in (2.25, 2.5)}
    assert all(space.table(space.params((choice,))) == (choice,) for choice in space.choices())
    distributions = space.distributions()
    for table in space.first_trials(9):  # Optuna refuses a value that its distribution does not have
        for name, value in space.params(table).items():
            assert distributions[name]._contains(distributions[name].to_internal_repr(value))
    assert space.first_trials(9)[1:], "one of the given values is tried where none is the paper's"


def test_a_value_of_s_that_the_model_cannot_have_is_refused_with_those_that_it_can() -> None:
    with pytest.raises(UsageError, match=r"search.sValues: 2.1 cannot be tried on this model; take some of 1, 1.25, 1.5"):
        Space(auto_buckets([16], [0]), (Kind.OEA,), TOP_K, layers=(0, 1, 2, 3), s_values=(2.0, 2.1))


@pytest.mark.parametrize(
    ("kinds", "shares", "first"),
    [
        ((Kind.SERE, Kind.TOPK, Kind.OEA), (0.0, 0.5, 0.7), [Choice(Kind.OEA, 2, 0.0, 0.5), Choice(Kind.SERE, 2, 0.1)]),
        ((Kind.SERE, Kind.TOPK, Kind.OEA), (0.0,), [Choice(Kind.OEA, 2), Choice(Kind.SERE, 2, 0.1)]),
        ((Kind.SERE, Kind.TOPK), (0.0, 0.5), [Choice(Kind.SERE, 2, 0.1), Choice(Kind.SERE, 2, 0.0)]),
        ((Kind.TOPK,), (0.0, 0.5), [Choice(Kind.TOPK, 2), Choice(Kind.TOPK, 1)]),
    ],
    ids=["with minShare", "without", "no oea", "topk alone"],
)
def test_the_first_offer_is_what_the_comparison_of_kinds_found_best(
    kinds: tuple[Kind, ...], shares: tuple[float, ...], first: list[Choice]
) -> None:
    """docs/policies.md: kind oea at S = 2, with a minShare where one is searched; `sere` has its own trials behind it."""
    some = Space(auto_buckets([4, 16], [0, 0]), kinds, TOP_K, shares=shares)
    assert some.first_trials(6) == [some.exact(), *((choice,) * 2 for choice in first)]
