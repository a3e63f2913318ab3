"""An engine on a model of `families.py`, with taps on what its routers answer and what its experts receive."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sere_ext.contract.model_config import model_config_digest
from sere_ext.contract.policy import Bucket, Kind
from sere_ext.contract.similarity import SimilarityMeta
from sere_ext.routing.reference import reroute
from sere_ext.similarity.file import write_similarity
from sere_ext.similarity.hub import model_config_dict
from tests.kit import families

Calls = list[tuple[torch.Tensor, torch.Tensor]]
Answers = list[tuple[tuple[int, ...], tuple[float, ...]]]
PROMPT_LENGTHS = range(5, 11)
NEW_TOKENS = 4
_running = False  # whether an engine of `in_process` is alive


@dataclass
class Recorder:
    """Copies of (weights, ids) of each MoE call, in order: as the stock router gave them, and as the experts got them."""

    routed: Calls = field(default_factory=list)
    received: Calls = field(default_factory=list)
    real: list[torch.Tensor | None] = field(default_factory=list)  # [T] bool of each call, None if all rows are tokens

    def clear(self) -> None:
        for kept in (self.routed, self.received, self.real):
            kept.clear()


@contextmanager
def recording() -> Iterator[Recorder]:
    """Taps on vLLM's classes, below the plug-in's seam and behind it, for engines of this process started meanwhile."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
    from vllm.model_executor.models import registry

    families.register_loader()
    kept = Recorder()
    route, compute = CPURouter._compute_routing, RoutedExperts.forward_modular

    def routing(self: Any, *args: Any, **kwargs: Any) -> Any:
        weights, ids = route(self, *args, **kwargs)
        kept.routed.append((weights.clone(), ids.clone()))
        return weights, ids

    def experts(self: Any, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, *rest: Any, **more: Any) -> Any:
        kept.received.append((topk_weights.clone(), topk_ids.clone()))
        return compute(self, x, topk_weights, topk_ids, *rest, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CPURouter, "_compute_routing", routing)
        patch.setattr(RoutedExperts, "forward_modular", experts)
        # vLLM inspects each architecture in a process of its own, 15 seconds each on two cores; here it is imported anyway.
        patch.setattr(registry, "_run_in_subprocess", lambda function: function())
        yield kept


@contextmanager
def in_process(model: Path, **options: Any) -> Iterator[Any]:
    """An `LLM` in this process; at the end of the `with` block nothing of it is left.

    The end takes the process groups of every engine in the process with it, so a second engine beside the first is refused.
    """
    global _running
    assert not _running, "an engine is running in this process: a test with an engine of its own belongs to another module"
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm, _running = None, True
    try:
        llm = LLM(model=str(model), distributed_executor_backend="uni", disable_log_stats=True, seed=0, **options)
        yield llm
    finally:  # a start that was refused leaves process groups behind too
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
            del llm
        gc.collect()
        torch._dynamo.reset()
        cleanup_dist_env_and_memory()
        _running = False


@contextmanager
def engine(model: Path, **options: Any) -> Iterator[Any]:
    """An engine on a model of `families.py`, eager and small."""
    options = {"max_model_len": 64, "max_num_seqs": 8} | options
    with in_process(
        model,
        load_format=families.LOAD_FORMAT,
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype=families.dtype(model),
        **options,
    ) as llm:
        yield llm


def answers(llm: Any, lengths: Any = PROMPT_LENGTHS) -> Answers:
    """Tokens and log-probabilities, greedy, for prompts of these lengths."""
    from vllm import SamplingParams, TokensPrompt

    prompts = [TokensPrompt(prompt_token_ids=[(7 * n + 3 * i) % 120 + 3 for i in range(n)]) for n in lengths]
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, ignore_eos=True, logprobs=1, detokenize=False)
    found = []
    for output in llm.generate(prompts, sampling, use_tqdm=False):
        tokens = tuple(output.outputs[0].token_ids)
        found.append((tokens, tuple(step[t].logprob for step, t in zip(output.outputs[0].logprobs, tokens, strict=True))))
    return found


def random_similarity(model: Path, layers: list[int], experts: int, path: Path) -> dict[int, torch.Tensor]:
    """An artefact of the right shape for the model at `path`, with ties; its matrices [E, E] by layer number."""
    generator = np.random.default_rng(0)
    matrices = {}
    for layer in layers:
        half = np.round(generator.random((experts, experts), np.float32), 2)
        matrices[layer] = np.maximum(half, half.T)
        np.fill_diagonal(matrices[layer], 1)
    config = model_config_dict(str(model))
    meta = SimilarityMeta(
        model_name=str(model), model_type=str(config["model_type"]), config_digest=model_config_digest(config),
        num_experts=experts, metric="cosine", layers=tuple(layers), data_digest="sha256:none", tokens=1,
    )  # fmt: skip
    write_similarity(path, meta, matrices)
    return {layer: torch.from_numpy(matrix) for layer, matrix in matrices.items()}


def same(left: Calls, right: Calls) -> bool:
    """Whether two recordings are equal bit for bit."""
    return len(left) == len(right) and all(
        torch.equal(a, b) for x, y in zip(left, right, strict=True) for a, b in zip(x, y, strict=True)
    )


def check_oracle(recorder: Recorder, bucket: Bucket, matrices: list[torch.Tensor], experts: int) -> int:
    """Assert that every recorded call is what the reference makes of the stock router's answer.

    Args:
        bucket: of kind `sere`, in force for all calls.
        matrices: by place of the MoE layer in the model.

    Returns:
        slots that the reference re-routed.
    """
    assert bucket.kind is Kind.SERE and len(recorder.routed) == len(recorder.received) > 0
    moved = 0
    for call, ((weights, ids), (new_weights, new_ids)) in enumerate(zip(recorder.routed, recorder.received, strict=True)):
        want = reroute(
            ids, weights.float(), num_experts=experts, kind=bucket.kind, S=bucket.S or 1, rho=bucket.rho,
            similarity=matrices[call % len(matrices)],
        )  # fmt: skip
        assert torch.equal(new_ids, want.ids), f"call {call}: {ids.tolist()} became {new_ids.tolist()}, not {want.ids.tolist()}"
        torch.testing.assert_close(new_weights, want.weights, rtol=1e-6, atol=0)
        moved += want.rerouted
    return moved
