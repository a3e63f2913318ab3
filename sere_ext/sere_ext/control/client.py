"""A small client of live control, for `sere status` and `sere apply`. Standard library only."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request

from sere_ext.contract.errors import SereError, UnsupportedError, UsageError, error_of
from sere_ext.contract.policy import Policy
from sere_ext.contract.state import EngineState, PolicyChange

_TIMEOUT_SECONDS = 300.0  # a clean switch waits for running requests


def get_state(url: str) -> EngineState:
    """Read an engine's state. Raises SereError with the server's sentence, or with why the server cannot be reached."""
    return _call(urllib.request.Request(f"{_base(url)}/sere"))


def put_policy(
    url: str, policy: Policy, *, similarity: str | None = None, clean: bool = False, token: str | None = None
) -> EngineState:
    """Change an engine's policy. Without `token` the environment variable SERE_CONTROL_TOKEN is sent."""
    body = PolicyChange(policy=policy, similarity=similarity, clean=clean).to_json().encode()
    token = token if token is not None else os.environ.get("SERE_CONTROL_TOKEN", "")
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    return _call(urllib.request.Request(f"{_base(url)}/sere/policy", body, headers, method="PUT"))


def _base(url: str) -> str:
    """The engine's address without a slash at its end; `127.0.0.1:8000` means http. Raises UsageError for no address."""
    whole = (url if "://" in url else f"http://{url}").rstrip("/")
    try:
        parts = urllib.parse.urlsplit(whole)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not set(whole) & set(" \t\r\n")
    except ValueError:  # the port is no number
        good = False
    if not good:
        raise UsageError(f"{url!r} is no address of an engine; give one like http://127.0.0.1:8000")
    return whole


def _call(request: urllib.request.Request) -> EngineState:
    address = f"{request.type}://{request.host}"
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:
            content = answer.read()
    except urllib.error.HTTPError as error:
        text = error.read().decode("utf-8", "replace")
        if error.code == 404:
            raise UnsupportedError("that server has no live control; start it with `sere serve`") from error
        try:
            said = json.loads(text)["error"]
            name, message = str(said["type"]), str(said["message"])
        except (ValueError, KeyError, TypeError):
            name, message = "", text[:200]
        raise error_of(error.code, name, message) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        why = " ".join((getattr(reason, "strerror", None) or str(reason) or type(reason).__name__).split())
        raise SereError(f"no engine answers at {address} ({why}); check that it runs, and its host and port") from error
    try:
        return EngineState.parse(content)
    except UnsupportedError as error:
        raise UnsupportedError(f"what answers at {address} is no engine with live control; start it with `sere serve`") from error


def render_state(state: EngineState) -> str:
    """The state as a few lines for people."""
    lines = [
        f"policy      {state.policy_digest}: {state.policy.describe()}",
        f"source      {state.source}, generation {state.generation}{', overridden' if state.override else ''}",
        f"ready       {'yes' if state.ready else 'no'} on {len(state.ranks)} rank(s)",
    ]
    for row in sorted(state.counters, key=lambda row: (row.layers or "", row.bucket)):
        if row.calls and row.digest == state.policy_digest:
            before, after = row.active_before / row.calls, row.active_after / row.calls
            where = f"layers {row.layers}, bucket {row.bucket}" if row.layers else f"bucket {row.bucket}"
            lines.append(f"experts     {before:.1f} -> {after:.1f} of {state.model.num_experts} active, {where}")
    if state.error:
        lines.append(f"error       {state.error}")
    return "\n".join(lines)
