"""Stage 1, on a GPU: does the kernel keep its contract there, and what does it cost? Under 10 minutes.

    python3 -m benchmarks.gpu.kernel [--tiny] [--skip-tests] [--skip-sanitizer] [--out FILE]

First the contract tests (`pytest tests/gpu`), then the time of one call by CUDA graph replay for 128 and 256 experts, k = 8 and
1 to 512 tokens: an empty launch, the stock top-k alone, ours under each policy, and the three-launch form (`three_launch.cu`).
A graph holds `CALLS` calls in a chain, so a time includes the gap between two dependent launches; the empty launch is that gap.
All of them read one layer's tables, which are in the caches by then. In a model the tables of a layer are not: the cold figure is of
a graph that calls `LAYERS` layers in turn with a copy of `COPIED_BYTES` before each call, less a graph of the copies alone.
Forms take turns and times are medians over replays. Then compute-sanitizer over ours, where it is installed.
`--tiny` runs all of it on a CPU, with the CPU kernel and loops in place of graphs, and measures nothing.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.graphs import graph_of, replayed
from benchmarks.gpu.report import RESULTS, Report, at_least, at_most
from tests.kit import ROOT

TOP_K, EXPERTS, TOKENS = 8, (128, 256), tuple(2**n for n in range(10))
CALLS, REPLAYS = 50, 40
LAYERS, COPIED_BYTES = 48, 64 << 20  # more than the L2 cache of an H100 or H200 holds
TINY_EXPERTS, TINY_TOKENS = (16,), (1, 4)
RHO = 0.5
POLICIES: dict[str, dict[str, Any]] = {
    "off": {"kind": "exact"},
    "sere S=1": {"kind": "sere", "S": 1, "rho": RHO},
    "sere S=2": {"kind": "sere", "S": 2, "rho": RHO},
    "topk 2": {"kind": "topk", "S": 2},
    "oea k0=2": {"kind": "oea", "S": 2},
}
HEADLINE = "sere S=2"  # the policy of the targets; the three-launch form does the same
LIMIT_US, TIMES_FASTER, AT_TOKENS = 3.0, 5.0, 256
SANITIZER_TOOLS = ("memcheck", "racecheck")


class Case:
    """One call on the device, in every form, and the layers whose tables it may read.

    Args:
        library: the other forms (`three_launch.load`); None for ours alone.
        device: torch device type, `cuda` or `cpu`.
        layers: how many layers have tables of their own.
    """

    def __init__(self, library: Any, experts: int, tokens: int, device: str = "cuda", layers: int = 1) -> None:
        import torch

        from sere_ext.routing import kernel
        from sere_ext.routing.state import LayerState
        from sere_ext.similarity.file import sorted_neighbours

        source = torch.Generator().manual_seed(experts * 1000 + tokens)
        self.logits = torch.randn(tokens, experts, generator=source).to(device)
        weights, ids = self.logits.softmax(-1).topk(TOP_K, -1)  # by falling weight, as the three-launch form needs
        self.weights, self.ids = (weights / weights.sum(-1, keepdim=True)).contiguous(), ids.to(torch.int32).contiguous()
        self.wide_ids = ids.contiguous()
        alike = torch.rand(experts, experts, generator=source)
        self.similarity = ((alike + alike.T) / 2).fill_diagonal_(1).to(device)
        self.out_weights, self.out_ids = self.weights.clone(), self.ids.clone()  # rewritten in place
        self.primary, self.wide_out = torch.empty(experts, dtype=torch.int64, device=device), torch.empty_like(self.wide_ids)
        self.layers = [LayerState(number, experts, TOP_K, True, kernel.SOFTMAX) for number in range(layers)]
        neighbours = sorted_neighbours(self.similarity.cpu().numpy())
        for layer in self.layers:
            layer.load_similarity(*neighbours)
        self.mirror = None
        if device == "cuda":
            from sere_ext.routing.cuda import CudaMirror

            self.mirror = CudaMirror(self.layers)
            self.mirror.push(similarity=True)
        self.library, self.experts, self.tokens = library, experts, tokens

    def policy(self, bucket: dict[str, Any]) -> None:
        from sere_ext.contract.policy import Policy

        for layer in self.layers:
            layer.load_table(Policy.parse({"buckets": [{"minTokens": 1, **bucket}]}).table_for(layer.number))
        if self.mirror is not None:
            self.mirror.push(similarity=False)

    def ours(self, layer: int = 0) -> None:
        import torch

        from sere_ext.routing import kernel
        from sere_ext.routing.ops import call_of

        call = call_of(self.out_weights, self.out_ids, self.logits)
        if self.mirror is None:
            kernel.reroute_cpu(self.layers[layer].struct, call)
        else:
            kernel.reroute_cuda(self.layers[layer].struct, call, torch.cuda.current_stream().cuda_stream)

    def three(self) -> None:
        import torch

        code = self.library.three_launch(
            self.wide_ids.data_ptr(), self.primary.data_ptr(), self.similarity.data_ptr(), self.wide_out.data_ptr(),
            self.tokens, TOP_K, POLICIES[HEADLINE]["S"], self.experts, RHO, torch.cuda.current_stream().cuda_stream,
        )  # fmt: skip
        assert code == 0, f"three_launch: CUDA error {code}"

    def empty(self) -> None:
        import torch

        self.library.empty_launch(torch.cuda.current_stream().cuda_stream)

    def top_k(self) -> tuple[str, Callable[[], Any]]:
        """vLLM's operator if vLLM is there, else torch's two; and which it is."""
        import torch

        plain = "torch softmax + topk", lambda: self.logits.softmax(-1).topk(TOP_K, -1)
        if self.mirror is None:
            return plain
        try:
            from vllm._custom_ops import topk_softmax
        except ImportError:
            return plain
        weights, ids, source = torch.empty_like(self.weights), torch.empty_like(self.ids), torch.empty_like(self.ids)
        return "vLLM topk_softmax", lambda: topk_softmax(weights, ids, source, self.logits, True)

    def agree(self) -> None:
        """Both forms send every slot to the same expert: ours merges, so it is asked for each token's weight per expert."""
        import torch

        self.policy(POLICIES[HEADLINE])
        self.out_weights.copy_(self.weights)
        self.out_ids.copy_(self.ids)
        self.ours()
        self.three()
        torch.cuda.synchronize()
        dense = [
            torch.zeros(self.tokens, self.experts, device="cuda").scatter_add_(1, ids.long(), weights)
            for ids, weights in ((self.out_ids, self.out_weights), (self.wide_out, self.weights))
        ]
        worst = (dense[0] - dense[1]).abs().max().item()
        assert worst < 1e-5, f"{self.experts} experts, {self.tokens} tokens: the two forms differ by {worst}"


def row(
    library: Any, experts: int, tokens: int, device: str = "cuda", calls: int = CALLS, replays: int = REPLAYS
) -> dict[str, Any]:
    """Medians of every form at one size, and how many launches each is. Without a library ours and top-k alone."""
    case = Case(library, experts, tokens, device)
    top_k_form, top_k = case.top_k()
    forms: dict[str, Callable[[], Any]] = {"topk": top_k, "ours": case.ours}
    if library is not None:
        case.agree()
        forms |= {"empty": case.empty, "three": case.three}
    graphs = {name: graph_of(form, calls, device) for name, form in forms.items()}
    launches = {name: library.graph_nodes(graph.raw_cuda_graph()) / calls for name, graph in graphs.items()} if library else {}
    for graph in graphs.values():
        graph.instantiate()
    times = replayed({name: graph for name, graph in graphs.items() if name != "ours"}, calls, replays, device)
    ours = {}
    for name, bucket in POLICIES.items():
        case.policy(bucket)
        ours[name] = replayed({"ours": graphs["ours"]}, calls, replays, device)["ours"]
    three = times.get("three")
    return {
        "experts": experts, "tokens": tokens, "topK": TOP_K, "topkForm": top_k_form, "emptyUs": times.get("empty"),
        "topkUs": times["topk"], "threeUs": three, "oursUs": ours, "launches": launches,
        "timesFaster": three and three / ours[HEADLINE],
    }  # fmt: skip


def cold(
    experts: int,
    tokens: int,
    device: str = "cuda",
    layers: int = LAYERS,
    copied_bytes: int = COPIED_BYTES,
    replays: int = REPLAYS,
) -> dict[str, float]:
    """Microseconds per call of each policy where every call reads the tables of another layer, which no cache holds any more."""
    import torch

    case = Case(None, experts, tokens, device, layers)
    source = torch.empty(copied_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    turns = {name: itertools.cycle(range(layers)) for name in ("both", "copies")}

    def both() -> None:
        target.copy_(source)
        case.ours(next(turns["both"]))

    graphs = {"both": graph_of(both, layers, device), "copies": graph_of(lambda: target.copy_(source), layers, device)}
    for graph in graphs.values():
        graph.instantiate()
    found = {}
    for name, bucket in POLICIES.items():
        case.policy(bucket)
        times = replayed(graphs, layers, replays, device)
        found[name] = times["both"] - times["copies"]
    return found


def contract() -> dict[str, Any]:
    """`pytest tests/gpu`: whether it passed and its last line."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-c",
        os.devnull,
        "--rootdir=.",
        "tests/gpu",
        "-q",
        "-p",
        "no:cacheprovider",
    ]  # any pytest will do
    path = os.pathsep.join([str(ROOT / "sere_ext"), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False, timeout=240
        )
    except subprocess.TimeoutExpired:
        return {"passed": None, "says": "not finished in 240 s", "tail": []}
    lines = (done.stdout + done.stderr).strip().splitlines()
    return {"passed": done.returncode == 0, "says": lines[-1] if lines else "", "tail": lines[-60:] if done.returncode else []}


def sanitized(seconds: float = 90) -> dict[str, str]:
    """Per tool of compute-sanitizer what it found in one call of ours under each policy; empty where it is not installed."""
    program = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    found: dict[str, str] = {}
    for tool in SANITIZER_TOOLS if program else ():
        command = [str(program), "--tool", tool, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.gpu.kernel", "--once"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds)
        except subprocess.TimeoutExpired:
            found[tool] = f"not finished in {seconds:.0f} s"
            continue
        lines = (done.stdout + done.stderr).strip().splitlines()
        found[tool] = "clean" if done.returncode == 0 else f"rc {done.returncode}: {lines[-1] if lines else ''}"
    return found


def once() -> None:
    """Every policy on a few sizes, once; what compute-sanitizer watches."""
    import torch

    for experts, tokens in itertools.product(EXPERTS, (1, 7, 512)):
        case = Case(None, experts, tokens)  # ours alone: the form of three launches is not what is checked
        for bucket in POLICIES.values():
            case.policy(bucket)
            case.ours()
            torch.cuda.synchronize()


def _library(folder: Path) -> Any:
    from benchmarks.gpu import three_launch

    return three_launch.load(three_launch.compiled(folder))


def lines(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The table's rows."""
    return [
        [
            str(row["experts"]), str(row["tokens"]), _figure(row["emptyUs"]), _figure(row["topkUs"]),
            *(_figure(row["oursUs"][name]) for name in POLICIES), _figure(row.get("coldUs", {}).get(HEADLINE)),
            _figure(row["threeUs"]), _figure(row["timesFaster"]),
        ]
        for row in rows
    ]  # fmt: skip


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


HEAD = [
    "experts", "tokens", "empty us", "top-k us", *(f"{name} us" for name in POLICIES), f"cold {HEADLINE} us", "three launches us",
    "times faster",
]  # fmt: skip


def checks(rows: list[dict[str, Any]], tests: dict[str, Any] | None, tools: dict[str, str]) -> list[Any]:
    """The targets of the design."""
    at = [row for row in rows if row["tokens"] == AT_TOKENS and row["experts"] == EXPERTS[0]]
    one = at[0] if at else None
    where = f"{EXPERTS[0]} experts, {AT_TOKENS} tokens, {HEADLINE}"
    ended = [said for said in tools.values() if not said.startswith("not finished")]
    found = float(sum(said != "clean" for said in ended)) if ended else None
    failed = None if tests is None or tests["passed"] is None else float(not tests["passed"])
    return [
        at_most("contract tests that fail", failed, 0),
        at_most(f"launches added per layer ({where})", one["launches"]["ours"] if one else None, 1),
        at_most(f"time of a call ({where}) <= {LIMIT_US:g} us", one["oursUs"][HEADLINE] if one else None, LIMIT_US, " us"),
        at_least(
            f"faster than three launches ({where}) >= {TIMES_FASTER:g}x", one["timesFaster"] if one else None, TIMES_FASTER, "x"
        ),
        at_most("compute-sanitizer tools that found something", found, 0),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tiny", action="store_true", help="small sizes and the CPU kernel; its times say nothing")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--skip-sanitizer", action="store_true")
    parser.add_argument("--once", action="store_true", help="one call of each kind and no timing; for compute-sanitizer")
    parser.add_argument("--out", type=Path, default=RESULTS / "kernel.json")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available() and not args.tiny:
        raise SystemExit("no CUDA device: this stage measures a GPU; --tiny tries it without")
    if args.once:
        return once()
    report = Report("kernel", args.out)
    tests = None if args.skip_tests or args.tiny else contract()
    report.say(f"contract tests: {tests and tests['says']}")
    report.keep(contract=tests)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        library = None if args.tiny else _library(Path(folder))
        for experts, tokens in itertools.product(*((TINY_EXPERTS, TINY_TOKENS) if args.tiny else (EXPERTS, TOKENS))):
            if args.tiny:
                found = row(None, experts, tokens, "cpu", calls=3, replays=2)
                found["coldUs"] = cold(experts, tokens, "cpu", layers=4, copied_bytes=1 << 10, replays=2)
            else:
                found = row(library, experts, tokens)
                found["coldUs"] = cold(experts, tokens)
            rows.append(found)
            report.say(f"{found}")
            report.keep(rows=rows)
    tools = {} if args.skip_sanitizer or args.tiny else sanitized()
    report.say(f"compute-sanitizer: {tools or 'not run'}")
    report.keep(sanitizer=tools)
    report.finish(HEAD, lines(rows), checks(rows, tests, tools))


if __name__ == "__main__":
    main()
