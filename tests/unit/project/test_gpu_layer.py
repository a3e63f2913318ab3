"""The stage that measures a whole MoE layer: its arithmetic on a CPU, and its command to the end. No figure means anything here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import layer
from benchmarks.gpu.shapes import TINY


def weights() -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    middle = TINY.get("moe_intermediate_size")
    w13 = torch.randn(TINY.experts, 2 * middle, TINY.hidden, generator=source) / 16
    return w13, torch.randn(TINY.experts, TINY.hidden, middle, generator=source) / 11


def by_tokens(one: layer.Layer, x: torch.Tensor, w: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[B, H]: each token's experts by their definition, token by token."""
    middle = TINY.get("moe_intermediate_size")
    out = torch.zeros_like(x)
    for token in range(len(x)):
        for weight, expert in zip(w[token].tolist(), ids[token].tolist(), strict=True):
            made = one.w13[expert] @ x[token]
            out[token] += weight * (one.w2[expert] @ (torch.nn.functional.silu(made[:middle]) * made[middle:]))
    return out


@pytest.mark.parametrize(
    "bucket", [{"kind": "exact"}, {"kind": "sere", "S": 1}, {"kind": "topk", "S": 2}], ids=lambda b: b["kind"]
)
def test_a_layer_computes_its_experts_and_only_the_slots_that_carry_weight(bucket: dict[str, object]) -> None:
    step = layer.Step(TINY, 6, "cpu", [weights()], layer.by_loops)
    step.policy(bucket)
    (one,) = step.layers
    got = one.step(step.x, True, layer.by_loops)
    torch.testing.assert_close(got, step.x + by_tokens(one, step.x, one.weights, one.ids), atol=1e-4, rtol=1e-4)
    one.answers.fill_(1e6)  # what is left in places that are not computed must not show
    torch.testing.assert_close(one.step(step.x, True, layer.by_loops), got)


def test_fewer_experts_are_active_under_a_policy_that_is_changed_in_place() -> None:
    step = layer.Step(TINY, 8, "cpu", [weights()], layer.by_loops)
    rows = {row["arm"]: row["active"] for row in step.rows(8, "cpu", 3)}
    assert rows["stock"] == rows["off"] > rows["sere S=2"] >= rows["oea S=2 share=0.50"] > 0
    assert rows["sere S=2"] > rows["sere S=1"]


def test_what_an_active_expert_costs_is_the_slope_through_all_arms() -> None:
    arms = {"stock": 50, "off": 50, "sere S=2": 30, "sere S=1": 20, "topk 2": 30, "oea S=2 share=0.50": 25}
    rows = [
        {"batch": 16, "arm": name, "usPerLayer": 30.0 + 3.0 * active + (2.0 if name != "stock" else 0.0), "active": float(active)}
        for name, active in arms.items()
    ]
    found = layer.summary(rows)["16"]
    assert found["usPerActiveExpert"] == pytest.approx(3.0, abs=0.1)
    assert found["reroutingUs"] == pytest.approx(2.0)
    assert found["speedups"]["sere S=1"] == pytest.approx(180 / 92)
    assert [check.met for check in layer.checks({"16": found}, gpu=True)] == [True, False, False]
    assert [check.met for check in layer.checks({"16": found}, gpu=False)] == [None, None, None], "a CPU's times are no figures"


def test_the_command_runs_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "layer.json"
    monkeypatch.setattr(sys, "argv", ["layer.py", "--tiny", "--batch", "2", "--out", str(out)])
    layer.main()
    assert {row["arm"] for row in json.loads(out.read_text())["rows"]} == {layer.STOCK, *layer.POLICIES}
    assert capfd.readouterr().out.rstrip().endswith(str(out)), "the table is the last thing it prints"
