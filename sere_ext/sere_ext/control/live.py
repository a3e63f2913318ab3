"""Live control over HTTP, on the engine's own port: `GET /sere` and `PUT /sere/policy` (forms: ARCHITECTURE.md).

An endpoint plug-in of vLLM, loaded only where VLLM_PLUGINS names `sere_control`. It keeps nothing that matters: what is
in force is read back from every worker on each request, so several API servers agree.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import os
from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from sere_ext.contract.errors import (
    ConflictError,
    PolicyError,
    ReadOnlyError,
    SereError,
    SimilarityError,
    UnauthorizedError,
    UnsupportedError,
)
from sere_ext.contract.policy import Policy, Record
from sere_ext.contract.validation import explain
from sere_ext.control import audit
from sere_ext.control.switch import READ_BACK, States, agree, ask_ranks, read_states, switch, total_counters

logger = logging.getLogger("vllm.sere")

Source = Literal["http", "file"]
DISAGREE = "ranks disagree about the policy; set it again"


MAX_BODY_BYTES = 1 << 20  # a policy of 16 buckets in 8 layer groups is below 20 kB
_EXAMPLE = '{"policy": {"buckets": [{"minTokens": 8, "kind": "topk", "S": 2}]}}'


class PolicyChange(Record):
    """Body of `PUT /sere/policy`."""

    policy: Policy
    similarity: Annotated[str | None, Field(min_length=1, description="path of a similarity file that workers can read")] = None
    generation: Annotated[int | None, Field(le=2**53, description="number of the change, above the one in force")] = None
    clean: Annotated[bool, Field(description="drain and drop the prefix cache first")] = False


class LiveControl:
    """What one API-server process knows about its engines. What the source says lies with the workers, for all servers."""

    def __init__(self, engine: Any, token: str | None, directory: str | None = None) -> None:
        self.engine = engine
        self.token = token
        self.directory = directory  # the declarative source; None: changes come by HTTP
        self.ready = not directory  # a file source is ready once it was applied for the first time
        self.policy: Policy = Policy()  # last one read back, for labels
        self.refusals: Counter[tuple[str, str]] = Counter()  # (source, type of the error)
        self._said: tuple[str, str] | None = None  # last refusal
        self._changing = asyncio.Lock()

    async def state(self) -> dict[str, Any]:
        """The body of `GET /sere`, read from every rank now."""
        states = await read_states(self.engine)
        if not agree(states) and self._changing.locked():  # data-parallel engines were asked amid a change
            async with self._changing:
                states = await read_states(self.engine)
        return self.render(states)

    async def change(
        self, change: PolicyChange, source: Source, who: str, *, note: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Switch, one change at a time, and write it to the audit trail.

        Args:
            who: see `audit`.
            note: what a file source says of it: override, error.

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
                    clean=change.clean, note={"override": False, "error": None, **(note or {}), "source": source},
                )  # fmt: skip
        except SereError as error:
            self.refuse(source, who, error, change.policy)
            raise
        audit.applied(source, who, change.policy, states[0], clean=change.clean)
        return self.render(states)

    def refuse(self, source: Source, who: str, error: SereError, policy: Policy | None = None) -> None:
        """Count and log a change that was not made."""
        self.refusals[source, type(error).__name__] += 1
        if source != "file" or self._said != (who, str(error)):  # a directory's wish is tried again every few seconds
            audit.refused(source, who, error, policy=policy)
        self._said = (who, str(error))

    async def say(self, error: str | None) -> None:
        """Keep what is wrong with the file source where every API server reads it; the policy in force stays."""
        await ask_ranks(self.engine, "sere_note", ({"error": error},))

    def render(self, states: States) -> dict[str, Any]:
        """The state of all ranks as one object; ranks that disagree are an error, never hidden."""
        first = states[0]
        note = first["note"]
        self.policy = Policy.parse(first["policy"])
        self.ready = self.ready or note.get("source") == "file"
        same = agree(states)
        return {
            "ready": self.ready and same,
            "source": note.get("source") or ("file" if self.directory else "static"),
            "policy": first["policy"],
            "policyDigest": first["policyDigest"],
            "similarityDigest": first["similarityDigest"],
            "generation": first["generation"],
            "switches": first["switches"],
            "override": note.get("override", False),
            "error": note.get("error") or first["error"] or (None if same else DISAGREE),
            "key": first["key"],
            "model": first["model"],
            "ranks": [{name: state[name] for name in ("engine", "rank", *READ_BACK)} for state in states],
            "counters": total_counters(states),
        }

    def unauthorised(self, authorization: str | None) -> SereError | None:
        """Why a change may not be asked for, or None if it may."""
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


def status_of(error: SereError) -> int:
    """HTTP status of a refusal."""
    table: tuple[tuple[type[SereError], int], ...] = (
        (UnauthorizedError, 401), (ReadOnlyError, 403), (ConflictError, 409), (PolicyError, 422), (SimilarityError, 422),
        (UnsupportedError, 503),
    )  # fmt: skip
    return next((status for kind, status in table if isinstance(error, kind)), 500)


def parse_change(body: bytes) -> PolicyChange:
    """Read the body of a PUT. Raises PolicyError with one sentence per problem."""
    if len(body) > MAX_BODY_BYTES:
        raise PolicyError(f"the body has {len(body)} bytes, a policy has at most {MAX_BODY_BYTES}")
    try:
        decoded = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise PolicyError(f"the body cannot be read as JSON ({error}); send one like {_EXAMPLE}") from error
    if isinstance(decoded, dict) and "buckets" in decoded and "policy" not in decoded:
        raise PolicyError(f"the body is a bare policy; wrap it, like {_EXAMPLE}")
    if not isinstance(decoded, dict) or "policy" not in decoded:
        raise PolicyError(f"the body should be an object with a policy, like {_EXAMPLE}")
    if not isinstance(decoded["policy"], dict):
        raise PolicyError('policy should be an object like {"buckets": [...]}; {} is exact routing')
    policy = Policy.parse(decoded["policy"])
    try:
        return PolicyChange.model_validate({**decoded, "policy": policy})
    except ValidationError as error:
        raise PolicyError(explain(error, PolicyChange)) from error


class SereControl:
    """vLLM's `EndpointPlugin` interface."""

    name = "sere_control"
    required_tasks = None

    def attach_router(self, app: Any) -> None:
        """Add the routes; answers 503 until the engine is up."""
        from fastapi import Request
        from fastapi.responses import JSONResponse

        def failed(error: SereError) -> JSONResponse:
            status, name = status_of(error), type(error).__name__
            headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
            return JSONResponse({"error": {"type": name, "message": str(error)}}, status, headers=headers)

        def live(request: Any) -> LiveControl:
            control: LiveControl | None = getattr(request.app.state, "sere", None)
            if control is None:
                raise UnsupportedError("there is no engine behind this server")
            return control

        async def get_state(request: Any) -> JSONResponse:
            try:
                return JSONResponse(await live(request).state())
            except SereError as error:
                return failed(error)

        async def get_ready(request: Any) -> JSONResponse:
            """200 once the first policy is applied, for readiness probes; asks workers only until then."""
            try:
                control = live(request)
                ready = control.ready or (await control.state())["ready"]
            except SereError:
                ready = False
            return JSONResponse({"ready": ready}, 200 if ready else 503)

        async def put_policy(request: Any) -> JSONResponse:
            peer = f"{request.client.host}:{request.client.port}" if request.client else "an unknown peer"
            try:
                control = live(request)
                if refusal := control.unauthorised(request.headers.get("authorization")):
                    control.refuse("http", peer, refusal)
                    return failed(refusal)
                who = f"token {audit.fingerprint(control.token or '')} from {peer}"
                try:
                    change = parse_change(await request.body())
                except PolicyError as error:
                    control.refuse("http", who, error)
                    raise
                return JSONResponse(await control.change(change, "http", who))
            except SereError as error:
                return failed(error)

        for handler in (get_state, get_ready, put_policy):  # annotations are strings here, FastAPI needs the class
            handler.__annotations__["request"] = Request
        app.add_api_route("/sere", get_state, methods=["GET"], response_model=None)
        app.add_api_route("/sere/ready", get_ready, methods=["GET"], response_model=None)
        app.add_api_route("/sere/policy", put_policy, methods=["PUT"], response_model=None)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Start what runs beside the routes: the file watcher and the metrics, in the first API server only."""
        if engine_client is None:
            return
        directory = os.environ.get("SERE_POLICY_DIR") or None
        parallel = engine_client.vllm_config.parallel_config
        control = LiveControl(engine_client, os.environ.get("SERE_CONTROL_TOKEN"), directory)
        state.sere = control
        first = getattr(parallel, "_api_process_rank", 0) in (0, -1)
        state.sere_tasks = []
        if first:
            from sere_ext.control.metrics import Metrics

            state.sere_tasks.append(asyncio.create_task(Metrics(control).run()))
        if first and directory:
            from sere_ext.control.watch import Watcher

            state.sere_tasks.append(asyncio.create_task(Watcher(control, directory).run()))


def endpoint_plugin() -> SereControl:
    """Factory that the entry point `vllm.endpoint_plugins` names."""
    return SereControl()
