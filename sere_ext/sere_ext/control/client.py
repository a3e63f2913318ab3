"""A small client of live control, for `sere status` and `sere apply`. Standard library only."""

from __future__ import annotations

import http.client
import json
import os
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

from sere_ext.contract.errors import (
    ConflictError,
    PolicyError,
    ReadOnlyError,
    SereError,
    UnauthorizedError,
    UnsupportedError,
    UsageError,
)
from sere_ext.contract.policy import Policy

_TIMEOUT_SECONDS = 300.0  # a clean switch waits for running requests


def get_state(url: str) -> dict[str, Any]:
    """`GET /sere`. Raises SereError with the server's sentence, or with why it cannot be reached."""
    return _call(urllib.request.Request(f"{_base(url)}/sere"))


def put_policy(
    url: str, policy: Policy, *, similarity: str | None = None, clean: bool = False, token: str | None = None
) -> dict[str, Any]:
    """`PUT /sere/policy`; the token defaults to SERE_CONTROL_TOKEN."""
    body: dict[str, Any] = {"policy": policy.to_json_dict(), "clean": clean}
    if similarity is not None:
        body["similarity"] = similarity
    token = token if token is not None else os.environ.get("SERE_CONTROL_TOKEN", "")
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    return _call(urllib.request.Request(f"{_base(url)}/sere/policy", json.dumps(body).encode(), headers, method="PUT"))


def _base(url: str) -> str:
    """The engine's address without a slash at its end; `127.0.0.1:8000` means http. Raises UsageError for no address."""
    whole = (url if "://" in url else f"http://{url}").rstrip("/")
    try:
        parts = urllib.parse.urlsplit(whole)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not set(whole) & set(" \t\r\n")
    except ValueError:  # a port that is none
        good = False
    if not good:
        raise UsageError(f"{url!r} is no address of an engine; give one like http://127.0.0.1:8000")
    return whole


def _call(request: urllib.request.Request) -> dict[str, Any]:
    address = f"{request.type}://{request.host}"
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:
            content = answer.read()
    except urllib.error.HTTPError as error:
        text = error.read().decode("utf-8", "replace")
        if error.code == 404:
            raise UnsupportedError("that server has no live control; start it with `sere serve`") from error
        try:
            message = json.loads(text)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = text[:200]
        kinds = {401: UnauthorizedError, 403: ReadOnlyError, 409: ConflictError, 422: PolicyError, 503: UnsupportedError}
        kind = kinds.get(error.code, SereError)
        raise kind(message) from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        why = " ".join((getattr(reason, "strerror", None) or str(reason) or type(reason).__name__).split())
        raise SereError(f"no engine answers at {address} ({why}); check that it runs, and its host and port") from error
    try:
        decoded: dict[str, Any] = json.loads(content)
        return decoded
    except ValueError as error:
        raise UnsupportedError(f"what answers at {address} is no engine with live control; start it with `sere serve`") from error


def render_state(state: dict[str, Any]) -> str:
    """The state as a few lines for people."""
    policy = Policy.parse(state["policy"])
    lines = [
        f"policy      {state['policyDigest']}: {policy.describe()}",
        f"source      {state['source']}, generation {state['generation']}{', overridden' if state['override'] else ''}",
        f"ready       {'yes' if state['ready'] else 'no'} on {len(state['ranks'])} rank(s)",
    ]
    for name, row in sorted(state["counters"].items()):
        digest, *layers, bucket = name.split("|")
        if row["calls"] and digest == state["policyDigest"]:
            before, after = row["activeBefore"] / row["calls"], row["activeAfter"] / row["calls"]
            where = f"layers {layers[0]}, bucket {bucket}" if layers else f"bucket {bucket}"
            lines.append(f"experts     {before:.1f} -> {after:.1f} of {state['model']['numExperts']} active, {where}")
    if state["error"]:
        lines.append(f"error       {state['error']}")
    return "\n".join(lines)
