"""A recording of a few items, made by hand: what its world replays, its true drops, and the best policy in it."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from benchmarks import recorded
from benchmarks import tuner as bench
from sere_autotune.trial.load import Load
from sere_autotune.tuning.space import EXACT, Choice
from sere_ext.contract.policy import Kind, Policy
from tests.kit import ROOT
from tests.kit.replayed import Recording, Replayed, step_cost
from tests.kit.truth import WorldEngine

ITEMS, LAYERS, EXPERTS, TOP_K, COST = 10, 4, 8, 2, (1.0, 0.5, 0.25)
WRONG = {  # item numbers that each run gets wrong
    "exact 1 0": [[9], [9]], "topk 1 0": [[0, 1, 2, 9], [0, 1, 2, 9]], "oea 1 0": [[9], [8, 9]], "sere 1 0": [[5, 9], [5, 9]],
    "sere 1 0.4": [[9], [9]],
}  # fmt: skip
COUNTS = {
    "exact 1 0": (8.0, 2.0), "topk 1 0": (3.0, 1.0), "oea 1 0": (4.0, 2.0), "sere 1 0": (4.0, 1.5), "sere 1 0.4": (6.0, 1.5),
}  # fmt: skip


def held(wrong: dict[str, list[list[int]]] = WRONG, items: int = ITEMS) -> dict[str, Any]:
    """The file's content."""
    source = np.random.default_rng(0)

    def run(name: str, lost: list[int]) -> dict[str, Any]:
        active, slots = COUNTS[name]
        return {"right": recorded.packed(~np.isin(np.arange(items), lost)), "active": active, "slots": slots}

    alike = source.uniform(0.2, 0.9, size=(LAYERS, EXPERTS, EXPERTS))
    alike = (alike + alike.transpose(0, 2, 1)) / 2
    alike[:, range(EXPERTS), range(EXPERTS)] = 1
    return {
        "items": items, "topK": TOP_K, "layers": LAYERS, "experts": EXPERTS, "calls": 2,
        "similarity": recorded.packed(alike), "logits": recorded.packed(source.normal(size=(LAYERS, 2, 16, EXPERTS))),
        "cells": {name: [run(name, lost) for lost in runs] for name, runs in wrong.items()},
    }  # fmt: skip


@pytest.fixture
def world() -> Replayed:
    return Replayed(Recording(held(), COST), seed=4)


@pytest.mark.parametrize(
    ("choice", "drop"), [(EXACT, 0.0), (Choice(Kind.TOPK, 1), 0.3), (Choice(Kind.OEA, 1), 0.05), (Choice(Kind.SERE, 1, 0.4), 0.0)]
)
def test_the_true_drop_is_over_all_items_and_runs(world: Replayed, choice: Choice, drop: float) -> None:
    assert world.drop(choice) == pytest.approx(drop)


def test_each_prompt_stands_for_one_recorded_item_and_gets_that_items_answer(world: Replayed) -> None:
    prompts = [f"item {i}" for i in range(400)]
    items = np.array([world.item(prompt) for prompt in prompts])
    assert set(items) == set(range(ITEMS))
    source = np.random.default_rng(1)
    assert (world.right(prompts, Choice(Kind.TOPK, 1), source) == ~np.isin(items, [0, 1, 2, 9])).all()
    oea = world.right(prompts, Choice(Kind.OEA, 1), source)
    assert oea[items < 8].all() and not oea[items == 9].any()
    assert 0.2 < oea[items == 8].mean() < 0.8  # its two runs differ, and each block draws one of them per prompt
    other = Replayed(world.recording, seed=5)
    assert [other.item(prompt) for prompt in prompts] != items.tolist()


def test_a_step_costs_what_its_counted_experts_and_slots_do(world: Replayed) -> None:
    assert world.tpot_ms == pytest.approx(1 + 4 + 0.5)
    assert world.time(Choice(Kind.OEA, 1)) == pytest.approx((1 + 2 + 0.5) / 5.5)
    active, slots = world.counts(Choice(Kind.TOPK, 2))  # was not recorded, and changes none of the router calls that were kept
    assert slots == TOP_K and 1 < active <= EXPERTS


def test_rho_off_the_grid_is_the_nearest_on_it(world: Replayed) -> None:
    assert world.drop(Choice(Kind.SERE, 1, 0.15)) == world.drop(Choice(Kind.SERE, 1)) > 0
    assert world.drop(Choice(Kind.SERE, 1, 0.95)) == 0


def test_the_best_policy_is_the_fastest_that_keeps_the_limit(world: Replayed) -> None:
    best, speed = world.best(0.06)
    assert (best.kind, speed) == (Kind.OEA, pytest.approx(5.5 / 3.5))
    assert world.best(0.0)[0] == Choice(Kind.SERE, 1, 0.25)  # the first that has what rho = 0.4 has
    assert world.best(0.5)[0].kind is Kind.TOPK


def test_a_policy_is_known_by_what_the_engine_is_given(world: Replayed) -> None:
    policy = world.space.policy((Choice(Kind.SERE, 1, 0.4),)).model_copy(update={"similarity_digest": "sha256:0"})
    assert world.choice_of(policy) == Choice(Kind.SERE, 1, 0.4)
    assert world.choice_of(Policy()) == EXACT


def test_a_policy_that_was_not_recorded_is_answered_by_nobody(world: Replayed) -> None:
    """Rather than as exact routing would be."""
    engine = WorldEngine(world, 1)
    engine.apply(replace(world.space, shares=(0.0, 0.5), top_k=4, s_values=(2.0,)).policy((Choice(Kind.OEA, 2, share=0.5),)))
    with pytest.raises(AssertionError, match="no choice of this world"):
        engine.block([], Load(concurrency=16))


def test_discordance_of_single_blocks(world: Replayed) -> None:
    assert world.discordance(Choice(Kind.OEA, 1)) == pytest.approx((0.05, 0.0))
    assert world.recording.noise_floor == 0.0
    assert Recording(held(WRONG | {"exact 1 0": [[9], [8]]}), COST).noise_floor == pytest.approx(0.2)


def test_the_cost_of_a_step_is_fitted_to_measured_arms() -> None:
    a, b, c = COST
    arms = [
        {"concurrency": 16, "active": u, "slots": s, "tpotMs": a + b * u + c * s} for u, s in ((50, 8), (20, 8), (20, 2), (10, 3))
    ]
    strange = [{"concurrency": 16, "tpotMs": 99}, {"concurrency": 4, "active": 1, "slots": 1, "tpotMs": 99}]
    assert step_cost([*arms, *strange]) == pytest.approx(COST)


def test_a_cells_name_is_read_as_the_choice_it_was_written_for() -> None:
    cells = {recorded.name(choice): [{"right": base64.b64encode(b"\xff\xff").decode(), "active": 1.0, "slots": 1.0}]
             for choice in recorded.choices()}  # fmt: skip
    assert set(Recording(held() | {"cells": cells}, COST).right) == set(recorded.choices())


@pytest.mark.parametrize(
    ("S", "larger", "expected"), [(2.0, None, [2, 2, 2, 2]), (2.25, None, [3, 2, 2, 2]), (1.75, None, [2, 2, 2, 1]), (2.0, (3,), [2, 2, 2, 3])]
)  # fmt: skip
def test_layers_with_the_larger_s_are_those_of_the_search_unless_named(
    S: float, larger: tuple[int, ...] | None, expected: list[int]
) -> None:
    found = recorded.buckets(Choice(Kind.OEA, S), LAYERS, larger)
    assert [bucket["S"] for bucket in found] == expected


def test_a_replayed_study_ends_with_a_policy_of_the_recording(tmp_path: Path) -> None:
    """In 500 items, of which `oea` loses none and the others too many."""
    wrong = {name: [[*range(0, 500, 10)]] * 2 for name in WRONG} | {"exact 1 0": [[9], [9]], "oea 1 0": [[9], [9]]}
    world = Replayed(Recording(held(wrong, 500), COST), seed=1)
    found = bench.study(bench.Ground(tmp_path, items=5000), world, 1, bench.OURS, trials=6)
    assert (found.law, found.policy.split()[0], found.regret) == ("replayed", "oea", 0.0), found


def test_the_search_of_the_samples_ends_with_a_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the recorded answers of the model that the sample serves: cluster tests and the demo's --tune-in-cluster go on from its profile."""
    given = yaml.safe_load((ROOT / "manifests/samples/demo.yaml").read_text())["spec"]
    monkeypatch.setattr(bench, "MAX_DROP", given["accuracy"]["maxDropPoints"] / 100)
    recording, ground = Recording.read(), bench.Ground(tmp_path, items=1500)  # as many as the claim holds
    asked = {
        f"search__{key}": given["tuning"][key] for key in given["tuning"].keys() & {"trials", "deviceHours", "rungs", "policies"}
    }
    asked |= {f"search__{key}": value for key, value in given["tuning"]["search"].items()}
    asked |= {f"certify__{key}": given["tuning"]["certify"][key] for key in ("pairs", "items")}
    chosen = 0
    for seed in range(12):
        world = Replayed(recording, seed)
        chosen += bench.tuned(ground, world, seed, WorldEngine(world, seed), asked.copy()).profile is not None
    assert chosen == 12


def test_cells_that_the_file_has_are_not_decoded_again() -> None:
    every = recorded.choices()
    assert [choice for choice, _ in recorded.work(1, {})][: len(every)] == every
    done = {recorded.name(choice): ["run"] for choice in every}
    assert list(recorded.work(1, done)) == [(EXACT, run) for run in range(1, recorded.EXACT_RUNS)]
    done[recorded.name(EXACT)] *= recorded.EXACT_RUNS
    assert list(recorded.work(2, done)) == [(choice, 1) for choice in every[1:]]
