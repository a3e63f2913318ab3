"""Exact against exact in vLLM: the noise floor, and how long a decode step takes: ``python -m tests.assets.make.noise``.

The same items are answered greedily under three loads whose batches differ (order and concurrency), with routing untouched.
What differs between them is rounding alone; a loss claimed for SERE means something only above it. Needs vLLM; prints one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from pathlib import Path
from typing import Any

from tests.assets.make import models
from tests.assets.make.tasks import Item

CONCURRENCY = 16
DECODE_STEPS = 64


def ask(engine: Any, asked: list[Item], order: list[int], width: int | None, longest: int) -> tuple[list[str], float]:
    """Answers in item order, and the seconds it took.

    Args:
        width: requests that are sent at a time; None sends all and leaves it to the engine.
        longest: tokens after which an answer is cut off.
    """
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=longest)
    texts = [""] * len(asked)
    width = width or len(order)
    started = time.monotonic()
    for begin in range(0, len(order), width):
        part = order[begin : begin + width]
        outputs = engine.generate([asked[index].prompt for index in part], greedy, use_tqdm=False)
        for index, output in zip(part, outputs, strict=True):
            texts[index] = output.outputs[0].text
    return texts, time.monotonic() - started


def decode_ms(engine: Any, asked: list[Item]) -> float:
    """Milliseconds of a decode step at ``CONCURRENCY``: the best of five runs that ignore EOS, less a run of one token."""
    from vllm import SamplingParams

    def seconds(tokens: int) -> float:
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        taken = []
        for _ in range(5):
            started = time.monotonic()
            engine.generate([item.prompt for item in asked[:CONCURRENCY]], sampling, use_tqdm=False)
            taken.append(time.monotonic() - started)
        return min(taken)

    return 1000 * (seconds(1 + DECODE_STEPS) - seconds(1)) / DECODE_STEPS


def measure(directory: Path, count: int, seed: int) -> dict[str, object]:
    """Load the model in vLLM and compare."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # vLLM logs to standard output, where the result goes
    from vllm import LLM

    engine = LLM(
        model=str(directory),
        dtype=json.loads((directory / "config.json").read_text())["dtype"],
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=CONCURRENCY,
        enable_prefix_caching=False,
    )
    recipe = models.of(directory)
    asked = recipe.tasks.items("eval", count, seed)
    forward = list(range(count))
    shuffled = random.Random(0).sample(forward, count)
    first, seconds = ask(engine, asked, forward, None, recipe.longest_answer)
    second, _ = ask(engine, asked, shuffled, None, recipe.longest_answer)
    narrow, _ = ask(engine, asked, shuffled, 4, recipe.longest_answer)

    def differing(a: list[str], b: list[str]) -> int:
        return sum(x != y for x, y in zip(a, b, strict=True))

    return {
        "items": count,
        "accuracy": round(100 * sum(text == item.answer for text, item in zip(first, asked, strict=True)) / count, 3),
        "differing_shuffled": differing(first, second),
        "differing_batch_4": differing(first, narrow),
        "requests_per_second": round(count / seconds, 1),
        "decode_step_ms": round(decode_ms(engine, asked), 3),
        "answers": first,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=models.ROWS_MOE.directory)
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="also write the answers, one JSON string per line")
    given = parser.parse_args()
    result = measure(given.model, given.items, given.seed)
    texts = result.pop("answers")
    if given.out:
        given.out.write_text("".join(json.dumps(text) + "\n" for text in texts))  # type: ignore[attr-defined]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
