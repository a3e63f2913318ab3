"""`make bench-telemetry`: what counters, polling and latency metrics cost, as a share of step time. Writes JSON.

    python -m benchmarks.telemetry [--rounds N] [--waves N] [--out FILE]

On the widened `rows_moe` at 16 concurrent requests, two ways in one run: the parts are timed where they run (the re-routing
operator with nothing to re-route, which leaves counting; the hook called each step; what the engine does for a poll), and blocks
without telemetry, with the hook, and with hook and polling alternate on one engine. The operator always counts, so the blocks differ
by hook and polling alone. The blocks of a round send the same requests; from round to round their order turns, so that each kind
of block is first, second and third equally often.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

from scipy import stats as sps

from benchmarks.ground import RESULTS, keep, machine, shape, widened
from tests.assets.make.models import ROWS_MOE
from tests.kit import ROOT

CONCURRENCY, TOKENS = 16, 64
NOTHING, HOOK, BOTH = KINDS = ("none", "hook", "hookAndPolling")  # what a block has of telemetry


def operator_us(experts: int, top_k: int) -> float:
    """Median of one call on `CONCURRENCY` tokens under exact routing, in microseconds."""
    import torch

    from sere_ext.routing import ops
    from sere_ext.routing.state import LayerState, WorkerState

    layer = LayerState(number=0, experts=experts, top_k=top_k, renormalise=True, scoring=0)
    WorkerState([layer], {})
    ops.bind([layer])
    logits = torch.randn(CONCURRENCY, experts)
    weights, ids = logits.softmax(-1).topk(top_k)
    arguments = (weights.contiguous(), ids.to(torch.int32), logits, 0)
    times = []
    for _ in range(3000):
        at = time.perf_counter()
        torch.ops.sere.reroute(*arguments)
        times.append(time.perf_counter() - at)
    return statistics.median(times) * 1e6


def ratio(ratios: list[float]) -> dict[str, Any]:
    """Geometric mean of ratios and its 95 % limits."""
    logs = [math.log(each) for each in ratios]
    mean = statistics.mean(logs)
    half = float(sps.t.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return {"mean": math.exp(mean), "interval95": [math.exp(mean - half), math.exp(mean + half)]}


async def measure(model: Path, rounds: int, waves: int) -> dict[str, Any]:
    os.environ["VLLM_PLUGINS"] = "sere,sere_control"
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from sere_ext.control.live import LiveControl
    from sere_ext.control.metrics import Metrics, _Recorder

    arguments = AsyncEngineArgs(
        model=str(model),
        dtype=ROWS_MOE.widened_dtype,
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=32,
        additional_config={"sere": {}},
    )
    engine = AsyncLLM.from_engine_args(arguments)
    control = LiveControl(engine, None)
    metrics = Metrics(control)
    loggers = engine.logger_manager.stat_loggers
    recorder = _Timed(_Recorder(metrics))
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)

    async def one(name: str, prompt: str) -> float:
        """TPOT of a request in seconds."""
        first = last = 0.0
        async for output in engine.generate(prompt, sampling, request_id=name):
            last = time.perf_counter()
            first = first or last
            tokens = len(output.outputs[0].token_ids)
        return (last - first) / (tokens - 1)

    async def block(kind: str, number: int) -> float:
        """Mean TPOT of a block's requests in seconds.

        Args:
            number: of the round, which decides the prompts.
        """
        polling = asyncio.create_task(metrics.run()) if kind == BOTH else None
        await asyncio.sleep(0)
        kept = [logger for logger in loggers if not isinstance(logger, _Recorder | _Timed)]
        loggers[:] = kept if kind == NOTHING else [*kept, recorder]
        tpots: list[float] = []
        for wave in range(waves):
            requests = [number * waves * CONCURRENCY + wave * CONCURRENCY + i for i in range(CONCURRENCY)]
            tpots += await asyncio.gather(*(one(f"{kind}-{n}", f"M{1_000_000 + 7919 * n % 9_000_000}=") for n in requests))
        if polling:
            polling.cancel()
        return statistics.mean(tpots)

    try:
        state = await control.state()
        await block(BOTH, -1)  # warm-up
        recorder.calls, recorder.seconds = 0, 0.0
        found: list[dict[str, float]] = []
        for number in range(rounds):
            turned = KINDS[number % len(KINDS) :] + KINDS[: number % len(KINDS)]
            found.append({kind: await block(kind, number) for kind in turned})
        polls = []
        for _ in range(200):
            at = time.perf_counter()
            await control.state()
            polls.append(time.perf_counter() - at)
        at = time.perf_counter()
        for _ in range(200):
            metrics.publish(state)
        publish_s = (time.perf_counter() - at) / 200
    finally:
        engine.shutdown()
    step_s = statistics.median(each[NOTHING] for each in found)
    layers = len(state.model.moe_layers)
    op_us = operator_us(state.model.num_experts, state.model.top_k)
    shares = {
        "operatorUnderExactRouting": op_us * 1e-6 * layers / step_s,
        "hookPerStep": recorder.seconds / recorder.calls / step_s,
        "pollPerSecond": statistics.median(polls) + publish_s,
    }
    return {
        "stepMs": step_s * 1e3, "operatorUs": op_us, "moeLayers": layers, "hookUs": recorder.seconds / recorder.calls * 1e6,
        "pollMs": statistics.median(polls) * 1e3, "publishMs": publish_s * 1e3,
        "shareOfStepTime": {**shares, "total": sum(shares.values())},
        "tpotOverNone": {kind: ratio([each[kind] / each[NOTHING] for each in found]) for kind in (HOOK, BOTH)}, "rounds": rounds,
    }  # fmt: skip


class _Timed:
    """Counts and times what the hook does; everything else is the hook's own."""

    def __init__(self, inner: Any) -> None:
        self._inner, self.calls, self.seconds = inner, 0, 0.0

    def record(self, *args: Any, **kwargs: Any) -> None:
        at = time.perf_counter()
        self._inner.record(*args, **kwargs)
        self.seconds += time.perf_counter() - at
        self.calls += 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=12, help="a multiple of three, so that every order is met as often")
    parser.add_argument("--waves", type=int, default=3, help="of 16 requests, in a block")
    parser.add_argument("--out", type=Path, default=RESULTS / "telemetry.json")
    args = parser.parse_args()
    model, _ = widened(ROWS_MOE, ROOT / "build" / "bench-tune")
    result = asyncio.run(measure(model, args.rounds, args.waves))
    keep(args.out, {"machine": machine(), **shape(ROWS_MOE), "concurrency": CONCURRENCY, **result})


if __name__ == "__main__":
    main()
