"""The tuner's own side of the warm engine: start, apply, block, stop, with a dead engine told from a slow one."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sere_autotune.trial.engine import BlockReport, EngineFacts, Reject
from sere_autotune.trial.host import EngineHost, last_line
from sere_autotune.trial.load import Load, Request
from sere_autotune.trial.routing import Routing
from sere_autotune.trial.wave import Wave
from sere_autotune.tuning.spec import Served, engine_options
from sere_ext.contract.errors import BudgetExhaustedError, EngineCrashError, SereError
from sere_ext.contract.policy import Policy
from sere_ext.control.switch import States

START_TIMEOUT_S = 900.0  # large models load for minutes
SWITCH_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 15.0
WAVE_TIMEOUT_S = 300.0
PATIENCE = 3.0  # times its expected length, and a minute more, until a block's engine counts as hung
PATIENCE_MORE_S = 60.0
GRACE_S = 5.0  # past the budget's end, for a block that was cut there to hand over what it has


@dataclass
class WarmEngine:
    """One engine in one actor, started on first use and again after a crash."""

    spec: Served
    similarity: str | None
    actor: Any = None
    facts: EngineFacts | None = None
    start_seconds: float = 0.0
    on_start: Any = None  # called when device time begins and ends: (running: bool) -> None
    _ray: Any = field(default=None, repr=False)
    _left_s: Callable[[], float] | None = field(default=None, repr=False)

    def limit(self, left_s: Callable[[], float]) -> None:
        """Let no call outlive the budget.

        Args:
            left_s: says how many seconds it still allows.
        """
        self._left_s = left_s

    def start(self, timeout_s: float = START_TIMEOUT_S) -> EngineFacts:
        """Start Ray and the engine. Raises EngineCrashError, or the engine's own refusal (UnsupportedError, SimilarityError)."""
        ray = self._ray = _ray()
        began = time.monotonic()
        if self.on_start:
            self.on_start(True)
        devices = ray.cluster_resources().get("GPU", 0)
        options: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0, "max_concurrency": 64}
        if devices:
            options["num_gpus"] = min(self.spec.engine.tensor_parallel_size, devices)
        self.actor = ray.remote(EngineHost).options(**options).remote(os.environ.get("OMP_NUM_THREADS"), self._log())
        states: States = self._call(
            self.actor.start.remote(["--model", self.spec.model, *engine_options(self.spec)], self.similarity),
            timeout_s,
            "starting",
        )
        self.start_seconds = time.monotonic() - began
        key, model = states[0].key, states[0].model
        self.facts = EngineFacts(
            key=key.to_json_dict(),
            top_k=model.top_k,
            layers=tuple(sorted(model.moe_layers)),
            experts=model.num_experts,
            most_requests=self._call(
                self.actor.most_requests.remote(), SWITCH_TIMEOUT_S, "saying how many requests it runs at once"
            ),
        )
        return self.facts

    def apply(self, policy: Policy) -> None:
        """Put a policy in force on every rank, with a clean prefix cache; also where it already is, for the cache's sake."""
        if self.actor is None:
            self.start()
        self._call(self.actor.apply.remote(json.dumps(policy.to_json_dict())), SWITCH_TIMEOUT_S, f"switching to {policy.digest}")

    def block(
        self,
        requests: Sequence[Request],
        load: Load,
        fillers: Sequence[Request] = (),
        deadline_s: float | None = None,
        reject: Reject | None = None,
        expected_s: float | None = None,
    ) -> BlockReport:
        """Run one block.

        Args:
            deadline_s: no counted request is sent later than this after the block's begin.
            expected_s: how long the block takes on a sound engine; None where nobody knows yet.

        Raises:
            EngineCrashError: the engine died, or is still not done after a few times the expected length.
            BudgetExhaustedError: the budget ended before the block did.
        """
        patience = (deadline_s or 3600.0) + 300.0 if expected_s is None else PATIENCE * expected_s + PATIENCE_MORE_S
        return self._call(
            self.actor.block.remote(list(requests), load, list(fillers), deadline_s, reject), patience, "running a block"
        )

    def wave(self, requests: Sequence[Request], tokens: int, bucket: str) -> Wave:
        """Start the requests together and decode `tokens` tokens of each; see `EngineHost.wave`.

        Raises:
            EngineCrashError: the engine died, or is still not done after minutes.
            BudgetExhaustedError: the budget ended before the wave did.
        """
        return self._call(self.actor.wave.remote(list(requests), tokens, bucket), WAVE_TIMEOUT_S, "timing decode steps")

    def record(self) -> None:
        """Keep some router calls of the blocks that follow, which must run under exact routing."""
        if self.actor is not None:
            self._call(self.actor.record.remote(True), SWITCH_TIMEOUT_S, "beginning to record")

    def recorded(self) -> Routing | None:
        """What was kept since `record`, which ends here; None where this engine cannot, or nothing was recorded."""
        if self.actor is None:
            return None
        return Routing.of(self._call(self.actor.record.remote(False), SWITCH_TIMEOUT_S, "handing over what was recorded"))

    def stop(self) -> None:
        """End the engine and its actor; nothing is left running."""
        if self.actor is None or self._ray is None:
            return
        try:
            self._ray.get(self.actor.stop.remote(), timeout=STOP_TIMEOUT_S)
        except Exception:  # a dead actor is what we want
            pass
        self._ray.kill(self.actor)
        self.actor = None
        if self.on_start:
            self.on_start(False)

    def _log(self) -> str | None:
        """Where the engine's processes print to; None where the user wants to see it (SERE_ENGINE_LOGS)."""
        return None if os.environ.get("SERE_ENGINE_LOGS") else str(Path(self.spec.out).resolve() / "engine.log")

    def _call(self, reference: Any, timeout_s: float, doing: str) -> Any:
        exceptions = self._ray.exceptions
        allowed = min(timeout_s, (max(self._left_s(), 0.0) + GRACE_S) if self._left_s else math.inf)
        try:
            return self._ray.get(reference, timeout=allowed)
        except exceptions.GetTimeoutError as error:
            self.stop()
            if allowed < timeout_s:
                raise BudgetExhaustedError(
                    f"the budget ran out while the engine was {doing}; raise search.deviceHours or search.wallMinutes and run the "
                    "same line again, which goes on from here"
                ) from error
            raise EngineCrashError(f"the engine hung while {doing} (over {timeout_s:.0f} s)") from error
        except exceptions.RayTaskError as error:
            cause = error.cause
            self.stop()
            if isinstance(cause, SereError):
                raise cause from None
            raise EngineCrashError(f"the engine failed while {doing}: {last_line(cause or error)}") from error
        except exceptions.RayError as error:
            self.stop()
            raise EngineCrashError(f"the engine's process died while {doing}: {last_line(error)}") from error


# Ray's longest socket path below its temporary folder; the kernel takes 107 bytes in all.
_SOCKET = "/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.10"


def _short_folder() -> str | None:
    """A temporary folder for Ray's sockets where the usual one has too long a path, else None."""
    usual = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    return f"/tmp/sere-ray-{os.getuid()}" if len(os.fsencode(usual + "/ray" + _SOCKET)) > 107 else None


def _ray() -> Any:
    """Ray, started on this machine alone with little memory, or joined where a cluster is configured (RAY_ADDRESS)."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray lowers its workers' priority by 15, which would slow down the engine that we measure.
    os.environ.setdefault("RAY_worker_niceness", "0")
    import ray

    if not ray.is_initialized():
        on_term = signal.getsignal(signal.SIGTERM)
        try:
            if os.environ.get("RAY_ADDRESS"):
                ray.init(log_to_driver=False, logging_level="error")
            else:
                ray.init(
                    num_cpus=max(2, os.cpu_count() or 2),
                    include_dashboard=False,
                    object_store_memory=100 * 1024 * 1024,
                    log_to_driver=bool(os.environ.get("SERE_ENGINE_LOGS")),
                    logging_level="error",
                    _node_ip_address="127.0.0.1",
                    _temp_dir=_short_folder(),
                )
        except Exception as error:
            raise SereError(
                f"Ray, which holds the engine's process, did not start ({last_line(error)}); see that the temporary folder "
                "(TMPDIR) has a short path and room, and that RAY_ADDRESS, if it is set, is a running cluster's"
            ) from error
        with contextlib.suppress(ValueError):  # not the main thread
            signal.signal(signal.SIGTERM, on_term)  # Ray puts in its own, which aborts with a stack trace
    return ray


def shut_ray() -> None:
    import sys

    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()
