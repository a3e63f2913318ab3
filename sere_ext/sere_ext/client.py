"""A small client of live control, for `sere status` and `sere apply`. Standard library only."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from typing import Any

from sere_ext.errors import ConflictError, PolicyError, ReadOnlyError, SereError, UnauthorizedError, UnsupportedError
from sere_ext.policy import Policy

_TIMEOUT_SECONDS = 300.0  # a clean switch waits for running requests


def get_state(url: str) -> dict[str, Any]:
    """`GET /sere`. Raises SereError with the server's sentence, or with why it cannot be reached."""
    return _call(urllib.request.Request(f"{url.rstrip('/')}/sere"))


def put_policy(
    url: str, policy: Policy, *, similarity: str | None = None, clean: bool = False, token: str | None = None
) -> dict[str, Any]:
    """`PUT /sere/policy`; the token defaults to SERE_CONTROL_TOKEN."""
    body: dict[str, Any] = {"policy": policy.to_json_dict(), "clean": clean}
    if similarity is not None:
        body["similarity"] = similarity
    token = token if token is not None else os.environ.get("SERE_CONTROL_TOKEN", "")
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    address = f"{url.rstrip('/')}/sere/policy"
    return _call(urllib.request.Request(address, json.dumps(body).encode(), headers, method="PUT"))


def _call(request: urllib.request.Request) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:
            decoded: dict[str, Any] = json.load(answer)
            return decoded
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
    except (OSError, ValueError) as error:
        raise SereError(f"no engine answers at {request.full_url}: {getattr(error, 'reason', error)}") from error


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
