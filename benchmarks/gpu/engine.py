"""One vLLM engine in this process, on random weights, whose decode steps are timed while the policy changes under them."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu import routing
from benchmarks.gpu.shapes import Shape

# In this process: the load format is known, and a wave is complete before its first step.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

DISCARDED = 2  # steps after a switch: the one in flight, and the first under the new policy
STOCK = "stock"


@dataclass
class Segment:
    """Decode steps of one batch under one arm."""

    tpot_ms: float
    counters: dict[str, int] | None
    switch_ms: float | None
    context: float  # mean tokens in the cache per sequence


@dataclass
class Wave:
    """So many sequences that run side by side."""

    ids: list[str]
    prompt: int
    decoded: int = 0


@dataclass
class Engine:
    """`policies` holds each arm's bucket without edges; without a similarity vLLM runs without the plug-in."""

    shape: Shape
    folder: Path
    similarity: Path | None
    policies: dict[str, dict[str, Any]]
    batches: tuple[int, ...]
    positions: int
    eager: bool = False
    started_s: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        if self.similarity is None:
            os.environ["VLLM_PLUGINS"] = "none"  # a name that nothing has, so no plug-in is loaded
        import torch

        on_gpu = torch.cuda.is_available()
        from vllm import LLM

        graphs: dict[str, Any] = {"compilation_config": {"cudagraph_capture_sizes": list(self.batches)}} if on_gpu else {}
        if on_gpu:
            graphs["gpu_memory_utilization"] = 0.93
        ours = {"additional_config": {"sere": {"similarity": str(self.similarity)}}} if self.similarity else {}
        began = time.perf_counter()
        self.llm = LLM(
            model=str(self.shape.write(self.folder / "model", self.positions)), load_format=routing.register(self.shape),
            skip_tokenizer_init=True, dtype="bfloat16", max_model_len=self.positions, max_num_seqs=max(self.batches),
            max_num_batched_tokens=max(8192, self.positions), enable_prefix_caching=False, enforce_eager=self.eager,
            **({} if self.eager else graphs), **ours,
        )  # fmt: skip
        self.started_s = time.perf_counter() - began
        self.number = 0

    def room(self) -> int:
        """Tokens that the cache holds."""
        cache = self.llm.llm_engine.vllm_config.cache_config
        return int(cache.num_gpu_blocks * cache.block_size)

    def begin(self, kind: str, batch: int, prompt: int, tokens: int) -> Wave:
        """Start a batch and run it until every sequence decodes; `tokens` is how many each may answer."""
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        self.number += 1
        wave = Wave([], prompt)
        for index, ids in enumerate(routing.prompts(self.shape, kind, batch, prompt, self.number)):
            wave.ids.append(f"{self.number}-{index}")
            engine.add_request(wave.ids[-1], {"prompt_token_ids": ids}, greedy)
        while len(engine.step()) < batch:
            pass
        return wave

    def end(self, wave: Wave) -> None:
        self.llm.llm_engine.abort_request(wave.ids)
        while self.llm.llm_engine.has_unfinished_requests():
            self.llm.llm_engine.step()

    def segment(self, wave: Wave, arm: str, steps: int) -> Segment:
        """Switch to an arm while the wave runs, and time its steps."""
        switch_ms = None if arm == STOCK else self.switch(arm, len(wave.ids))
        self._steps(wave, DISCARDED)
        before = None if arm == STOCK else self._counters(arm, len(wave.ids))
        context = wave.prompt + wave.decoded + steps / 2
        began = time.perf_counter()
        self._steps(wave, steps)
        taken = time.perf_counter() - began
        after = None if before is None else self._counters(arm, len(wave.ids))
        gained = {key: after[key] - before[key] for key in after} if after is not None and before is not None else None
        return Segment(1e3 * taken / steps, gained, switch_ms, context)

    def _steps(self, wave: Wave, count: int) -> None:
        """So many steps that answered. Where the engine schedules ahead, a call may only have started one."""
        answered, calls = 0, 0
        while answered < count:
            outputs, calls = len(self.llm.llm_engine.step()), calls + 1
            if outputs not in (0, len(wave.ids)) or calls > 2 * count + 8:
                raise RuntimeError(f"a step answered {outputs} of {len(wave.ids)} sequences: the cache or a limit is too small")
            answered += outputs > 0
        wave.decoded += count

    def switch(self, arm: str, batch: int) -> float:
        """Put an arm in force for up to `batch` tokens a step, between two steps; returns ms until every rank confirmed."""
        import torch

        from sere_ext.contract.state import Refusal

        text = self._policy(arm, batch).to_json()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # a step that was launched ahead is no part of the switch
        began = time.perf_counter()
        states = self.llm.collective_rpc("sere_apply", args=(text, None, None))
        taken = 1e3 * (time.perf_counter() - began)
        if refusal := Refusal.read(states[0]):
            raise RuntimeError(f"{arm}: {refusal.message}")
        return taken

    def _policy(self, arm: str, batch: int) -> Any:
        from sere_ext.contract.policy import Policy

        return Policy.parse({"buckets": [{"minTokens": 1, "maxTokens": batch, **self.policies[arm]}]})

    def _counters(self, arm: str, batch: int) -> dict[str, int]:
        from sere_ext.contract.state import CounterRow, by_key
        from sere_ext.control.switch import llm_states

        policy = self._policy(arm, batch)
        key = (policy.digest, None, policy.buckets[0].label)
        row = by_key(llm_states(self.llm)[0].counters).get(key, CounterRow(digest=policy.digest, bucket=key[2])).to_json_dict()
        return {name: value for name, value in row.items() if isinstance(value, int)}

    def answers(self, arm: str, kind: str, batch: int, tokens: int) -> list[list[tuple[int, float]]]:
        """Per sequence the greedy tokens and their log-probabilities under an arm; always the same prompts."""
        from vllm import SamplingParams

        self.switch(arm, batch)
        greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=1)
        asked = [{"prompt_token_ids": ids} for ids in routing.prompts(self.shape, kind, batch, 8, 0)]
        outputs = self.llm.generate(asked, greedy, use_tqdm=False)
        found = []
        for output in outputs:
            best = output.outputs[0]
            found.append([(token, best.logprobs[at][token].logprob) for at, token in enumerate(best.token_ids)])
        return found
