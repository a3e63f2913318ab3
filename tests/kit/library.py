"""vLLM used as a library (`LLM`) on the engine tests' models with a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sere_ext.contract.policy import Policy
from tests.kit.inside import in_process

PROMPTS = [f"item {i}: what is {i} plus {i * 7 % 13}?" for i in range(12)]


@contextmanager
def engine(model: Path, **options: Any) -> Iterator[Any]:
    """An engine on the model, eager unless a test says otherwise."""
    options = {"enforce_eager": True, "max_model_len": 128, "max_num_seqs": 16, "dtype": "float32"} | options
    with in_process(model, **options) as llm:
        yield llm


def answers(llm: Any) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """Tokens and their log-probabilities, greedy, from an empty prefix cache."""
    from vllm import SamplingParams

    llm.reset_prefix_cache()
    sampling = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=1)
    found = []
    for output in llm.generate(PROMPTS, sampling, use_tqdm=False):
        tokens = tuple(output.outputs[0].token_ids)
        found.append((tokens, tuple(step[t].logprob for step, t in zip(output.outputs[0].logprobs, tokens, strict=True))))
    return found


def policy(kind: str, **fields: Any) -> Policy:
    """A policy of one bucket for every step size."""
    return Policy.parse({"buckets": [{"minTokens": 1, "kind": kind, **fields}]})
