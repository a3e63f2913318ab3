"""Changing the policy of a running engine, in the right order. Used by the HTTP routes and by in-process callers.

A plain switch happens between two steps: requests in flight go on under the new policy, on KV computed under the old
one. A clean switch is for measuring: it lets running requests finish, drops the prefix cache, switches, and goes on;
requests that arrive meanwhile wait and none fails. All ranks of an engine switch between the same two steps.
"""

from __future__ import annotations

import json
from typing import Any

from sere_ext import errors
from sere_ext.errors import ConflictError, SereError, UnsupportedError
from sere_ext.policy import EXACT_POLICY, Policy

States = list[dict[str, Any]]


async def switch(
    engine: Any, policy: Policy, *, generation: int | None = None, similarity: str | None = None, clean: bool = False
) -> States:
    """Switch an `AsyncLLM` (or any `EngineClient`).

    Args:
        engine: has `collective_rpc`, and `pause_generation` and `resume_generation` if `clean`.
        generation: see `WorkerState.apply`; None takes the next.
        similarity: path that every worker can read; None keeps the matrices in force.
        clean: drain and drop the prefix cache first.

    Returns:
        `SereWorker.sere_state` of every rank, all of the same policy.

    Raises:
        SereError: refused; the old policy stays in force on every rank.
    """
    args = (json.dumps(policy.to_json_dict()), generation, similarity)
    if not clean:
        return await _apply_everywhere(engine, args)
    await engine.pause_generation(mode="wait", clear_cache=True)
    try:
        return await _apply_everywhere(engine, args)
    finally:
        await engine.resume_generation()


def switch_llm(llm: Any, policy: Policy, *, generation: int | None = None, similarity: str | None = None) -> States:
    """Switch an `LLM` between two `generate` calls, cleanly: nothing runs then, so only the prefix cache is dropped."""
    llm.reset_prefix_cache()
    states: States = llm.collective_rpc("sere_try_apply", args=(json.dumps(policy.to_json_dict()), generation, similarity))
    return _checked(states)


async def read_states(engine: Any) -> States:
    """`SereWorker.sere_state` of every rank.

    Raises:
        UnsupportedError: the engine was started without the plug-in, or without settings.
    """
    try:
        states: States = await engine.collective_rpc("sere_state")
    except Exception as error:
        raise UnsupportedError(_reason(error)) from error
    return states


async def _apply_everywhere(engine: Any, args: tuple[str, int | None, str | None]) -> States:
    try:
        states: States = await engine.collective_rpc("sere_try_apply", args=args)
    except Exception as error:
        raise UnsupportedError(_reason(error)) from error
    refused = [state for state in states if "refused" in state]
    if refused and len(refused) < len(states):
        # One rank sees another file or memory state than the next: routing must agree, so nothing is left half changed.
        exact = json.dumps(EXACT_POLICY.to_json_dict())
        after = max(state.get("generation", 0) for state in states) + 1
        await engine.collective_rpc("sere_try_apply", args=(exact, after, None))
        message = refused[0]["refused"]["message"]
        raise ConflictError(f"{len(refused)} of {len(states)} ranks refused the policy, so all route exactly now: {message}")
    return _checked(states)


def _checked(states: States) -> States:
    for state in states:
        if "refused" in state:
            kind = getattr(errors, state["refused"]["type"], SereError)
            raise kind(state["refused"]["message"])
    return states


def _reason(error: Exception) -> str:
    text = str(error)
    if "sere_" in text and "attribute" in text:
        return "the workers do not know sere; name both sere and sere_control in VLLM_PLUGINS (`sere serve` does)"
    start = text.find("this engine was started without sere")
    return text[start:].partition("', please")[0] if start >= 0 else f"the engine did not answer: {text}"
