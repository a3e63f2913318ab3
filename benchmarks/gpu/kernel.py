"""Stage 1, on a GPU: does the kernel keep its contract there, and what does it cost? Under 10 minutes.

    python -m benchmarks.gpu.kernel [--skip-tests] [--skip-sanitizer] [--out FILE]

First the contract tests (`pytest tests/gpu`), then the time of one call by CUDA graph replay for 128 and 256 experts, k = 8 and
1 to 512 tokens: an empty launch, the stock top-k alone, ours under each policy, and the three-launch form (`three_launch.cu`).
A graph holds `CALLS` calls in a chain, so a time includes the gap between two dependent launches; the empty launch is that gap.
Forms take turns and times are medians over replays. Then compute-sanitizer over ours, where it is installed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import RESULTS, Report, at_least, at_most
from tests.kit import ROOT

TOP_K, EXPERTS, TOKENS = 8, (128, 256), tuple(2**n for n in range(10))
CALLS, REPLAYS = 50, 40
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
    """One layer's call on the device, in every form."""

    def __init__(self, library: Any, experts: int, tokens: int) -> None:
        import torch

        from sere_ext.routing import kernel
        from sere_ext.routing.cuda import CudaMirror
        from sere_ext.routing.state import LayerState
        from sere_ext.similarity.file import sorted_neighbours

        source = torch.Generator().manual_seed(experts * 1000 + tokens)
        self.logits = torch.randn(tokens, experts, generator=source).cuda()
        weights, ids = self.logits.softmax(-1).topk(TOP_K, -1)  # by falling weight, as the three-launch form needs
        self.weights, self.ids = (weights / weights.sum(-1, keepdim=True)).contiguous(), ids.to(torch.int32).contiguous()
        self.wide_ids = ids.contiguous()
        alike = torch.rand(experts, experts, generator=source)
        self.similarity = ((alike + alike.T) / 2).fill_diagonal_(1).cuda()
        self.out_weights, self.out_ids = self.weights.clone(), self.ids.clone()  # rewritten in place
        self.primary, self.wide_out = torch.empty(experts, dtype=torch.int64, device="cuda"), torch.empty_like(self.wide_ids)
        self.layer = LayerState(0, experts, TOP_K, True, kernel.SOFTMAX)
        self.layer.load_similarity(*sorted_neighbours(self.similarity.cpu().numpy()))
        self.mirror = CudaMirror([self.layer])
        self.mirror.push(similarity=True)
        self.library, self.experts, self.tokens = library, experts, tokens

    def policy(self, bucket: dict[str, Any]) -> None:
        from sere_ext.contract.policy import Policy

        self.layer.load_table(Policy.parse({"buckets": [{"minTokens": 1, **bucket}]}).table_for(0))
        self.mirror.push(similarity=False)

    def ours(self) -> None:
        import torch

        from sere_ext.routing import kernel
        from sere_ext.routing.ops import call_of

        call = call_of(self.out_weights, self.out_ids, self.logits)
        kernel.reroute_cuda(self.layer.struct, call, torch.cuda.current_stream().cuda_stream)

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

        try:
            from vllm._custom_ops import topk_softmax
        except ImportError:
            return "torch softmax + topk", lambda: self.logits.softmax(-1).topk(TOP_K, -1)
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


def graph_of(form: Callable[[], Any], calls: int) -> Any:
    """A captured graph of so many calls in a chain."""
    import torch

    for _ in range(3):
        form()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph):
        for _ in range(calls):
            form()
    return graph


def replayed(graphs: dict[str, Any], replays: int = REPLAYS) -> dict[str, list[float]]:
    """Microseconds per call of each graph's replays, which take turns."""
    import torch

    taken: dict[str, list[float]] = {name: [] for name in graphs}
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for number in range(-3, replays):
        for name, graph in graphs.items():
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            if number >= 0:  # the first ones warm up
                taken[name].append(1e3 * begin.elapsed_time(end) / CALLS)
    return taken


def row(library: Any, experts: int, tokens: int) -> dict[str, Any]:
    """Medians of every form at one size, and how many launches each is."""
    case = Case(library, experts, tokens)
    case.agree()
    top_k_form, top_k = case.top_k()
    forms: dict[str, Callable[[], Any]] = {"empty": case.empty, "topk": top_k, "three": case.three, "ours": case.ours}
    graphs = {name: graph_of(form, CALLS) for name, form in forms.items()}
    launches = {name: library.graph_nodes(graph.raw_cuda_graph()) / CALLS for name, graph in graphs.items()}
    for graph in graphs.values():
        graph.instantiate()
    times = {name: statistics.median(taken) for name, taken in replayed({n: g for n, g in graphs.items() if n != "ours"}).items()}
    ours = {}
    for name, bucket in POLICIES.items():
        case.policy(bucket)
        ours[name] = statistics.median(replayed({"ours": graphs["ours"]})["ours"])
    return {
        "experts": experts, "tokens": tokens, "topK": TOP_K, "topkForm": top_k_form, "emptyUs": times["empty"],
        "topkUs": times["topk"], "threeUs": times["three"], "oursUs": ours, "launches": launches,
        "timesFaster": times["three"] / ours[HEADLINE],
    }  # fmt: skip


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
            str(row["experts"]), str(row["tokens"]), f"{row['emptyUs']:.2f}", f"{row['topkUs']:.2f}",
            *(f"{row['oursUs'][name]:.2f}" for name in POLICIES), f"{row['threeUs']:.2f}", f"{row['timesFaster']:.2f}",
        ]
        for row in rows
    ]  # fmt: skip


HEAD = ["experts", "tokens", "empty us", "top-k us", *(f"{name} us" for name in POLICIES), "three launches us", "times faster"]


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
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--skip-sanitizer", action="store_true")
    parser.add_argument("--once", action="store_true", help="one call of each kind and no timing; for compute-sanitizer")
    parser.add_argument("--out", type=Path, default=RESULTS / "kernel.json")
    args = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: this stage measures a GPU and has nothing to run here")
    if args.once:
        return once()
    report = Report("kernel", args.out)
    tests = None if args.skip_tests else contract()
    report.say(f"contract tests: {tests and tests['says']}")
    report.keep(contract=tests)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        library = _library(Path(folder))
        for experts, tokens in itertools.product(EXPERTS, TOKENS):
            rows.append(row(library, experts, tokens))
            report.say(f"{rows[-1]}")
            report.keep(rows=rows)
    tools = {} if args.skip_sanitizer else sanitized()
    report.say(f"compute-sanitizer: {tools or 'not run'}")
    report.keep(sanitizer=tools)
    report.finish(HEAD, lines(rows), checks(rows, tests, tools))


if __name__ == "__main__":
    main()
