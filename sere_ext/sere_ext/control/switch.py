"""Changing the policy of a running engine, in the right order. Used by the HTTP routes and by in-process callers.

A plain switch happens between two steps: requests in flight go on under the new policy, on KV computed under the old
one. A clean switch is for measuring: it lets running requests finish, drops the prefix cache, switches, and goes on;
requests that arrive meanwhile wait and none fails. Every rank is asked first whether it would refuse; only then all
ranks of an engine switch, between the same two steps. Data-parallel engines step on their own, so they are held
(requests are kept, none fails) until each of their ranks has read the new policy back.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from sere_ext.contract import errors
from sere_ext.contract.errors import ConflictError, SereError, UnsupportedError
from sere_ext.contract.policy import EXACT_POLICY, Policy

States = list[dict[str, Any]]
READ_BACK = ("policyDigest", "similarityDigest", "generation")  # what no two ranks may differ in
_ASK_ALL = "call_utility_all_async"  # of vLLM's engine client; absent in 0.26


async def switch(
    engine: Any,
    policy: Policy,
    *,
    generation: int | None = None,
    similarity: str | None = None,
    clean: bool = False,
    note: dict[str, Any] | None = None,
) -> States:
    """Switch an `AsyncLLM` (or any `EngineClient`).

    Args:
        engine: has `collective_rpc`, and `pause_generation` and `resume_generation` if `clean` or data-parallel.
        generation: see `WorkerState.check`; None takes the next.
        similarity: path that every worker can read; None keeps the matrices in force.
        clean: drain and drop the prefix cache first.
        note: see `SereWorker.sere_apply`.

    Returns:
        `SereWorker.sere_state` of every rank, all of the same policy, each with `engine` and `replaced`.

    Raises:
        SereError: refused; the old policy stays in force on every rank.
    """
    if why := unreachable(engine):
        raise UnsupportedError(why)
    text = json.dumps(policy.to_json_dict())
    _checked(await ask_ranks(engine, "sere_try_check", (text, generation, similarity)))
    async with _held(engine, clean):
        return await _apply_everywhere(engine, (text, generation, similarity, note))


def switch_llm(llm: Any, policy: Policy, *, generation: int | None = None, similarity: str | None = None) -> States:
    """Switch an `LLM` between two `generate` calls, cleanly: nothing runs then, so only the prefix cache is dropped."""
    llm.reset_prefix_cache()
    states: States = llm.collective_rpc("sere_try_apply", args=(json.dumps(policy.to_json_dict()), generation, similarity))
    return _checked(states)


async def read_states(engine: Any) -> States:
    """`SereWorker.sere_state` of every rank that this server reaches, each with `engine`, the number of its engine.

    Raises:
        UnsupportedError: the engine was started without the plug-in, or without settings.
    """
    return await ask_ranks(engine, "sere_state")


def agree(states: States) -> bool:
    """Whether all ranks of all engines have the same policy, similarity and generation in force."""
    return len({tuple(state[name] for name in READ_BACK) for state in states}) == 1


def total_counters(states: States) -> dict[str, dict[str, int]]:
    """Counters of all engines: of one rank each, since the ranks of an engine route the same tokens, summed over engines."""
    total: dict[str, dict[str, int]] = {}
    seen = set()
    for state in states:
        if state["engine"] in seen:
            continue
        seen.add(state["engine"])
        for name, row in state["counters"].items():
            sums = total.setdefault(name, dict.fromkeys(row, 0))
            for field, value in row.items():
                sums[field] += value
    return total


def engines_of(engine: Any) -> int:
    """How many data-parallel engines stand behind a client."""
    config = getattr(engine, "vllm_config", None)
    return int(config.parallel_config.data_parallel_size) if config is not None else 1


def unreachable(engine: Any) -> str | None:
    """Why a live change could not hold all data-parallel engines at once and read it back from all; None if it can."""
    engines = engines_of(engine)
    if engines == 1:
        return None
    parallel = engine.vllm_config.parallel_config
    named = "external" if parallel.data_parallel_external_lb else "hybrid" if parallel.data_parallel_hybrid_lb else None
    instead = "or set the policy at start with --additional-config"
    if named:
        return (
            f"live control reaches only some of the {engines} data-parallel engines: load is balanced outside this server "
            f"({named} mode); let one server balance all engines, {instead}"
        )
    if getattr(parallel, "_api_process_count", 1) > 1:  # two servers could pause and resume the same engines at once
        return (
            f"live control of {engines} data-parallel engines needs a single API server, there are "
            f"{parallel._api_process_count}; start with --api-server-count 1, {instead}"
        )
    if not hasattr(engine.engine_core, _ASK_ALL):
        return f"this vLLM answers for the first of {engines} data-parallel engines only; use vLLM 0.32 or newer, {instead}"
    return None


async def ask_ranks(engine: Any, method: str, args: tuple[Any, ...] = ()) -> States:
    """Call a worker method on every rank of every engine; each answer that is a dict gets the number of its `engine`.

    Raises:
        UnsupportedError: the engine does not answer, or knows no such method.
    """
    try:
        if engines_of(engine) > 1 and hasattr(engine.engine_core, _ASK_ALL):
            # collective_rpc runs on all engines too, but hands back the answers of the first alone
            answers = await getattr(engine.engine_core, _ASK_ALL)("collective_rpc", method, None, args, None)
        else:
            answers = [await engine.collective_rpc(method, args=args)]
    except Exception as error:
        raise UnsupportedError(_reason(error)) from error
    return [{**(state or {}), "engine": number} for number, states in enumerate(answers) for state in states]


@asynccontextmanager
async def _held(engine: Any, clean: bool) -> AsyncIterator[None]:
    """Hold traffic for the length of a change: drained if `clean`, kept between steps across engines, else not at all."""
    if not clean and engines_of(engine) == 1:
        yield
        return
    try:
        await engine.pause_generation(mode="wait" if clean else "keep", clear_cache=clean)
        yield
    finally:
        await engine.resume_generation()


async def _apply_everywhere(engine: Any, args: tuple[Any, ...]) -> States:
    states = await ask_ranks(engine, "sere_try_apply", args)
    refused = [state for state in states if "refused" in state]
    digests = {state["policyDigest"] for state in states if "refused" not in state}
    if len(digests) > 1 or (refused and digests):
        # A rank changed its mind between the question and the change: routing must agree, so nothing is left half changed.
        exact = json.dumps(EXACT_POLICY.to_json_dict())
        after = max(state.get("generation", 0) for state in states) + 1
        await ask_ranks(engine, "sere_try_apply", (exact, after, None, None))
        message = refused[0]["refused"]["message"] if refused else f"they answered {', '.join(sorted(digests))}"
        raise ConflictError(
            f"{len(refused)} of {len(states)} ranks refused what all had agreed to, so all route exactly now: {message}"
        )
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
