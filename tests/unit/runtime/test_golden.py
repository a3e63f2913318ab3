"""A golden run asks enough at a time to meet the policy, judges by the prompts' own metric, and never hangs."""

from __future__ import annotations

import asyncio

import pytest

from sere_ext.contract.policy import Policy
from sere_ext.contract.profile import GoldenPrompt
from sere_operator.plan.rollout.evidence import golden_in_flight
from sere_operator.runtime import golden

POLICY = Policy.parse(
    {"buckets": [{"minTokens": 4, "maxTokens": 39, "kind": "topk", "S": 3}, {"minTokens": 40, "kind": "topk", "S": 2}]}
)


class Engine:
    """Decodes each request for `steps` steps of all requests together and remembers how many each step had."""

    def __init__(self, steps: int = 5) -> None:
        self.steps, self.running, self.batches = steps, 0, {}

    async def __call__(self, prompt: GoldenPrompt) -> str | None:
        self.running += 1
        await asyncio.sleep(0.02)  # the others arrive
        for _ in range(self.steps):
            self.batches.setdefault(prompt.prompt, []).append(self.running)
            await asyncio.sleep(0.002)
        self.running -= 1
        return f"It is {prompt.prompt}."


async def ask(engine: Engine, *prompts: GoldenPrompt, in_flight: int = 8) -> tuple[bool | None, ...]:
    return await golden.ask_all(engine, prompts, in_flight)


async def test_every_golden_prompt_is_decoded_inside_the_policys_bucket() -> None:
    """24 prompts against a bucket from 40 tokens on: one at a time, or all 24, would be routed exactly."""
    engine = Engine()
    prompts = tuple(GoldenPrompt(prompt=f"p{i}", answer=f"p{i}", metric="contains") for i in range(24))
    assert await ask(engine, *prompts, in_flight=golden_in_flight(POLICY)) == (True,) * 24
    assert set(engine.batches) == {prompt.prompt for prompt in prompts}
    assert min(seen[0] for seen in engine.batches.values()) >= 40


async def test_prompts_are_judged_by_their_own_metric_and_ended_by_their_own_stops() -> None:
    engine = Engine(steps=1)
    judged = await ask(
        engine,
        GoldenPrompt(prompt="a", answer="a", metric="contains", stop=("\n",)),
        GoldenPrompt(prompt="b", answer="b", metric="regex", pattern=r"is (\w)"),
        GoldenPrompt(prompt="c", answer="x", metric="regex", pattern=r"is (\w)"),
        GoldenPrompt(prompt="d", answer="d"),
    )
    assert judged == (True, True, False, False)


async def test_an_expression_that_backtracks_for_ever_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden, "JUDGE_TIMEOUT_S", 2.0)
    prompt = GoldenPrompt(prompt="a" * 60, answer="a", metric="regex", pattern=r"(?:a+)+$")
    async with asyncio.timeout(30):
        assert await ask(Engine(steps=1), prompt, GoldenPrompt(prompt="b", answer="b", metric="contains")) == (None, True)


async def test_a_pod_that_does_not_answer_gives_none() -> None:
    async def nothing(_: GoldenPrompt) -> None:
        return None

    assert await golden.ask_all(nothing, (GoldenPrompt(prompt="a", answer="a"),), 8) == (None,)
