"""The Optuna study: the only truth of a tuning run. Ask and tell, heal after a kill, everything measured kept in it.

One journal file, one writer (guarded by an advisory lock that the kernel drops when the process dies). What does not
belong to one trial (exact answers, noise floor, frozen ladder, certification blocks) is kept as study attributes.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import time
import uuid
from pathlib import Path
from typing import Any, TypeVar

import optuna
from optuna.storages import JournalStorage
from optuna.trial import FrozenTrial, TrialState

from sere_autotune.study.budget import Budget
from sere_autotune.study.journal import Journal
from sere_autotune.study.schema import ENQUEUED, FINGERPRINT, SPENT, Key, Spent, exact_answers_key
from sere_autotune.trial.measures import Answer, LevelResult
from sere_autotune.tuning.space import Space, Table
from sere_autotune.tuning.spec import TuningSpec
from sere_ext.contract.errors import UsageError
from sere_ext.contract.record import canonical_json

T = TypeVar("T")

JOURNAL = "study.journal"
_ID = "study.id"

# What may change between a run and its continuation: budgets and places, not what is measured.
_BUDGETS = {"trials", "device_hours", "wall_minutes"}


def fingerprint(spec: TuningSpec, cert_digest: str, model: str) -> str:
    """Content address of everything that a study's trials must have in common.

    Args:
        cert_digest: of the held-out items.
        model: digest of the model's configuration and weights: a folder that was trained further holds another model.
    """
    kept = spec.model_dump(mode="json", exclude={"out"})
    kept["search"] = spec.search.model_dump(mode="json", exclude=_BUDGETS)
    kept["certify"] = spec.certify.model_dump(mode="json", exclude={"most_load"})  # which is measured after the outcome
    text = canonical_json({"spec": kept, "cert": cert_digest, "model": model})
    return "sha256:" + hashlib.sha256(text).hexdigest()


class TuningStudy:
    """The study in a folder. Every method writes through at once."""

    def __init__(self, out: Path, mark: str | None) -> None:
        """Open or begin the study of `out`.

        Args:
            mark: the fingerprint that trials must have in common; None reads a study whatever it is of.

        Raises:
            UsageError: another tuner has the folder open, or it holds a study of something else.
        """
        self.out = out
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._lock: io.TextIOWrapper | None = (out / ".lock").open("w")
        except OSError as error:
            raise UsageError(f"out: {out} cannot be used as the study's folder ({error.strerror}); name another") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(f"another tuner works in {out}; wait for it, or name another `out`") from error
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        path = out / JOURNAL
        for stale in out.glob(JOURNAL + "*.lock"):
            stale.unlink(missing_ok=True)  # of a killed writer: we hold the folder
        self.study = optuna.create_study(
            storage=JournalStorage(Journal(path)), study_name="sere", direction="minimize", load_if_exists=True
        )
        # This process is the only writer, so copies stay true: of what the journal holds, and of what was decoded from it.
        self._stored: dict[str, Any] = self.study.user_attrs
        self._decoded: dict[str, Any] = {}
        old = self.get(FINGERPRINT)
        if mark is not None and old is not None and old != mark:
            self.close()
            raise UsageError(
                f"{out} holds a study of another model, load, limit or set of items; name another `out`, or add --fresh "
                "to begin anew there"
            )
        if mark is not None and old is None:
            self.put(FINGERPRINT, mark)
        if mark is not None and study_id(out) is None:
            (out / _ID).write_text(uuid.uuid4().hex + "\n")

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # Study attributes.

    def get(self, key: Key[T]) -> T | None:
        """The value under a key of `schema`, None where it was never stored."""
        if key.name not in self._decoded:
            if key.name not in self._stored:
                return None
            self._decoded[key.name] = key.decode(self._stored[key.name])
        found: T = self._decoded[key.name]
        return found

    def put(self, key: Key[T], value: T) -> None:
        """Store a value, which nobody may change afterwards."""
        self.study.set_user_attr(key.name, key.encode(value))
        self._decoded[key.name] = value

    # Spending.

    def restore(self, budget: Budget) -> None:
        """Charge what earlier processes spent on this study."""
        spent = self.get(SPENT) or Spent()
        budget.device_spent_s, budget.wall_spent_s = spent.device_s, spent.wall_s

    def note_spent(self, budget: Budget) -> None:
        """Write down what was spent; called at every trial and block, and meanwhile by the meter's thread (`meter.py`)."""
        now = time.monotonic()
        self.put(SPENT, Spent(budget.device_used(now), budget.wall_used(now)))

    # Trials.

    def heal(self) -> None:
        """Enqueue again what a killed tuner left running, and close it.

        Where exact routing's trial was killed, the policies that are enqueued go behind it again: they are measured against it.
        """
        zombies = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        planned = {trial.number: trial.params or trial.system_attrs.get("fixed_params") for trial in zombies}
        again = {number: params for number, params in planned.items() if params}
        waiting = self.waiting() if again and not self.complete() else []
        for trial in zombies:
            self.study.tell(trial.number, state=TrialState.FAIL)
        for _ in waiting:
            self.skip(self.study.ask())  # the one that has waited longest
        for number, params in again.items():
            self.study.enqueue_trial(params, user_attrs={"retry_of": number})
        for trial in waiting:
            self.study.enqueue_trial(trial.system_attrs["fixed_params"])

    def enqueue_first(self, space: Space, trials: int) -> None:
        """Trial 0 is exact routing, then come the settings that evidence and the paper of SERE suggest; once per study."""
        if self.get(ENQUEUED):
            return
        done = len(self.study.get_trials(deepcopy=False))
        for table in space.first_trials(trials)[done:]:
            self.enqueue(space, table)
        self.put(ENQUEUED, True)

    def waiting(self) -> list[FrozenTrial]:
        """Trials that are enqueued and not begun."""
        return self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))

    def enqueue(self, space: Space, table: Table) -> None:
        """Make a table the next trial, behind those that are enqueued already."""
        self.study.enqueue_trial(space.params(table))

    def ask(self, space: Space, sampler: str, seed: int) -> tuple[optuna.Trial, Table]:
        """The next trial and its table, from those enqueued or from Optuna's sampler (`tpe` or `random`).

        The sampler has a seed for each trial, so that a resumed study proposes as an uninterrupted one would.
        """
        seed += len(self.study.get_trials(deepcopy=False))
        self.study.sampler = (
            optuna.samplers.TPESampler(seed=seed, n_startup_trials=5) if sampler == "tpe" else optuna.samplers.RandomSampler(seed)
        )
        trial = self.study.ask(space.distributions())
        return trial, space.table(trial.params)

    def tell(self, trial: optuna.Trial, value: float, constraints: dict[str, float], record: dict[str, Any]) -> None:
        """Constraints go in before the value: a complete trial without them would count as feasible."""
        for key, violation in constraints.items():
            trial.set_constraint(key, violation)
        for key, entry in record.items():
            trial.set_user_attr(key, entry)
        self.study.tell(trial, value)

    def skip(self, trial: optuna.Trial) -> None:
        """Give up a trial that was asked for and is not to be measured; it does not count."""
        self.study.tell(trial, state=TrialState.FAIL)

    def complete(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))

    def levels(self, trial: FrozenTrial) -> list[LevelResult]:
        return [LevelResult(**level) for level in trial.user_attrs.get("levels", [])]

    # Exact routing's answers on SEARCH at each load level, from trial 0.

    def exact_answers(self, level: int) -> dict[str, Answer]:
        found = self.get(exact_answers_key(level)) or {}
        return {item: Answer(right, text) for item, (right, text) in found.items()}

    def put_exact_answers(self, level: int, answers: dict[str, Answer]) -> None:
        self.put(exact_answers_key(level), {item: (a.correct, a.text) for item, a in answers.items()})

    def exact_tpot_ms(self, space: Space) -> list[float]:
        """Median TPOT of the exact trial per level, or [] before it ended."""
        exact = next((t for t in self.complete() if space.table(t.params) == space.exact() and self.levels(t)), None)
        return [level.latency_ms["tpot"]["p50"] for level in self.levels(exact)] if exact else []


def study_id(out: Path) -> str | None:
    """Identity of the study in a folder, different from that of an earlier study in the same folder; None before it has begun."""
    try:
        return (out / _ID).read_text().strip() or None
    except OSError:
        return None


def forget(out: Path) -> None:
    """Remove a study and what was written from it (`--fresh`). Raises UsageError while another tuner works there."""
    if not out.exists():
        return
    TuningStudy(out, None).close()
    for name in (JOURNAL, _ID, "profile.json", "report.html", "summary.json"):
        (out / name).unlink(missing_ok=True)
    for stale in out.glob(JOURNAL + "*.lock"):
        os.unlink(stale)
