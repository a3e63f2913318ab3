"""Stage 0, on a GPU and without vLLM: what re-routing saves of a whole MoE layer at decode batches. About a minute.

    python3 -m benchmarks.gpu.layer [--tiny] [--batch N ...] [--out FILE]

A step goes through `LAYERS` layers, each with weights of its own, so that no cache holds them, in one CUDA graph: top-k, re-routing,
sorting slots by expert, gate and up projection, silu, down projection, sum (`grouped.py`, plain Triton, bf16). `stock` is a graph without
re-routing; the other arms are one graph each in which the policy is changed in place, as while serving. Arms take turns, times are medians
over replays. Routing is skewed as published counts are (`bound.zipf`), over logits that are drawn once.

A line through all arms' (active experts, microseconds) says what an active expert costs; the difference between `off` and `stock` is
what re-routing itself costs. `--tiny` runs all of it on a CPU, with loops in place of Triton where that is missing, and measures nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import RESULTS, Check, Report, at_least, at_most
from benchmarks.gpu.shapes import QWEN3_30B, TINY, Shape

LAYERS = 8
BATCHES = (16, 1, 64, 4)  # what matters most first: a machine may be gone before the last
REPLAYS = 30
STOCK = "stock"
POLICIES: dict[str, dict[str, Any]] = {
    "off": {"kind": "exact"},
    "sere S=2": {"kind": "sere", "S": 2},
    "sere S=1": {"kind": "sere", "S": 1},
    "topk 2": {"kind": "topk", "S": 2},
    "oea S=2 share=0.50": {"kind": "oea", "S": 2, "minShare": 0.5},
}
SHARE_LIMIT = 0.05  # of a layer's time at batch 16, that re-routing itself may take
ROWS, COLUMNS, DEPTH = 16, 64, 64  # a tile: slots, output columns, inputs at a time


class Layer:
    """One MoE layer on a device, with buffers for one batch size."""

    def __init__(self, number: int, shape: Shape, batch: int, device: str, weights: tuple[Any, Any]) -> None:
        import torch

        from benchmarks.gpu.bound import gumbel, zipf
        from sere_ext.routing import kernel
        from sere_ext.routing.state import LayerState
        from sere_ext.similarity.file import sorted_neighbours

        source = torch.Generator().manual_seed(1000 * number + batch)
        experts, top_k, hidden = shape.experts, shape.top_k, shape.hidden
        popularity = zipf(experts)[torch.randperm(experts, generator=source)]
        self.shape, self.batch, self.device = shape, batch, device
        self.w13, self.w2 = weights
        self.logits = (popularity + gumbel(torch.empty(batch, experts), source)).to(device)
        slots = batch * top_k
        self.weights, self.ids = (
            torch.empty(batch, top_k, device=device),
            torch.empty(batch, top_k, device=device, dtype=torch.int32),
        )
        self.hidden = torch.zeros(slots, shape.get("moe_intermediate_size"), device=device, dtype=self.w2.dtype)
        self.answers = torch.zeros(slots, hidden, device=device)
        self.state = LayerState(number, experts, top_k, True, kernel.SOFTMAX)
        alike = torch.rand(experts, experts, generator=source)
        self.state.load_similarity(*sorted_neighbours(((alike + alike.T) / 2).fill_diagonal_(1).numpy()))

    def route(self) -> None:
        """The router's own choice: softmax, best k, renormalised."""
        weights, ids = self.logits.softmax(-1).topk(self.shape.top_k, -1)
        self.weights.copy_(weights / weights.sum(-1, keepdim=True))
        self.ids.copy_(ids)

    def reroute(self) -> None:
        """Rewrite the router's choice in place under the policy in force."""
        import torch

        from sere_ext.routing import kernel
        from sere_ext.routing.ops import call_of

        call = call_of(self.weights, self.ids, self.logits)
        if self.device == "cuda":
            kernel.reroute_cuda(self.state.struct, call, torch.cuda.current_stream().cuda_stream)
        else:
            kernel.reroute_cpu(self.state.struct, call)

    def experts(self, x: Any, weights: Any, ids: Any, multiply: Callable[..., None]) -> Any:
        """[B, H]: the sum over slots of weight times the expert's answer. Slots of weight 0 are not computed."""
        import torch

        count = self.shape.experts
        flat = torch.where(weights == 0, count, ids).flatten()
        by_expert, order = flat.sort(stable=True)
        starts = torch.searchsorted(by_expert, torch.arange(count + 1, device=ids.device, dtype=by_expert.dtype)).to(torch.int32)
        multiply(self, x, weights.flatten(), order.to(torch.int32), starts)
        kept = torch.where(weights == 0, 0.0, 1.0)  # what lies in the places of slots that were not computed is of another call
        return (self.answers.view(*ids.shape, -1) * kept[..., None]).sum(1).to(x.dtype)

    def step(self, x: Any, rerouted: bool, multiply: Callable[..., None]) -> Any:
        """One layer as a decode step runs it."""
        self.route()
        if rerouted:
            self.reroute()
        return x + self.experts(x, self.weights, self.ids, multiply)

    def active(self) -> int:
        """Distinct experts that the last step computed."""
        return len(self.ids[self.weights != 0].unique())


def by_triton(layer: Layer, x: Any, weights: Any, order: Any, starts: Any) -> None:
    """The experts' answers, by slot, into `layer.answers`."""
    from benchmarks.gpu.grouped import down, gate_up

    hidden, middle = layer.shape.hidden, layer.shape.get("moe_intermediate_size")
    tile = {"ROWS": ROWS, "COLUMNS": COLUMNS, "DEPTH": DEPTH}
    gate_up[layer.shape.experts, middle // COLUMNS](
        x, layer.w13, layer.hidden, order, starts, K=layer.shape.top_k, H=hidden, M=middle, **tile
    )
    down[layer.shape.experts, hidden // COLUMNS](
        layer.hidden, layer.w2, weights, layer.answers, order, starts, H=hidden, M=middle, **tile
    )


def by_loops(layer: Layer, x: Any, weights: Any, order: Any, starts: Any) -> None:
    """As `by_triton`, expert by expert: what it is compared with, and what runs where there is no Triton."""
    from torch.nn import functional

    middle = layer.shape.get("moe_intermediate_size")
    for expert in range(layer.shape.experts):
        slots = order[starts[expert] : starts[expert + 1]].long()
        made = x[slots // layer.shape.top_k].float() @ layer.w13[expert].float().T
        hidden = (functional.silu(made[:, :middle]) * made[:, middle:]).to(layer.w2.dtype)
        layer.answers[slots] = hidden.float() @ layer.w2[expert].float().T * weights[slots, None]


def agree(layer: Layer, x: Any) -> float:
    """Largest relative difference between Triton and loops, over both kinds of routing; asserts that it is rounding."""
    worst = 0.0
    for rerouted in (False, True):
        layer.route()
        if rerouted:
            layer.reroute()
        ours, loops = (layer.experts(x, layer.weights, layer.ids, form).float() for form in (by_triton, by_loops))
        worst = max(worst, float((ours - loops).abs().max() / loops.abs().max()))
    assert worst < 2e-2, f"Triton and loops differ by {worst:.3g} of the largest answer"
    return worst


def copy_gbps(device: str, size: int) -> float:
    """GB/s that a copy on the device reads and writes together."""
    import torch

    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    taken = timed({"copy": lambda: target.copy_(source)}, device)["copy"]
    return 2 * size / statistics.median(taken) / 1e3


def timed(forms: dict[str, Callable[[], Any]], device: str, replays: int = REPLAYS) -> dict[str, list[float]]:
    """Microseconds of each call of each form; forms take turns."""
    import torch

    taken: dict[str, list[float]] = {name: [] for name in forms}
    for number in range(-3 if device == "cuda" else 0, replays):
        for name, form in forms.items():
            if device == "cuda":
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record()
                form()
                end.record()
                end.synchronize()
                us = 1e3 * begin.elapsed_time(end)
            else:
                began = time.perf_counter()
                form()
                us = 1e6 * (time.perf_counter() - began)
            if number >= 0:  # the first ones warm up
                taken[name].append(us)
    return taken


def captured(step: Callable[[], Any], device: str) -> Callable[[], Any]:
    """The step as a replay of a CUDA graph; on a CPU the step itself."""
    import torch

    if device != "cuda":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class Step:
    """`LAYERS` layers at one batch size, stock and re-routed."""

    def __init__(
        self, shape: Shape, batch: int, device: str, weights: list[tuple[Any, Any]], multiply: Callable[..., None]
    ) -> None:
        import torch

        self.layers = [Layer(number, shape, batch, device, own) for number, own in enumerate(weights)]
        self.x = (torch.randn(batch, shape.hidden, generator=torch.Generator().manual_seed(batch)) / 8).to(
            device, weights[0][0].dtype
        )
        self.mirror = None
        if device == "cuda":
            from sere_ext.routing.cuda import CudaMirror

            self.mirror = CudaMirror([layer.state for layer in self.layers])
            self.mirror.push(similarity=True)
        self.policy(POLICIES["off"])
        self.forms = {rerouted: captured(partial(self.run, rerouted, multiply), device) for rerouted in (False, True)}

    def run(self, rerouted: bool, multiply: Callable[..., None]) -> Any:
        x = self.x
        for layer in self.layers:
            x = layer.step(x, rerouted, multiply)
        return x

    def policy(self, bucket: dict[str, Any]) -> None:
        """Put a policy in force in all layers, as a live change does."""
        from sere_ext.contract.policy import Policy

        table = Policy.parse({"buckets": [{"minTokens": 1, **bucket}]}).table_for(0)
        for layer in self.layers:
            layer.state.load_table(table)
        if self.mirror is not None:
            self.mirror.push(similarity=False)

    def rows(self, batch: int, device: str, replays: int) -> list[dict[str, Any]]:
        """Every arm's time and active experts per layer. All arms but stock replay one graph."""
        taken: dict[str, list[float]] = {name: [] for name in (STOCK, *POLICIES)}
        active: dict[str, float] = {}
        for _ in range(3):  # rounds, so that drift meets all arms
            for name in taken:
                if name != STOCK:
                    self.policy(POLICIES[name])
                taken[name] += timed({name: self.forms[name != STOCK]}, device, replays // 3)[name]
                active[name] = statistics.mean(layer.active() for layer in self.layers)
        layers = len(self.layers)
        return [
            {"batch": batch, "arm": name, "usPerLayer": statistics.median(times) / layers, "active": active[name]}
            for name, times in taken.items()
        ]


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What an active expert costs (a line through all arms of a batch size), and what re-routing itself does."""
    from benchmarks.gpu.bound import fit

    found: dict[str, Any] = {}
    for batch in sorted({row["batch"] for row in rows}):
        of = {row["arm"]: row for row in rows if row["batch"] == batch}
        line = fit([(row["active"], row["usPerLayer"]) for row in of.values()])
        off, stock = of["off"]["usPerLayer"], of[STOCK]["usPerLayer"]
        found[str(batch)] = {
            "usPerActiveExpert": line and line.per_expert,
            "usBeside": line and line.base,
            "r2": line and line.r2,
            "reroutingUs": off - stock,
            "reroutingShare": (off - stock) / off,
            "speedups": {name: stock / row["usPerLayer"] for name, row in of.items()},
        }
    return found


def checks(found: dict[str, Any], gpu: bool) -> list[Check]:
    at = found.get("16", {}) if gpu else {}
    speedups = at.get("speedups", {})
    return [
        at_most(f"re-routing's own share of a layer at batch 16 <= {SHARE_LIMIT:.0%}", at.get("reroutingShare"), SHARE_LIMIT),
        at_least("a layer at batch 16, sere S=2 against stock >= 1.6x", speedups.get("sere S=2"), 1.6, "x"),
        at_least("a layer at batch 16, sere S=1 against stock >= 2.0x", speedups.get("sere S=1"), 2.0, "x"),
    ]


HEAD = ["batch", "arm", "us a layer", "active experts", "stock / arm"]


def lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    stock = {row["batch"]: row["usPerLayer"] for row in rows if row["arm"] == STOCK}
    return [
        [
            str(row["batch"]),
            row["arm"],
            f"{row['usPerLayer']:.1f}",
            f"{row['active']:.1f}",
            f"{stock[row['batch']] / row['usPerLayer']:.2f}x",
        ]
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tiny", action="store_true", help="small dimensions, on a CPU too; its times say nothing")
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--out", type=Path, default=RESULTS / "layer.json")
    args = parser.parse_args()
    import torch

    gpu = torch.cuda.is_available()
    if not gpu and not args.tiny:
        raise SystemExit("no CUDA device: this stage measures a GPU; --tiny tries it without")
    device, shape = ("cuda", QWEN3_30B) if gpu else ("cpu", TINY)
    shape = TINY if args.tiny else shape
    report = Report("layer", args.out)
    try:
        import triton  # noqa: F401

        multiply, form = by_triton, "Triton"
    except ImportError:
        if gpu:
            raise SystemExit("no Triton beside torch; pip install triton") from None
        multiply, form = by_loops, "loops"
    if not gpu and not os.environ.get("TRITON_INTERPRET"):
        multiply, form = by_loops, "loops"
    layers = 2 if args.tiny else LAYERS
    dtype = torch.bfloat16 if gpu else torch.float32
    source = torch.Generator(device).manual_seed(0)
    middle = shape.get("moe_intermediate_size")

    def random(*dimensions: int) -> Any:
        return torch.randn(*dimensions, device=device, dtype=dtype, generator=source) / dimensions[-1] ** 0.5

    weights = [
        (random(shape.experts, 2 * middle, shape.hidden), random(shape.experts, shape.hidden, middle)) for _ in range(layers)
    ]
    report.keep(shape=shape.name, layers=layers, form=form, copyGBps=copy_gbps(device, 1 << (30 if gpu else 20)))
    report.say(f"copy: {report.result['copyGBps']:.0f} GB/s; experts by {form}")
    rows: list[dict[str, Any]] = []
    for batch in args.batch:
        step = Step(shape, batch, device, weights, multiply)
        if multiply is by_triton:
            report.keep(largestDifference=agree(step.layers[0], step.x))
        rows += step.rows(batch, device, 3 if args.tiny else REPLAYS)
        report.keep(rows=rows, summary=summary(rows))
        report.say(f"batch {batch}: {report.result['summary'][str(batch)]}")
        del step
    report.finish(HEAD, lines(rows), checks(report.result["summary"], gpu and not args.tiny))


if __name__ == "__main__":
    main()
