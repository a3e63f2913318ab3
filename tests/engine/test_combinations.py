"""Features of the engine together with re-routing: chunked prefill, prefix caching, speculative decoding, two ranks."""

from __future__ import annotations

import asyncio
import gc
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sere_ext.contract.errors import UnsupportedError
from sere_ext.contract.policy import Policy
from sere_ext.control.switch import llm_states, switch_llm
from tests.kit import TINY_MOE as TINY
from tests.kit import families
from tests.kit.inside import Recorder, answers, check_oracle, engine, random_similarity, recording, same
from tests.kit.states import counted

pytestmark = pytest.mark.timeout(900)
SERE = Policy.parse({"buckets": [{"minTokens": 1, "kind": "sere", "S": 2, "rho": 0.3}]})
LENGTHS = (33, 38, 41)  # more than a cache block, less than the longest request
BLOCK = 32
NGRAM: dict[str, Any] = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
COMBINATIONS: dict[str, dict[str, Any]] = {
    "chunked-prefill": {"enable_chunked_prefill": True, "max_num_batched_tokens": 16, "enable_prefix_caching": False},
    "prefix-caching": {"enable_prefix_caching": True, "block_size": BLOCK},
    "speculative-decoding": {"speculative_config": NGRAM, "enable_prefix_caching": False},
}
EXPERT_PARALLEL = {
    "tensor_parallel_size": 2,
    "enable_expert_parallel": True,
    "worker_extension_cls": "tests.kit.cpu_expert_parallel.Experts",  # vLLM 0.32's CPU experts would leave the expert map unread
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.write("qwen3-moe", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def recorder() -> Iterator[Recorder]:
    with recording() as kept:
        yield kept


def rows(recorder: Recorder) -> list[int]:
    """Tokens of each call."""
    return [ids.shape[0] for _, ids in recorder.received]


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_feature_with_routing_off_and_on(name: str, model: Path, recorder: Recorder, tmp_path: Path) -> None:
    options = COMBINATIONS[name]

    def twice(llm: Any) -> Any:
        """The second time prompts are in the prefix cache, where there is one."""
        llm.reset_prefix_cache()
        recorder.clear()
        return [answers(llm, LENGTHS) for _ in range(2)]

    with engine(model, **options) as llm:
        stock, calls = twice(llm), list(recorder.received)
    with engine(model, **options, additional_config={"sere": {}}) as llm:
        assert twice(llm) == stock and same(recorder.received, calls), "off is stock under the feature"
        layers = llm_states(llm)[0].model.moe_layers
        matrices = random_similarity(model, layers, 16, tmp_path / "similarity.safetensors")
        switch_llm(llm, SERE, similarity=str(tmp_path / "similarity.safetensors"))
        twice(llm)
        counters = counted(llm_states(llm)[0], SERE)
    moved = check_oracle(recorder, SERE.buckets[0], [matrices[layer] for layer in layers], 16)
    assert counters.rerouted == moved > 0
    assert counters.tokens == sum(rows(recorder)), "every row was a token and was counted"

    widths = rows(recorder)[:: len(layers)]
    if name == "chunked-prefill":
        assert max(widths) == 16, "prompts came in chunks"
    elif name == "prefix-caching":
        assert max(widths) == sum(LENGTHS)
        assert len(LENGTHS) < max(widths[len(widths) // 2 :]) <= sum(LENGTHS) - BLOCK * len(LENGTHS), "blocks were found again"
    else:
        assert any(width > len(LENGTHS) for width in widths[1 : len(widths) // 2]), "drafts were verified in decode steps"


def test_buckets_hold_the_steps_that_drafts_make_larger() -> None:
    """The tuner's own engine, exact routing: three requests at a time, each with up to three drafts a step."""
    from sere_autotune.trial.host import EngineHost
    from sere_autotune.trial.load import Load, Request
    from sere_autotune.tuning.space import auto_buckets

    async def measured() -> float | None:
        host = EngineHost()
        await host.start(["--model", str(TINY), "--max-model-len", "256", "--speculative-config", json.dumps(NGRAM)], None)
        try:
            await host.apply("{}")
            request = Request("one two one two one two", 60, ignore_eos=True)
            return (await host.block([request] * 6, Load(concurrency=3), [], None, None)).step_tokens
        finally:
            await host.stop()

    tokens = asyncio.run(measured())
    assert tokens is not None
    assert 3 < tokens <= 3 * (1 + NGRAM["num_speculative_tokens"]), "a step has its requests' tokens and their drafts"
    lower, upper = auto_buckets([3, 12], [3, 12], [tokens, None])
    assert lower.min_tokens <= 3
    assert lower.max_tokens >= round(tokens), "the steps of three requests are in the range of three requests"
    assert upper.min_tokens == lower.max_tokens + 1


def test_a_refused_feature_stops_the_start(model: Path, recorder: Recorder) -> None:
    """One of the refusals of `features.py` through a real engine; the others are unit tests."""
    with (
        pytest.raises(UnsupportedError, match=r"--enable-lora: .* drop it"),
        engine(model, enable_lora=True, additional_config={"sere": {}}),
    ):
        pass


def test_two_ranks_switch_together_and_answer_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor and expert parallel on two ranks against one, on the trained model: answers, states and counters, exact and re-routed."""
    topk = Policy.parse({"buckets": [{"minTokens": 1, "kind": "topk", "S": 2}]})
    cpus = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    one = _on_ranks(topk)
    assert len(set(one["exact"])) > 1
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cpus[0]}|{cpus[-1]}")  # one core a rank
    two = {"tensor": _on_ranks(topk, tensor_parallel_size=2), "expert": _on_ranks(topk, **EXPERT_PARALLEL)}
    for name, found in two.items():
        assert found["exact"] == one["exact"], name
        assert found["topk"] == one["topk"], name
        states = found["states"]
        counters = counted(states[0], topk)
        assert counters.active_after < counters.active_before, name
        assert [state.rank for state in states] == [0, 1], name
        for key in ("policy_digest", "generation", "switches", "counters", "model"):
            first, second, alone = (getattr(state, key) for state in (*states, one["states"][0]))
            assert first == second == alone, (name, key)
    (first, asked), (second, also) = two["expert"]["experts"]
    assert (first, second) == (list(range(8)), list(range(8, 16))), "each rank holds half of the experts"
    assert set(asked) == set(also) == set(range(16)), "and re-routes ids of all of them before they are mapped"


def _on_ranks(policy: Policy, **options: Any) -> dict[str, Any]:
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    prompts = ["Rqxnfwxd=", "A602339+415033=", "P48213=", "Rabcdefgh=", "A117254+983321=", "P70621=", "Rzyx="]
    sampling = SamplingParams(max_tokens=10, temperature=0)
    llm = None
    try:
        llm = LLM(
            model=str(TINY), distributed_executor_backend="mp" if options else "uni", seed=0,
            enforce_eager=True, dtype="float32", max_model_len=64, max_num_seqs=8, disable_log_stats=True,
            additional_config={"sere": {}}, **options,
        )  # fmt: skip

        def texts() -> list[str]:
            return [output.outputs[0].text for output in llm.generate(prompts, sampling, use_tqdm=False)]

        exact = texts()
        switch_llm(llm, policy)
        rerouted, states = texts(), llm_states(llm)
        experts = llm.collective_rpc("experts_here") if "worker_extension_cls" in options else None
        return {"exact": exact, "topk": rerouted, "states": states, "experts": experts}
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
            del llm
        gc.collect()
        cleanup_dist_env_and_memory()
