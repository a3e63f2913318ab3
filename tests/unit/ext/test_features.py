"""Features of the engine that are refused at start, and those that are not."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import ECTransferConfig

from sere_ext.contract.errors import UnsupportedError
from sere_ext.engine.features import check_features


def config(**changed: Any) -> SimpleNamespace:
    """The fields of vLLM's `VllmConfig` that are looked at (held against every release by the ledger of symbols)."""
    parallel = {
        "tensor_parallel_size": 1, "data_parallel_size": 1, "pipeline_parallel_size": 1, "prefill_context_parallel_size": 1,
        "enable_expert_parallel": False, "use_sequence_parallel_moe": False, "enable_eplb": False, "use_ubatching": False,
    }  # fmt: skip
    model = {"enable_sleep_mode": False, "enforce_eager": False, "hf_config": SimpleNamespace(model_type="qwen3_moe")}
    return SimpleNamespace(
        kernel_config=SimpleNamespace(moe_backend=changed.get("moe_backend", "auto")),
        additional_config=changed.get("additional_config", {"sere": {}}),
        parallel_config=SimpleNamespace(**parallel | {key: changed[key] for key in changed if key in parallel}),
        model_config=SimpleNamespace(**model | {key: changed[key] for key in changed if key in model}),
        lora_config=changed.get("lora_config"),
        ec_transfer_config=changed.get("ec_transfer_config"),
    )


def transfer(role: str) -> ECTransferConfig:
    """Of an engine that hands encoder outputs to others, takes them, or both."""
    return ECTransferConfig(ec_connector="ECExampleConnector", ec_role=role)


@pytest.mark.parametrize(
    "allowed",
    [
        {},
        {"tensor_parallel_size": 8},
        {"data_parallel_size": 2},
        {"tensor_parallel_size": 2, "enable_expert_parallel": True},
        {"ec_transfer_config": transfer("ec_consumer")},
        {"ec_transfer_config": transfer("ec_both")},
    ],
)
def test_what_works_is_let_through(allowed: dict[str, Any]) -> None:
    check_features(config(**allowed))


@pytest.mark.parametrize(
    ("refused", "says"),
    [
        ({"hf_config": SimpleNamespace(model_type="flint")}, "Flint: its own kernels route small batches.*serve it without sere"),
        (
            {"pipeline_parallel_size": 4},
            "--pipeline-parallel-size 4: a stage holds some of the layers.*use --tensor-parallel-size",
        ),
        ({"use_sequence_parallel_moe": True}, "sequence-parallel experts.*drop --enable-expert-parallel"),
        ({"prefill_context_parallel_size": 2}, "--prefill-context-parallel-size.*set it to 1"),
        ({"enable_eplb": True}, "--enable-eplb.*drop it"),
        ({"use_ubatching": True}, "--enable-dbo or --ubatch-size.*a part of the batch.*drop them"),
        ({"moe_backend": "deep_gemm_mega_moe"}, "mega_moe: the model routes inside.*choose another"),
        ({"additional_config": {"decode_backend": "latency_specialized"}}, "decode_backend.*would stay exact; drop it"),
        ({"ec_transfer_config": transfer("ec_producer")}, "ec_producer: this engine runs the encoder alone.*without sere"),
        ({"lora_config": object()}, "--enable-lora.*drop it"),
        ({"enable_sleep_mode": True}, "--enable-sleep-mode.*drop it"),
    ],
)
def test_what_does_not_is_refused_with_the_flag_to_change(refused: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedError, match=says):
        check_features(config(**refused))


def test_all_reasons_are_said_at_once() -> None:
    with pytest.raises(UnsupportedError) as caught:
        check_features(config(pipeline_parallel_size=2, use_ubatching=True))
    assert len(re.findall(r"--pipeline-parallel-size 2:|--ubatch-size:", str(caught.value))) == 2


def test_batch_invariance_contradicts_re_routing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(UnsupportedError, match=r"VLLM_BATCH_INVARIANT: .*; unset it"):
        check_features(config())
