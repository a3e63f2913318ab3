"""The live policy of a running engine as one API server sees and changes it.

An API server keeps nothing that matters: what is in force is read back from every worker on each request, so several API
servers agree.
"""

from __future__ import annotations

import asyncio
import hmac
from collections import Counter
from typing import Any, Literal

from sere_ext.contract.errors import (
    ConflictError,
    ReadOnlyError,
    SereError,
    UnauthorizedError,
)
from sere_ext.contract.policy import Policy
from sere_ext.contract.slo import LatencySlo
from sere_ext.contract.state import EngineState, Note, PolicyChange, RankInForce
from sere_ext.control import audit
from sere_ext.control.switch import States, agree, ask_ranks, read_states, switch, total_counters

Source = Literal["http", "file"]
DISAGREE = "ranks disagree about the policy; set it again"


class LiveControl:
    """One API server's hold on its engines: reads their state, and changes their policy one change at a time."""

    def __init__(self, engine: Any, token: str | None, directory: str | None = None) -> None:
        self.engine = engine
        self.token = token
        self.directory = directory  # policy volume that decides; None: changes come by HTTP
        self.ready = not directory  # a policy volume must be applied once first
        self.policy: Policy = Policy()  # read back last, for the labels of metrics
        self.slo: LatencySlo | None = None  # as the policy volume says, for the bounds of latency histograms
        self.refusals: Counter[tuple[str, str]] = Counter()  # (source, type of the error)
        self._last_refusal: tuple[str, str] | None = None  # who asked, and the sentence
        self._changing = asyncio.Lock()

    async def state(self) -> EngineState:
        """The body of `GET /sere`, read from every rank now."""
        states = await read_states(self.engine)
        if not agree(states) and self._changing.locked():  # data-parallel engines were asked amid a change
            async with self._changing:
                states = await read_states(self.engine)
        return self.render(states)

    async def change(
        self, change: PolicyChange, source: Source, who: str, *, override: bool = False, error: str | None = None
    ) -> EngineState:
        """Change the policy, one change at a time, and write the change to the audit trail.

        Args:
            who: asked for the change, as the audit trail names them (`audit.py`).
            override: the kill switch asks for this change.
            error: what a policy volume says is wrong although this policy can be served.

        Raises:
            SereError: see `switch.switch`; also ConflictError where a directory is the source.
        """
        try:
            if self.directory and source != "file":
                raise ConflictError(
                    f"the policy comes from the directory {self.directory} (SERE_POLICY_DIR), so it cannot be set by HTTP; "
                    "name another there, or in a cluster change the SereDeployment (`kubectl sere exact` switches re-routing off)"
                )
            async with self._changing:
                states = await switch(
                    self.engine, change.policy, generation=change.generation, similarity=change.similarity,
                    clean=change.clean, note=Note(source=source, override=override, error=error),
                )  # fmt: skip
        except SereError as refusal:
            self.refuse(source, who, refusal, change.policy)
            raise
        audit.applied(source, who, change.policy, states[0], clean=change.clean)
        return self.render(states)

    def refuse(self, source: Source, who: str, error: SereError, policy: Policy | None = None) -> None:
        """Count and log a change that was not made."""
        self.refusals[source, type(error).__name__] += 1
        if source != "file" or self._last_refusal != (
            who,
            str(error),
        ):  # what a policy volume asks for is tried again every few seconds
            audit.refused(source, who, error, policy=policy)
        self._last_refusal = (who, str(error))

    async def say(self, error: str | None) -> None:
        """Report what is wrong with the policy volume in every answer to `GET /sere`; the policy in force stays."""
        await ask_ranks(self.engine, "sere_note", ({"error": error},))

    def render(self, states: States) -> EngineState:
        """The state of all ranks as one object; ranks that disagree are an error, never hidden."""
        first, same = states[0], agree(states)
        self.policy = first.policy
        self.ready = self.ready or first.note.source == "file"
        return EngineState(
            ready=self.ready and same,
            source=first.note.source or ("file" if self.directory else "static"),
            policy=first.policy,
            policy_digest=first.policy_digest,
            similarity_digest=first.similarity_digest,
            generation=first.generation,
            switches=first.switches,
            override=first.note.override,
            error=first.note.error
            or next((state.error for state in states if state.error), None)
            or (None if same else DISAGREE),
            key=first.key,
            model=first.model,
            ranks=tuple(RankInForce(**state.model_dump(include=set(RankInForce.model_fields))) for state in states),
            counters=total_counters(states),
        )

    def unauthorised(self, authorization: str | None) -> SereError | None:
        """Why a request with this `Authorization` header may not change the policy, or None if it may."""
        if not self.token:
            return ReadOnlyError(
                "live control is read-only: no token is configured; start the engine with SERE_CONTROL_TOKEN=<secret> in its "
                "environment and send it as `Authorization: Bearer <secret>`"
            )
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not given:
            return UnauthorizedError(
                "no token was sent; add the header `Authorization: Bearer <the engine's SERE_CONTROL_TOKEN>`"
            )
        if not hmac.compare_digest(given.strip().encode("latin-1"), self.token.encode()):
            return UnauthorizedError(
                "that is not the token; send the engine's SERE_CONTROL_TOKEN as `Authorization: Bearer <token>`"
            )
        return None
