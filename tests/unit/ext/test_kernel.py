"""The CPU kernel keeps the contract; Python's and C++'s numbers are the same."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from sere_ext.contract.errors import UnsupportedError
from sere_ext.contract.policy import MAX_BUCKETS, Kind
from sere_ext.engine import seam
from sere_ext.routing import kernel, ops
from sere_ext.routing.build import SOURCES
from sere_ext.routing.state import LayerState
from tests.kit.reroute_contract import KernelContract, Tensors, kernel_call


class TestCpuKernel(KernelContract):
    def launch(self, layer: LayerState, tensors: Tensors) -> None:
        kernel.reroute_cpu(layer.struct, kernel_call(tensors))


def enum(name: str) -> list[str]:
    found = re.search(rf"enum {name} {{ (.*) }};", (SOURCES / "reroute_core.h").read_text())
    assert found, name
    return found[1].split(", ")


def test_python_and_c_agree_on_codes_and_limits() -> None:
    assert [name.lower() for name in enum("Kind")] == [kind.value for kind in kernel.CODES]
    assert list(kernel.CODES.values()) == list(range(len(kernel.CODES)))
    for names in (enum("Column"), enum("Counter")[:-1], enum("Scoring"), enum("Float"), enum("Freed")):
        assert [getattr(kernel, name) for name in names] == list(range(len(names)))
    assert len(kernel.COUNTERS) == len(enum("Counter")) - 1
    limits = dict(re.findall(r"constexpr int (MAX_\w+) = (\d+);", (SOURCES / "reroute_core.h").read_text()))
    ours = {"MAX_EXPERTS": kernel.MAX_EXPERTS, "MAX_TOP_K": kernel.MAX_TOP_K, "MAX_BUCKETS": MAX_BUCKETS}
    assert {name: int(value) for name, value in limits.items()} == ours


@pytest.mark.parametrize(
    ("weights", "columns"),
    [([[1, 0, 0, 0], [0.5, 0.5, 0, 0]], 2), ([[0] * 4] * 2, 1), ([[0, 0, 0, 1]], 4), ([[float("nan"), 0, 0, 0]], 1)],
)
def test_columns_in_use_counts_the_widest_row(weights: list[list[float]], columns: int) -> None:
    tensor = torch.tensor(weights, dtype=torch.float32)
    assert kernel.columns_in_use(tensor.data_ptr(), *tensor.shape) == columns


def router(experts: int, top_k: int) -> SimpleNamespace:
    """What the seam reads of one of vLLM's runners."""
    return SimpleNamespace(
        layer_name="layers.0.mlp",
        layer_id=0,
        router=SimpleNamespace(top_k=top_k, renormalize=True),
        routed_experts=None,
        moe_config=SimpleNamespace(num_logical_experts=experts),
    )


def test_a_model_above_the_kernels_limits_is_refused() -> None:
    assert seam._layer_state(router(512, 32)).experts == 512
    for experts, top_k in ((513, 8), (64, 33)):
        with pytest.raises(UnsupportedError, match=rf"{experts} experts, top-{top_k}.* up to 512 experts, top-32; serve without"):
            seam._layer_state(router(experts, top_k))


def test_tensors_of_another_type_or_layout_are_rewritten_in_place_all_the_same() -> None:
    layer = LayerState(0, 8, 2, False, kernel.SOFTMAX)
    layer.load_row(0, (1, 2**30), Kind.TOPK, 1)
    slot = ops.bind([layer])
    for weights in (torch.tensor([[0.25, 0.75]]).bfloat16(), torch.tensor([[0.25], [0.75]]).t()):
        ids = torch.tensor([[1], [2]]).t()
        torch.ops.sere.reroute(weights, ids, torch.zeros(1, 8, dtype=torch.float64), slot)
        assert weights.tolist() == [[0.75, 0.0]]
        assert ids.tolist() == [[2, 2]]


def test_tensors_that_the_kernel_would_misread_are_refused() -> None:
    slot = ops.bind([LayerState(0, 8, 2, True, kernel.SOFTMAX)])
    weights, ids, logits = torch.ones(3, 2), torch.zeros(3, 2, dtype=torch.int32), torch.zeros(3, 8)
    torch.ops.sere.reroute(weights, ids, logits, slot)
    assert torch.equal(ids, torch.zeros(3, 2, dtype=torch.int32))
    for wrong in ((weights[:, :1], ids, logits), (weights, ids.short(), logits), (weights, ids, logits[:2]),
                  (weights, ids, logits[:, :7]), (torch.ones(3, 40), ids.repeat(1, 20), logits)):  # fmt: skip
        with pytest.raises(TypeError, match="sere::reroute takes"):
            torch.ops.sere.reroute(*wrong, slot)
