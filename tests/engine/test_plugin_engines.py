"""The plug-in as engines start with it: compiled, of another architecture, refused, with a foreign profile, without settings.

One process, one engine after another: stock first, then with the plug-in, so that both sides of a comparison come from the same
machine and mode.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sere_ext.calibration.run import calibrate
from sere_ext.contract.errors import UnsupportedError
from sere_ext.contract.policy import Policy
from sere_ext.contract.state import ModelShape
from sere_ext.control.switch import llm_states, switch_llm
from sere_ext.routing import ops
from tests.kit.library import answers, engine, policy
from tests.kit.states import counted

pytestmark = pytest.mark.timeout(900)


def test_a_compiled_graph_of_another_slot_is_never_taken_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key of the compile cache follows the number that the graph's calls carry."""
    from sere_ext.engine import worker
    from sere_ext.engine.settings import resolve

    keys = []
    for slot in (0, 4):
        monkeypatch.setattr(ops, "next_slot", lambda slot=slot: slot)
        config = SimpleNamespace(
            additional_config={"sere": {}}, device_config=SimpleNamespace(device_type="cpu"), kernel_config=None, lora_config=None,
            parallel_config=SimpleNamespace(pipeline_parallel_size=1), model_config=SimpleNamespace(),
        )  # fmt: skip
        engine_worker = SimpleNamespace(
            load_model=None, compile_or_warm_up_model=None, execute_model=None, execute_dummy_batch=None
        )
        worker._attach(engine_worker, config, resolve(config.additional_config))
        keys.append(config.additional_config["sere"]["graph"])
    assert keys[0] != keys[1]


def test_compiled_is_bit_identical_too_and_follows_live_changes(qwen3: Path, similarity: Path) -> None:
    """The CPU traces the router once; a policy read at trace time would be frozen.

    The first compilation that a process makes of a model may round otherwise than the next ones, of stock vLLM too (a difference
    of 5e-7 in log-probabilities between two stock engines was seen), so an engine that nobody looks at comes first.
    """
    with engine(qwen3, enforce_eager=False) as llm:
        answers(llm)
    with engine(qwen3, enforce_eager=False) as llm:
        stock = answers(llm)
    with engine(qwen3, enforce_eager=False, additional_config={"sere": {"similarity": str(similarity)}}) as llm:
        assert answers(llm) == stock
        rerouted = policy("sere", S=1)
        switch_llm(llm, rerouted)
        assert answers(llm) != stock
        counters = counted(llm_states(llm)[0], rerouted)
        assert counters.rerouted > 0
        switch_llm(llm, Policy())
        assert answers(llm) == stock


def test_deepseek_with_shared_experts_and_grouped_top_k(deepseek: Path, calibration: Path, tmp_path: Path) -> None:
    path = tmp_path / "deepseek.safetensors"
    meta = calibrate(str(deepseek), calibration, path)
    assert meta.layers == (1, 2), "the first layer is dense"
    with engine(deepseek) as llm:
        stock = answers(llm)
    profile_policy = {"buckets": [{"minTokens": 1, "maxTokens": 64, "kind": "sere", "S": 2}], "similarityDigest": meta.digest}
    config = {"sere": {"similarity": str(path), "policy": profile_policy}}
    with engine(deepseek, additional_config=config) as llm:
        state = llm_states(llm)[0]
        assert state.model == ModelShape(num_experts=16, top_k=4, moe_layers=(1, 2))
        assert state.policy_digest == Policy.parse(profile_policy).digest
        assert answers(llm) != stock
        counters = counted(llm_states(llm)[0], Policy.parse(profile_policy))
        assert 0 < counters.active_after < counters.active_before
        switch_llm(llm, Policy())
        assert answers(llm) == stock
        switch_llm(llm, policy("topk", S=4))
        assert answers(llm) == stock, "routed_scaling_factor must survive"


def test_a_dense_model_is_refused_with_the_way_out(dense: Path) -> None:
    with (
        pytest.raises(UnsupportedError, match=r"Qwen3ForCausalLM is a dense model.*serve it without sere"),
        engine(dense, additional_config={"sere": {}}),
    ):
        pass


def test_calibrating_a_dense_model_is_refused(dense: Path, calibration: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="is a dense model: it has no experts to compare"):
        calibrate(str(dense), calibration, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_profile_of_another_engine_means_exact_routing(qwen3: Path, stock: Any, tmp_path: Path, monkeypatch: Any) -> None:
    once = {"exact": 1.0, "chosen": 1.0}
    accuracy = {"exact": 1, "chosen": 1, "items": 1, "maxDropPoints": 1, "confidence": 0.95, "dropPoints": 0,
                "discordantShare": 0, "noiseFloor": 0}  # fmt: skip
    spec = {
        "policy": policy("topk", S=1).to_json_dict(),
        "key": {
            "modelName": "m",
            "configDigest": "c",
            "engineVersion": "0.31.0",
            "pluginVersion": "0.1.0",
            "device": "cpu",
            "weightFormat": "float32",
        },
        "evidence": {"certified": True, "tpotMs": once, "speedup": {"value": 1, "condition": "x"}, "accuracy": accuracy},
    }
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({"kind": "SereProfile", "spec": spec}))
    monkeypatch.setenv("SERE_PROFILE", str(path))
    with engine(qwen3) as llm:
        state = llm_states(llm)[0]
        assert state.policy_digest == "exact"
        assert "PolicyStale: profile was made for engine 0.31.0, this pod runs 0.32.0" in (state.error or "")
        assert answers(llm) == stock


def test_without_settings_the_plugin_is_inert(qwen3: Path, stock: Any) -> None:
    with engine(qwen3) as llm:
        assert answers(llm) == stock
        with pytest.raises(UnsupportedError, match="started without sere; start it with `sere serve`"):
            llm.collective_rpc("sere_state")
