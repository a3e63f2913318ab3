"""Changing the policy of a running engine, in the right order. Used by the HTTP routes and by in-process callers.

A plain switch happens between two steps: requests in flight go on under the new policy, on KV computed under the old
one. A clean switch is for measuring: it lets running requests finish, drops the prefix cache, switches, and goes on;
requests that arrive meanwhile wait and none fails. Every rank is asked first whether it would refuse; only then all
ranks of an engine switch, between the same two steps. Data-parallel engines step on their own, so they are held
(requests are kept, none fails) until each of their ranks has read the new policy back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from sere_ext.contract.errors import ConflictError, UnsupportedError
from sere_ext.contract.policy import EXACT_POLICY, Policy
from sere_ext.contract.similarity import read_content
from sere_ext.contract.state import CounterRow, Note, RankState, Readiness, Refusal, total

States = list[RankState]
POLL_SECONDS = 0.05  # between two questions whether all ranks have prepared a similarity file
_ASK_ALL = "call_utility_all_async"  # of vLLM's engine client; absent in 0.26


async def switch(
    engine: Any,
    policy: Policy,
    *,
    generation: int | None = None,
    similarity: str | None = None,
    clean: bool = False,
    note: Note | None = None,
) -> States:
    """Switch an `AsyncLLM` (or any `EngineClient`).

    Args:
        engine: has `collective_rpc`, and `pause_generation` and `resume_generation` if `clean` or data-parallel.
        generation: see `WorkerState.check`; None takes the next.
        similarity: path of a file that this process can read; None keeps the matrices in force. Its bytes go to workers that do
            not have its matrices in force, and the change waits until all have sorted them; the engine goes on meanwhile.
        clean: drain and drop the prefix cache first.
        note: what the source of the change says of it; None keeps what was noted before.

    Returns:
        the state of every rank, all of the same policy, each with its `engine` and the digest that was `replaced`.

    Raises:
        SereError: refused; the old policy stays in force on every rank.
    """
    if why := unreachable(engine):
        raise UnsupportedError(why)
    content, digest = await asyncio.to_thread(_read, similarity)
    change = policy.to_json(), generation, digest
    while (readiness := _least(await ask_ranks(engine, "sere_check", change))) is not Readiness.READY:
        if readiness is Readiness.LACKS_FILE:
            await ask_ranks(engine, "sere_offer", (digest, content, similarity))
        await asyncio.sleep(POLL_SECONDS)
    async with _held(engine, clean):
        return await _apply_everywhere(engine, (*change, note.to_json_dict() if note else None))


def switch_llm(llm: Any, policy: Policy, *, generation: int | None = None, similarity: str | None = None) -> States:
    """Switch an `LLM` between two `generate` calls, when nothing runs: only the prefix cache must be dropped first."""
    content, digest = _read(similarity)
    change = policy.to_json(), generation, digest
    while (readiness := _least(llm.collective_rpc("sere_check", args=change))) is not Readiness.READY:
        if readiness is Readiness.LACKS_FILE:
            llm.collective_rpc("sere_offer", args=(digest, content, similarity))
        time.sleep(POLL_SECONDS)
    llm.reset_prefix_cache()
    return _states(llm.collective_rpc("sere_apply", args=change))


def llm_states(llm: Any) -> States:
    """The state of every rank of an `LLM`."""
    return _states(llm.collective_rpc("sere_state"))


async def read_states(engine: Any) -> States:
    """The state of every rank that this server reaches, each with the number of its `engine`.

    Raises:
        UnsupportedError: the engine was started without the plug-in, or without settings.
    """
    return _states(await ask_ranks(engine, "sere_state"))


def agree(states: States) -> bool:
    """Whether all ranks of all engines have the same policy, similarity and generation in force."""
    return len({state.in_force for state in states}) == 1


def total_counters(states: States) -> tuple[CounterRow, ...]:
    """Counters of all engines: of one rank each, since the ranks of an engine route the same tokens, summed over engines."""
    first = {state.engine: state for state in reversed(states)}
    return total(row for state in first.values() for row in state.counters)


def engines_of(engine: Any) -> int:
    """How many data-parallel engines stand behind a client."""
    config = getattr(engine, "vllm_config", None)
    return int(config.parallel_config.data_parallel_size) if config is not None else 1


def unreachable(engine: Any) -> str | None:
    """Why a live change cannot reach all data-parallel engines at once and be read back from each; None if it can."""
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
    if not hasattr(engine.engine_core, _ASK_ALL):
        return f"this vLLM answers for the first of {engines} data-parallel engines only; use vLLM 0.32 or newer, {instead}"
    return None


async def ask_ranks(engine: Any, method: str, args: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
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
    """Pause traffic for a change: drained first if `clean`; kept waiting where several engines must agree; otherwise not at all."""
    if not clean and engines_of(engine) == 1:
        yield
        return
    try:
        await engine.pause_generation(mode="wait" if clean else "keep", clear_cache=clean)
        yield
    finally:
        await engine.resume_generation()


async def _apply_everywhere(engine: Any, args: tuple[Any, ...]) -> States:
    answers = await ask_ranks(engine, "sere_apply", args)
    refused = [refusal for answer in answers if (refusal := Refusal.read(answer))]
    states = [RankState.model_validate(answer) for answer in answers if not Refusal.read(answer)]
    digests = {state.policy_digest for state in states}
    if len(digests) > 1 or (refused and digests):
        # A rank changed its mind between the question and the change: routing must agree, so nothing is left half changed.
        after = max((state.generation for state in states), default=0) + 1
        await ask_ranks(engine, "sere_apply", (EXACT_POLICY.to_json(), after, None, None))
        message = refused[0].message if refused else f"they answered {', '.join(sorted(digests))}"
        raise ConflictError(
            f"{len(refused)} of {len(answers)} ranks refused what all had agreed to, so all route exactly now: {message}"
        )
    _raise_refusals(answers)
    return states


def _read(similarity: str | None) -> tuple[bytes | None, str | None]:
    """Content and digest of the similarity file at this path, if there is one."""
    if similarity is None:
        return None, None
    content, meta = read_content(similarity)
    return content, meta.digest


def _least(answers: list[dict[str, Any]]) -> Readiness:
    """How far the rank is that is least far; raises the first refusal."""
    _raise_refusals(answers)
    found = {Readiness.read(answer) for answer in answers}
    return next(state for state in (Readiness.LACKS_FILE, Readiness.AT_WORK, Readiness.READY) if state in found)


def _states(answers: list[dict[str, Any]]) -> States:
    _raise_refusals(answers)
    return [RankState.model_validate(answer) for answer in answers]


def _raise_refusals(answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        if refusal := Refusal.read(answer):
            raise refusal.error


def _reason(error: Exception) -> str:
    text = str(error)
    if "sere_" in text and "attribute" in text:
        return "the workers do not know sere; name both sere and sere_control in VLLM_PLUGINS (`sere serve` does)"
    start = text.find("this engine was started without sere")
    return text[start:].partition("', please")[0] if start >= 0 else f"the engine did not answer: {text}"
