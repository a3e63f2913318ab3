"""A minute on a warm engine: waves of several sizes under several numbers of kept experts, in rounds, and what follows from them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from sere_autotune.doctor.finding import Finding, cannot_tell, judge, one_expert
from sere_autotune.doctor.fit import CannotTellError, Sample, fit, foretold
from sere_autotune.trial.engine import BlockReport, EngineFacts
from sere_autotune.trial.load import Load, Request
from sere_autotune.trial.wave import Wave
from sere_autotune.tuning.spec import Served, WorkloadSpec, flag_value
from sere_ext.contract.errors import EngineCrashError, PolicyError, UnsupportedError
from sere_ext.contract.model_config import language_config
from sere_ext.contract.policy import EXACT_POLICY, MAX_TOKENS, Bucket, Kind, Policy

SECONDS = 60.0
_TOKENS = 25  # of each answer of a wave: 24 decode steps
_LEAST_ROUNDS, _MOST_ROUNDS = 2, 12
_LARGEST = 128  # requests at once, where the engine's options name no limit
_BLOCK_S = 10.0  # within which the requests of an answers' block are sent
_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_MATRICES = 3  # of an expert: up, gate and down


class WarmEngine(Protocol):
    """What is needed of an engine; `trial.warm.WarmEngine` is the real one."""

    def apply(self, policy: Policy) -> None: ...
    def wave(self, requests: Sequence[Request], tokens: int, bucket: str) -> Wave: ...
    def block(
        self, requests: Sequence[Request], load: Load, fillers: Sequence[Request] = (), deadline_s: float | None = None
    ) -> BlockReport: ...


@dataclass(frozen=True)
class Work:
    """What the engine is asked.

    Attributes:
        requests: whose prompts make the waves, in the order in which they are taken.
        answers_known: whether `requests` end as the workload's do, so that their answers' length is the workload's.
        config: of the model, decoded.
    """

    spec: Served
    workload: WorkloadSpec
    requests: Sequence[Request]
    answers_known: bool
    config: dict[str, object]

    @property
    def largest(self) -> int:
        """The most requests that a step may have."""
        limit = flag_value(self.spec.engine.extra_args, "--max-num-seqs")
        return max(1, min(int(limit) if limit and limit.isdigit() else _LARGEST, len(self.requests)))


def examine(
    engine: WarmEngine, facts: EngineFacts, work: Work, least: float, seconds: float, step: Callable[[str], None]
) -> Finding:
    """Find what could be gained at most. Leaves the engine under the last policy that was tried.

    Args:
        least: the smallest gain worth having, such as 1.02.
        seconds: after which no further round of waves begins; two are made in any case.
        step: is told what happens.

    Raises:
        BudgetExhaustedError: the engine's budget ran out.
    """
    if facts.top_k == 1:
        return one_expert()
    try:
        loads, answer_tokens = _loads(engine, work, step)
        samples = _rounds(engine, facts.top_k, work, loads, seconds, step)
        size = expert_bytes(work.config, str(facts.key.get("weightFormat") or ""))
        bytes_per_expert = size * len(facts.layers) if size and facts.layers else None
        return judge(fit(samples), facts.top_k, loads, answer_tokens, least, bytes_per_expert, foretold(samples))
    except CannotTellError as error:
        return cannot_tell(str(error))
    except (EngineCrashError, UnsupportedError, PolicyError) as error:
        return cannot_tell(f"the engine does not go on under it ({error})")


def sizes_of(loads: Sequence[int], largest: int) -> list[int]:
    """Requests of the waves: the workload's loads, and where there are one or two a smaller and a larger size beside them."""
    wanted = set(loads)
    if len(wanted) < 3:
        wanted |= {max(1, min(loads) // 4), 4 * max(loads)}
    return sorted({min(size, largest) for size in wanted})


def kept_experts(top_k: int) -> list[int]:
    """The numbers S of experts that a token keeps in turn; the last is exact routing."""
    return sorted({1, min(2, top_k), (top_k + 1) // 2, top_k})


def keeping(S: int, batch: int) -> Policy:
    """Top-k routing with k = S at every size, counted apart for steps of up to `batch` tokens: its first bucket."""
    rest = (Bucket(min_tokens=batch + 1, kind=Kind.TOPK, S=S),) if batch < MAX_TOKENS else ()
    return Policy(buckets=(Bucket(min_tokens=1, max_tokens=batch, kind=Kind.TOPK, S=S), *rest))


def expert_bytes(config: dict[str, object], weight_format: str) -> float | None:
    """Bytes of the weights of one expert in one layer; None where config or format do not say."""
    merged = language_config(config)
    hidden, width = merged.get("hidden_size"), merged.get("moe_intermediate_size") or merged.get("intermediate_size")
    if not isinstance(hidden, int) or not isinstance(width, int) or weight_format not in _BYTES:
        return None
    return float(_MATRICES * hidden * width * _BYTES[weight_format])


def _loads(engine: WarmEngine, work: Work, step: Callable[[str], None]) -> tuple[list[int], float | None]:
    """(requests at once of the workload, mean tokens of an answer or None), measured under exact routing where they are not given."""
    load, synthetic = work.workload.load, work.workload.synthetic
    levels = sorted({min(level, work.largest) for level in load.levels if level})
    if levels and (synthetic is not None or not work.answers_known):
        return levels, float(synthetic.output_tokens) if synthetic is not None else None
    step("ceiling: the length of answers under exact routing")
    engine.apply(EXACT_POLICY)
    if levels:
        count = max(levels[0], 8)
        report = engine.block(_cycle(work.requests, 0, count), Load(concurrency=levels[0]), (), _BLOCK_S)
    else:
        rate = load.requests_per_second or 1.0
        requests = _cycle(work.requests, 0, max(8, round(rate * _BLOCK_S)))
        report = engine.block(requests, Load(rate=rate, seed=work.workload.seed), (), _BLOCK_S)
        levels = [min(max(1, round(report.block.batch)), work.largest)]
    tokens = [sent.tokens for sent in report.block.sent if sent.error is None]
    return levels, float(np.mean(tokens)) if tokens and work.answers_known else None


def _rounds(
    engine: WarmEngine, top_k: int, work: Work, loads: Sequence[int], seconds: float, step: Callable[[str], None]
) -> list[Sample]:
    """Samples of rounds that hold every size under every S once, in an order drawn anew for each round.

    Raises:
        CannotTellError: the routers counted no step.
    """
    sizes, kept = sizes_of(loads, work.largest), kept_experts(top_k)
    began, taken = time.monotonic(), 0

    def wave(batch: int, S: int) -> Wave:
        nonlocal taken
        policy = keeping(S, batch)
        engine.apply(policy)
        taken += batch
        return engine.wave(_cycle(work.requests, taken, batch), _TOKENS, policy.buckets[0].label)

    step(f"ceiling: decode steps of {', '.join(map(str, sizes))} requests at once, first to warm up")
    took = {}
    for batch in sizes:  # not counted: the first steps of a size are slower
        start = time.monotonic()
        wave(batch, top_k)
        took[batch] = time.monotonic() - start
    left = seconds - (time.monotonic() - began)
    if _LEAST_ROUNDS * len(kept) * sum(took.values()) > left:
        sizes = [size for size in sizes if size in loads]
    draw, found = random.Random(0), []
    number, longest = 0, 0.0
    while number < _MOST_ROUNDS and (number < _LEAST_ROUNDS or time.monotonic() - began + longest < seconds):
        step(f"ceiling: round {number + 1}, where each token keeps its best {', '.join(map(str, kept))} experts in turn")
        start = time.monotonic()
        cells: list[tuple[int, int]] = [(batch, S) for batch in sizes for S in kept]
        draw.shuffle(cells)
        for batch, S in cells:
            seen = wave(batch, S)
            if seen.step_s is None:
                continue
            if seen.active is None or seen.slots is None:
                raise CannotTellError("the routers counted no decode step, so active experts are unknown")
            found.append(Sample(number, batch, S, seen.step_s, seen.prompt_s, seen.active, seen.slots * batch))
        number, longest = number + 1, max(longest, time.monotonic() - start)
    return found


def _cycle(requests: Sequence[Any], start: int, count: int) -> list[Any]:
    return [requests[(start + i) % len(requests)] for i in range(count)]
