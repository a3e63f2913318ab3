"""Optuna samplers: ours, which proposes whole tables, and TPE and random as rivals at the same budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optuna

from sere_autotune.tuning.space import Space, Table

Propose = Callable[[int], Table]  # seed -> table


class ModelSampler(optuna.samplers.BaseSampler):
    """Proposes whole tables: drawn evenly at first, at the end those that the model, fitted anew for each trial, would certify.

    A seed of its own per trial number, so that a resumed study proposes as an uninterrupted one would.
    """

    def __init__(self, space: Space, propose: Propose, seed: int) -> None:
        self._space, self._propose, self._seed = space, propose, seed

    def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
        return self._space.distributions()

    def sample_relative(self, study: Any, trial: Any, search_space: dict[str, Any]) -> dict[str, Any]:
        return self._space.params(self._propose(self._seed + 7919 * trial.number))

    def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
        return optuna.samplers.RandomSampler(seed=self._seed + trial.number).sample_independent(study, trial, name, distribution)


def make_sampler(kind: str, space: Space, propose: Propose, seed: int, number: int) -> optuna.samplers.BaseSampler:
    """`model`, `tpe` or `random`, seeded for trial `number`."""
    if kind == "model":
        return ModelSampler(space, propose, seed)
    if kind == "tpe":
        return optuna.samplers.TPESampler(seed=seed + number, n_startup_trials=5)
    return optuna.samplers.RandomSampler(seed=seed + number)
