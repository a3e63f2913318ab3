"""Kinds of policy that the search gives up: the engine refuses them or dies of them. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from optuna.trial import FrozenTrial

from sere_ext.contract.policy import Kind, Policy

_CRASHES = 2  # trials of a kind that the engine may die of


def removed_kinds(trials: Iterable[FrozenTrial]) -> dict[Kind, str]:
    """Kind -> why it is tried no more.

    One refusal is enough, since the engine refuses a kind for what the model is. A crash may have another cause, so two are
    needed. A trial whose buckets mix several kinds does not tell which of them is to blame, so it counts for one crash of each.
    """
    counts: Counter[Kind] = Counter()
    why: dict[Kind, str] = {}
    for trial in trials:
        crash = trial.user_attrs.get("crash")
        if not crash:
            continue
        kinds = {bucket.kind for bucket in Policy.parse(trial.user_attrs["policy"]).buckets}
        sure = len(kinds) == 1 and trial.user_attrs.get("refused")
        for kind in kinds:
            counts[kind] += _CRASHES if sure else 1
            why[kind] = str(crash)
    return {kind: why[kind] for kind, count in counts.items() if count >= _CRASHES}
