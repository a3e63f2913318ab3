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
from typing import Any, Literal

from pydantic import Field, ValidationError

from sere_ext.errors import ConflictError, PolicyError, SereError, SimilarityError, UnsupportedError
from sere_ext.policy import Policy, Record, explain
from sere_ext.switch import States, read_states, switch

logger = logging.getLogger("vllm.sere")

Source = Literal["static", "http", "file"]


class PolicyChange(Record):
    """Body of `PUT /sere/policy`."""

    policy: Policy
    similarity: str | None = Field(default=None, description="path of a similarity file that the workers can read")
    generation: int | None = None
    clean: bool = False


class LiveControl:
    """What one API-server process knows about its engine."""

    def __init__(self, engine: Any, token: str | None, source: Source, engines: int = 1) -> None:
        self.engine = engine
        self.engines = engines  # data-parallel engines behind this server
        self.token = token
        self.source: Source = source
        self.ready = source != "file"  # a file source is ready once it was applied for the first time
        self.override = False
        self.error: str | None = None  # of the file source; a worker's own error stands in its state
        self.policy: Policy = Policy()  # last one read back, for labels
        self._changing = asyncio.Lock()

    async def state(self) -> dict[str, Any]:
        """The body of `GET /sere`, read from every rank now."""
        return self.render(await read_states(self.engine))

    async def change(self, change: PolicyChange, source: Source) -> dict[str, Any]:
        """Switch, one change at a time.

        Raises:
            SereError: see `switch.switch`; also ConflictError where a directory is the source.
        """
        if self.source == "file" and source != "file":
            raise ConflictError("a directory is the source of the policy (SERE_POLICY_DIR); change it there")
        if self.engines > 1:  # collective_rpc reaches the first engine only (vllm/v1/engine/core_client.py)
            raise UnsupportedError(
                f"this server has {self.engines} data-parallel engines and a change would reach only one; "
                "run one engine per server, or set the policy at start with --additional-config"
            )
        async with self._changing:
            states = await switch(
                self.engine, change.policy, generation=change.generation, similarity=change.similarity, clean=change.clean
            )
        self.source, self.ready = source, True
        logger.info("sere: policy %s in force by %s: %s", change.policy.digest, source, change.policy.describe())
        return self.render(states)

    def render(self, states: States) -> dict[str, Any]:
        """The state of all ranks as one object; ranks that disagree are an error, never hidden."""
        first = states[0]
        self.policy = Policy.parse(first["policy"])
        agree = len({(state["policyDigest"], state["similarityDigest"]) for state in states}) == 1
        return {
            "ready": self.ready and agree,
            "source": self.source,
            "policy": first["policy"],
            "policyDigest": first["policyDigest"],
            "similarityDigest": first["similarityDigest"],
            "generation": first["generation"],
            "switches": first["switches"],
            "override": self.override,
            "error": self.error or first["error"] or (None if agree else "ranks disagree about the policy"),
            "key": first["key"],
            "model": first["model"],
            "ranks": [{name: s[name] for name in ("rank", "policyDigest", "similarityDigest", "generation")} for s in states],
            "counters": first["counters"],
        }

    def refuse(self, authorization: str | None) -> tuple[int, str] | None:
        """Why a change may not be asked for: status and sentence, or None if it may."""
        if not self.token:
            return 403, "live control is read-only: start the engine with SERE_CONTROL_TOKEN set"
        given = (authorization or "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self.token.encode()):
            return 401, "send the token of SERE_CONTROL_TOKEN as `Authorization: Bearer <token>`"
        return None


def status_of(error: SereError) -> int:
    """HTTP status of a refusal."""
    if isinstance(error, ConflictError):
        return 409
    return 422 if isinstance(error, PolicyError | SimilarityError) else 503 if isinstance(error, UnsupportedError) else 500


def parse_change(body: bytes) -> PolicyChange:
    """Read the body of a PUT. Raises PolicyError with one sentence per problem."""
    try:
        decoded = json.loads(body)
    except ValueError as error:
        raise PolicyError(f"the body is no JSON: {error}") from error
    if not isinstance(decoded, dict) or "policy" not in decoded:
        raise PolicyError('the body should be {"policy": {...}}')
    policy = Policy.parse(decoded["policy"]) if isinstance(decoded["policy"], dict) else None
    if policy is None:
        raise PolicyError('policy should be an object like {"buckets": [...]}')
    try:
        return PolicyChange.model_validate({**decoded, "policy": policy})
    except ValidationError as error:
        raise PolicyError(explain(error)) from error


class SereControl:
    """vLLM's `EndpointPlugin` interface."""

    name = "sere_control"
    required_tasks = None

    def attach_router(self, app: Any) -> None:
        """Add the routes; answers 503 until the engine is up."""
        from fastapi import Request
        from fastapi.responses import JSONResponse

        def failed(status: int, kind: str, message: str) -> JSONResponse:
            return JSONResponse({"error": {"type": kind, "message": message}}, status)

        def live(request: Any) -> LiveControl | None:
            return getattr(request.app.state, "sere", None)

        async def get_state(request: Any) -> JSONResponse:
            control = live(request)
            if control is None:
                return failed(503, "UnsupportedError", "there is no engine behind this server")
            try:
                return JSONResponse(await control.state())
            except SereError as error:
                return failed(status_of(error), type(error).__name__, str(error))

        async def get_ready(request: Any) -> JSONResponse:
            """200 once the first policy is applied, for readiness probes; asks no worker."""
            control = live(request)
            ready = control is not None and control.ready
            return JSONResponse({"ready": ready}, 200 if ready else 503)

        async def put_policy(request: Any) -> JSONResponse:
            control = live(request)
            if control is None:
                return failed(503, "UnsupportedError", "there is no engine behind this server")
            refusal = control.refuse(request.headers.get("authorization"))
            if refusal:
                return failed(refusal[0], "Unauthorized", refusal[1])
            try:
                return JSONResponse(await control.change(parse_change(await request.body()), "http"))
            except SereError as error:
                return failed(status_of(error), type(error).__name__, str(error))

        for handler in (get_state, get_ready, put_policy):  # annotations are strings here, FastAPI needs the class
            handler.__annotations__["request"] = Request
        app.add_api_route("/sere", get_state, methods=["GET"], response_model=None)
        app.add_api_route("/sere/ready", get_ready, methods=["GET"], response_model=None)
        app.add_api_route("/sere/policy", put_policy, methods=["PUT"], response_model=None)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Start what runs beside the routes: the file watcher and the metrics, in the first API server only."""
        if engine_client is None:
            return
        directory = os.environ.get("SERE_POLICY_DIR")
        parallel = engine_client.vllm_config.parallel_config
        source: Source = "file" if directory else "static"
        control = LiveControl(engine_client, os.environ.get("SERE_CONTROL_TOKEN"), source, parallel.data_parallel_size)
        state.sere = control
        first = getattr(parallel, "_api_process_rank", 0) in (0, -1)
        state.sere_tasks = []
        if first:
            from sere_ext.metrics import Metrics

            state.sere_tasks.append(asyncio.create_task(Metrics(control).run()))
        if first and directory:
            from sere_ext.watch import Watcher

            state.sere_tasks.append(asyncio.create_task(Watcher(control, directory).run()))


def endpoint_plugin() -> SereControl:
    """Factory that the entry point `vllm.endpoint_plugins` names."""
    return SereControl()
