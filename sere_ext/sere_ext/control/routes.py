"""Live control over HTTP, on the engine's own port: `GET /sere`, `GET /sere/ready` and `PUT /sere/policy`.

An endpoint plug-in of vLLM, loaded only where VLLM_PLUGINS names `sere_control`. Here the routes, the metrics and the watcher of
the policy volume are put together around one `LiveControl`.
"""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

from pydantic import ValidationError

from sere_ext.contract.errors import PolicyError, SereError, UnsupportedError, status_of
from sere_ext.contract.policy import Policy
from sere_ext.contract.state import PolicyChange
from sere_ext.contract.validation import explain
from sere_ext.control import audit
from sere_ext.control.live import LiveControl
from sere_ext.control.metrics import Metrics
from sere_ext.control.watch import Watcher

MAX_BODY_BYTES = 1 << 20  # a policy of 16 buckets in 8 layer groups is below 20 kB
_EXAMPLE = '{"policy": {"buckets": [{"minTokens": 8, "kind": "topk", "S": 2}]}}'


def parse_change(body: bytes) -> PolicyChange:
    """Read the body of `PUT /sere/policy`. Raises PolicyError with one sentence per problem."""
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
        """Add the routes to vLLM's FastAPI application; they answer 503 until the engine is up."""
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
                return JSONResponse((await live(request).state()).to_json_dict())
            except SereError as error:
                return failed(error)

        async def get_ready(request: Any) -> JSONResponse:
            """200 once the first policy is applied, for readiness probes; asks workers only until then."""
            try:
                control = live(request)
                ready = control.ready or (await control.state()).ready
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
                return JSONResponse((await control.change(change, "http", who)).to_json_dict())
            except SereError as error:
                return failed(error)

        for handler in (get_state, get_ready, put_policy):  # annotations are strings here, FastAPI needs the class
            handler.__annotations__["request"] = Request
        app.add_api_route("/sere", get_state, methods=["GET"], response_model=None)
        app.add_api_route("/sere/ready", get_ready, methods=["GET"], response_model=None)
        app.add_api_route("/sere/policy", put_policy, methods=["PUT"], response_model=None)

    async def init_state(self, engine_client: Any, state: Any, args: Any) -> None:
        """Start what runs beside the routes: the metrics, and the watcher where there is a policy volume.

        Raises:
            UnsupportedError: there are several API servers. Each would see a part of the requests, and vLLM tells only one of
                them a step how many requests run, so latencies would stand at wrong batch sizes.
        """
        if engine_client is None:
            return
        if (servers := engine_client.vllm_config.parallel_config._api_process_count) > 1:
            raise UnsupportedError(
                f"live control needs a single API server, there are {servers}: latencies of requests to the others would be "
                "counted wrongly or not at all; start with --api-server-count 1"
            )
        directory = os.environ.get("SERE_POLICY_DIR") or None
        control = LiveControl(engine_client, os.environ.get("SERE_CONTROL_TOKEN"), directory)
        state.sere = control
        state.sere_tasks = [asyncio.create_task(Metrics(control).run())]
        if directory:
            state.sere_tasks.append(asyncio.create_task(Watcher(control, directory).run()))


def endpoint_plugin() -> SereControl:
    """Factory that the entry point `vllm.endpoint_plugins` names."""
    return SereControl()
