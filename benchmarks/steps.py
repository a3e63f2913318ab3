"""One in-process vLLM engine whose decode steps are timed. A child of `ext.py`: one JSON request per line, one answer each.

    python -m benchmarks.steps MODEL SIMILARITY DTYPE     # SIMILARITY "-": stock vLLM with no plug-in loaded

    {"bucket": {...} | null, "waves": [[prompt, ...], ...], "tokens": 9, "parts": false}
    -> {"tpotMs": [per wave], "counters": {...} | null, "parts": {"attention": ms per step, ...}}

Before the first request it prints {"ready": true, "kvCacheMb": ...}.

A wave is so many requests that start together and answer with the same number of tokens: one step computes all prompts, every
later one decodes the whole wave. Its TPOT is the time from the first answer tokens to the last over the number of steps between,
scheduler and sampling included, HTTP not.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # a wave is complete before its first step
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

MAX_SEQUENCES, MAX_TOKENS = 64, 128
# A block of the CPU's KV cache holds 128 tokens, so one sequence; 80 of them take 10 MB, where vLLM would fill the GiB above.
KV_BLOCKS = 80


class Steps:
    """The engine, and how to switch and time it."""

    def __init__(self, model: str, similarity: str | None, dtype: str) -> None:
        if similarity is None:
            os.environ["VLLM_PLUGINS"] = "none"  # a name that nothing has, so no plug-in is loaded
        from vllm import LLM

        ours = {"additional_config": {"sere": {"similarity": similarity}}} if similarity else {}
        self.llm = LLM(
            model=model, dtype=dtype, enforce_eager=True, max_model_len=MAX_TOKENS, max_num_seqs=MAX_SEQUENCES,
            max_num_batched_tokens=2048, enable_prefix_caching=False, num_gpu_blocks_override=KV_BLOCKS, **ours,
        )  # fmt: skip
        self.plugged = similarity is not None
        self.parts: dict[str, float] = defaultdict(float)
        self.number = 0

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Serve one request of the module's docstring."""
        before: dict[Any, Any] = {}
        if self.plugged:
            from sere_ext.contract.policy import Policy
            from sere_ext.contract.state import by_key
            from sere_ext.control.switch import llm_states, switch_llm

            policy = Policy.parse(json.dumps({"buckets": [request["bucket"]]}))
            before = by_key(switch_llm(self.llm, policy)[0].counters)
        self.parts.clear()
        tpots = [self.wave(wave, request["tokens"]) for wave in request["waves"]]
        found: dict[str, Any] = {"tpotMs": tpots, "counters": None}
        if self.plugged:
            key = (policy.digest, None, policy.buckets[0].label)
            gained = by_key(llm_states(self.llm)[0].counters)[key].since(before.get(key)).to_json_dict()
            found["counters"] = {name: value for name, value in gained.items() if isinstance(value, int)}
        if request.get("parts"):
            found["parts"] = dict(self.parts)
        return found

    def wave(self, prompts: list[str], tokens: int) -> float:
        """TPOT in ms of one wave."""
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        for prompt in prompts:
            self.number += 1
            engine.add_request(str(self.number), prompt, greedy)
        began = 0.0
        while engine.has_unfinished_requests():
            outputs = engine.step()
            if not began and len(outputs) == len(prompts):
                began = time.perf_counter()
                self.parts.clear()
        ended = time.perf_counter()
        return 1e3 * (ended - began) / (tokens - 1)

    def kv_cache_mb(self) -> float:
        """What the KV cache of all layers takes, in MB (1e6 bytes)."""

        def size(worker: Any) -> int:
            storages = {one.data_ptr(): one.nbytes() for one in (c.untyped_storage() for c in worker.model_runner.kv_caches)}
            return sum(storages.values())  # layers may share one

        sizes: list[int] = self.llm.collective_rpc(size)
        return sum(sizes) / 1e6

    def watch_parts(self) -> None:
        """Time the parts of every forward pass from now on (eager, so a call is the work)."""

        def look(model: Any) -> None:
            from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

            self._time(model, "forward", "model")
            for name, module in model.named_modules():
                if name.endswith(".self_attn"):
                    self._time(module, "forward", "attention")
                elif isinstance(module, MoERunner):
                    self._time(module.router, "_compute_routing", "router")
                    self._time(module._quant_method.moe_kernel.fused_experts, "apply", "experts")

        self.llm.apply_model(look)

    def _time(self, owner: Any, name: str, part: str) -> None:
        inner: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.parts[part] += 1e3 * (time.perf_counter() - began)

        setattr(owner, name, timed)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the engine prints is no answer
    similarity = None if sys.argv[2] == "-" else sys.argv[2]
    steps = Steps(sys.argv[1], similarity, sys.argv[3])
    print(json.dumps({"ready": True, "kvCacheMb": steps.kv_cache_mb()}), file=answers, flush=True)
    watching = False
    for line in sys.stdin:
        request = json.loads(line)
        if request.get("parts") and not watching:
            steps.watch_parts()
            watching = True
        print(json.dumps(steps.answer(request)), file=answers, flush=True)


if __name__ == "__main__":
    main()
