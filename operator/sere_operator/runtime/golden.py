"""One engine pod answers a profile's golden prompts, while as many requests are in flight as the policy's buckets begin at."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from sere_ext.contract import answers
from sere_ext.contract.profile import GoldenPrompt

JUDGE_TIMEOUT_S = 10.0  # for all regular expressions of a run together; one that backtracks for ever must not stop the operator


async def ask_all(
    ask: Callable[[GoldenPrompt], Awaitable[str | None]], prompts: tuple[GoldenPrompt, ...], in_flight: int
) -> tuple[bool | None, ...]:
    """Right or wrong for each prompt in order, None where no answer came or none could be judged.

    Until the last prompt is answered `in_flight` requests decode beside each other: where no prompt waits, prompts are asked
    again and those answers dropped. With fewer requests the engine would route exactly, and the answers would show nothing.

    Args:
        ask: gives the text of an answer, None where there was none; never raises.
    """
    texts: list[str | None] = [None] * len(prompts)
    waiting, answered = deque(range(len(prompts))), asyncio.Event()
    left = len(prompts)

    async def worker(number: int) -> None:
        nonlocal left
        for turn in itertools.count(number):
            if waiting:
                index = waiting.popleft()
                texts[index] = await ask(prompts[index])
                left -= 1
                if not left:
                    answered.set()
            elif await ask(prompts[turn % len(prompts)]) is None:
                return

    workers = [asyncio.create_task(worker(number)) for number in range(max(1, in_flight))]
    try:
        if prompts:
            await answered.wait()
    finally:
        for task in workers:
            task.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    return await judged(prompts, texts)


def request_of(model: str, prompt: GoldenPrompt) -> tuple[str, dict[str, Any]]:
    """(path, body) that asks a golden prompt as the tuner asked it: a conversation by the chat template, else plain text."""
    shared: dict[str, Any] = {"model": model, "max_tokens": prompt.max_tokens, "temperature": 0}
    if prompt.stop:
        shared["stop"] = list(prompt.stop)
    if prompt.messages:
        return "/v1/chat/completions", {**shared, "messages": [message.to_json_dict() for message in prompt.messages]}
    return "/v1/completions", {**shared, "prompt": prompt.prompt}


def text_of(body: dict[str, Any]) -> str:
    """The text of a completion or of a chat completion. Raises KeyError or IndexError where it is neither."""
    choice = body["choices"][0]
    return str(choice["message"]["content"] or "") if "message" in choice else str(choice["text"])


async def judged(prompts: tuple[GoldenPrompt, ...], texts: list[str | None]) -> tuple[bool | None, ...]:
    """Right or wrong for each text, None for None; regular expressions are tried in a process with a limit of time."""
    found = [
        None if text is None or prompt.metric == "regex" else prompt.right(text)
        for prompt, text in zip(prompts, texts, strict=True)
    ]
    slow = {
        index: (prompt.metric, prompt.pattern, text, prompt.answer, prompt.stop)
        for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
        if text is not None and prompt.metric == "regex"
    }
    if slow:
        for index, right in zip(slow, await _apart(list(slow.values())), strict=False):
            found[index] = right
    return tuple(found)


async def _apart(rows: list[Any]) -> list[bool]:
    """`answers.right` of each row, judged by another process; nothing where that takes too long."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", answers.__name__, stdin=pipe, stdout=pipe)
    try:
        said, _ = await asyncio.wait_for(process.communicate(json.dumps(rows).encode()), JUDGE_TIMEOUT_S)
        return list(json.loads(said))
    except (TimeoutError, ValueError):
        return []
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
