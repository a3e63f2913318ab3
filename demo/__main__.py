"""`python -m demo`: tune the small widened model on the local engine, then roll the certified policy out on a cluster.

Stage 1 (the engine): widen the committed model, calibrate, `sere tune`.
Stage 2 (the cluster): where Kubernetes binaries are found a one-node cluster, or with --kubeconfig one of the user's,
`helm install`, a SereDeployment, and the profile of stage 1 for it; with --tune-in-cluster the operator tunes there anew.
Everything that is printed as a figure was measured in this run; it ends with build/demo.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from demo import preflight, processes
from demo.figures import CONCURRENCY, result, show
from demo.screen import console
from demo.watch import Watch
from tests.assets.make.models import ROWS_MOE

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "demo"
CALIBRATION_ITEMS = 400
# Ten minutes pay for a certificate and a trial, not for a search of all kinds: that of `make bench-policies` is on the model's
# page (docs/policies.md), and the demo takes what that page finds best. With --search it finds a policy by itself.
MIN_SHARE = (0.0,)  # 0.5 costs 0.59 points (docs/policies.md), which 1,000 items certify three times in ten at most
SEARCH_ITEMS = 96
ONE_POLICY: dict[str, Any] = {
    "policies": ["oea"], "sValues": [2], "trials": 2, "rungs": 1, "deviceHours": 0.25, "itemsPerTrial": 64,
}  # fmt: skip
WIDE: dict[str, Any] = {"policies": ["oea", "topk", "sere"], "trials": 16, "rungs": 2, "deviceHours": 1, "itemsPerTrial": 128}
WIDE_SEARCH_ITEMS, WIDE_ITEMS = 256, 2000
ITEMS, PAIRS = 1000, 4  # of the certificate; pairs of blocks
TUNE_MINUTES, WIDE_MINUTES, CLUSTER_MINUTES = 8, 25, 2  # on two quiet cores
# Helm uninstall and the end of a namespace, both within their own limits; or the end of a node and of its folder, of a gigabyte.
TAKE_DOWN_S = 420


def run(*command: str | Path, check: bool = True, patience_s: float = 20, watch: Watch | None = None) -> int:
    """Run a command in the foreground in its own process group; Ctrl-C ends the group and then this program.

    Args:
        patience_s: how long the group may take to end after Ctrl-C; a second one ends it at once.
        watch: shows what the command prints; without it the command prints by itself.
    """
    console.print("[dim]$ " + " ".join(str(part).replace(f"{ROOT}/", "") for part in command) + "[/dim]")
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True} if watch else {}
    process = subprocess.Popen([str(part) for part in command], cwd=ROOT, start_new_session=True, **pipes)
    try:
        status = watch.follow(process) if watch else process.wait()
    except BaseException:
        console.print("[dim]stopping what was started; Ctrl-C once more ends it at once[/dim]")
        processes.end(process, patience_s)
        raise
    if check and status:
        raise SystemExit(status)
    return status


def heading(text: str) -> None:
    console.print(f"\n[bold]{text}[/bold]")


def make_items(split: str, count: int, out: Path) -> None:
    """Write items of a split of the model's tasks; the same count gives the same items."""
    options = ("--model", ROWS_MOE.name, "--split", split, "--count", str(count), "--seed", "1", "--out", out)
    run(sys.executable, "-m", "tests.assets.make.items", *options)


def calibrate() -> None:
    """Make the widened model's similarity file from the small model, whose calibration takes seconds; once."""
    if (BUILD / "similarity.safetensors").exists():
        return
    make_items("calibration", CALIBRATION_ITEMS, BUILD / "calib.jsonl")
    narrow = BUILD / "narrow.safetensors"
    run("sere", "calibrate", ROWS_MOE.directory, "--data", BUILD / "calib.jsonl", "--out", narrow)
    run(sys.executable, "-m", "tests.assets.make.widen_similarity", narrow, BUILD / "model", BUILD / "similarity.safetensors")


def prepare(args: argparse.Namespace) -> Path:
    """The widened model, its items, its similarity file where the search needs one, and the tuning file. Returns the tuning file's path."""
    BUILD.mkdir(parents=True, exist_ok=True)
    model = BUILD / "model"
    if not (model / "model.safetensors").exists():
        run(sys.executable, "-m", "tests.assets.make.widen", ROWS_MOE.directory, model)
    search, searched, certified = (WIDE, WIDE_SEARCH_ITEMS, WIDE_ITEMS) if args.search else (ONE_POLICY, SEARCH_ITEMS, ITEMS)
    make_items("eval", searched + certified, BUILD / "items.jsonl")
    if args.search:
        calibrate()
    slo = {"tpotMs": {"p95": args.tpot_p95_ms}, "ttftMs": {"p99": 5000}}
    tuning = {
        "model": str(model),
        "engine": {"maxModelLen": 128, "extraArgs": list(ROWS_MOE.engine_arguments)},
        **({"similarity": str(BUILD / "similarity.safetensors")} if args.search else {}),
        "workload": {"load": {"concurrency": [CONCURRENCY]}},
        "slo": slo,
        "accuracy": {
            "maxDropPoints": args.max_drop_points,
            "confidence": 0.95,
            "searchItems": searched,
            "tasks": [{"file": str(BUILD / "items.jsonl"), "metric": "exact", "maxTokens": ROWS_MOE.longest_answer}],
        },
        "search": {**search, "minShare": list(MIN_SHARE)},
        # A request lasts two seconds here, so that 15 of them (the default) would make blocks of half a minute at least.
        "certify": {"pairs": PAIRS, "blockSeconds": 8, "blockResidences": 4},
        "out": str(BUILD / "run"),
    }
    path = BUILD / "tuning.yaml"
    path.write_text(yaml.safe_dump(tuning, sort_keys=False))
    return path


def stage_engine(args: argparse.Namespace) -> dict[str, Any]:
    """Calibrate and tune; returns the profile's spec. Ends the program with the tuner's exit code if it chose nothing."""
    minutes = WIDE_MINUTES if args.search else TUNE_MINUTES
    heading(f"1/2  Tune: a real MoE model on a live vLLM engine, about {minutes} minutes on two quiet cores")
    console.print(
        "The model has 64 experts, 8 of them for a token, and was trained in this repository to work out rows of digits, which are the "
        "questions. Its experts are widened (each neuron repeated, the same function) until reading weights is most of a step's time, as in large models."
    )
    tuning = prepare(args)
    if args.fresh:
        import shutil

        shutil.rmtree(BUILD / "run", ignore_errors=True)
    # --fresh forgets the ledger of opened items with the run: a demonstration's items are nobody's evidence.
    os.environ["XDG_STATE_HOME"] = str(BUILD / "run" / "state")
    run_folder = BUILD / "run"
    console.print(f"[dim]logs and the study: {run_folder.relative_to(ROOT)}; Ctrl-C stops and leaves nothing running[/dim]")
    watch = Watch(console, run_folder / "study.journal", ROWS_MOE.experts, minutes + (0 if args.no_cluster else CLUSTER_MINUTES))
    status = run("sere", "tune", "-f", tuning, check=False, watch=watch)
    if status:
        report = BUILD / "run" / "report.html"
        where = f" The report is {report.relative_to(ROOT)}." if report.exists() else ""
        console.print(f"\nNothing was chosen (exit code {status}); exact routing stays.{where}")
        raise SystemExit(status)
    spec: dict[str, Any] = json.loads((BUILD / "run" / "profile.json").read_text())["spec"]
    return spec


def stage_cluster(args: argparse.Namespace) -> tuple[dict[str, Any] | None, str]:
    """The rollout's figures, or None and one sentence on why no cluster could run."""
    heading(
        f"2/2  Roll out: {args.kubeconfig or 'a one-node Kubernetes cluster'}, the operator, a SereDeployment, about {CLUSTER_MINUTES} minutes"
    )
    if args.no_cluster:
        return None, "left out with --no-cluster"
    console.print("[dim]logs after a failure: build/demo/cluster; Ctrl-C removes the cluster, or what was made in yours[/dim]")
    out = BUILD / "rollout.json"
    out.unlink(missing_ok=True)
    tune = ("--tune",) if args.tune_in_cluster else ()
    if args.kubeconfig:
        status = run(sys.executable, "-m", "demo.cluster", out, *tune, check=False, patience_s=TAKE_DOWN_S)
    else:
        for probe in ("assets", "node-packages"):
            found = subprocess.run([ROOT / "tests" / "kit" / probe], capture_output=True, text=True, cwd=ROOT, check=False)
            if found.returncode:
                return None, found.stdout.strip() or found.stderr.strip()
        status = run(ROOT / "demo" / "cluster", out, *tune, check=False, patience_s=TAKE_DOWN_S)
    if status or not out.exists():
        console.print(f"The cluster stage failed (exit code {status}); its logs are in build/demo/cluster.")
        raise SystemExit(status or 1)
    return json.loads(out.read_text()), ""


def arguments(given: list[str]) -> argparse.Namespace:
    """The command line; what cannot go together is refused."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--max-drop-points", type=float, default=1.0, help="accuracy budget of stage 1 in points")
    parser.add_argument("--tpot-p95-ms", type=float, default=200.0, help="latency limit of stage 1 in ms")
    parser.add_argument(
        "--search", action="store_true",
        help=f"stage 1 searches the kinds {', '.join(WIDE['policies'])} at every S in {WIDE['trials']} trials, about {WIDE_MINUTES} minutes, in place of trying one policy",
    )  # fmt: skip
    parser.add_argument(
        "--kubeconfig",
        metavar="FILE",
        default=os.environ.get("SERE_KUBECONFIG") or None,
        help="stage 2 on the cluster of its current context, in a namespace of its own that is removed at the end",
    )
    parser.add_argument(
        "--images",
        metavar="PREFIX[:TAG]",
        default=os.environ.get("SERE_IMAGES") or None,
        help="with --kubeconfig: that cluster pulls PREFIX/sere-operator:TAG and PREFIX/sere-engine:TAG; TAG is dev unless given",
    )
    parser.add_argument(
        "--tune-in-cluster",
        action="store_true",
        help="stage 2 tunes in the cluster, some 12 minutes more, in place of rolling out what stage 1 certified",
    )
    parser.add_argument("--no-cluster", action="store_true", help="stage 1 alone")
    parser.add_argument("--resume", dest="fresh", action="store_false", help="go on with an earlier run's study")
    args = parser.parse_args(given)
    if args.images and not args.kubeconfig:
        parser.error("--images goes with --kubeconfig: the cluster that the demo starts itself gets images of this tree")
    if args.kubeconfig:
        args.kubeconfig = str(Path(args.kubeconfig).expanduser().absolute())
    return args


def main() -> None:
    args = arguments(sys.argv[1:])
    if args.kubeconfig and not args.no_cluster:
        os.environ.update(SERE_KUBECONFIG=args.kubeconfig, SERE_IMAGES=args.images or "")
        try:  # before the minutes of stage 1
            preflight.check(args.kubeconfig, args.images or "")
        except preflight.RefusedError as error:
            console.print(str(error), soft_wrap=True)
            raise SystemExit(2) from None
    from benchmarks.ground import machine

    began, ground = time.monotonic(), machine()
    spec = stage_engine(args)
    tuned = time.monotonic()
    rollout, why_not = stage_cluster(args)
    seconds = {"tune": round(tuned - began), "cluster": round(time.monotonic() - tuned)}
    summary = json.loads((BUILD / "run" / "summary.json").read_text())
    answer = result(spec, summary, rollout, why_not, seconds, ground)
    (ROOT / "build" / "demo.json").write_text(json.dumps(answer, indent=2) + "\n")
    heading(f"Done in {(time.monotonic() - began) / 60:.1f} minutes")
    show(answer, [spec["evidence"].get("speedupMean"), spec["evidence"]["speedup"]], BUILD / "run" / "report.html")


if __name__ == "__main__":
    # Ctrl-C and a plain kill end the same way: children first, then this program. A shell starts a program in the background with
    # Ctrl-C ignored, and what it starts would ignore it too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    try:
        main()
    except KeyboardInterrupt:
        console.print(
            "\nStopped; nothing is left running here. `make demo` starts again, and ARGS=--resume goes on with what was measured."
        )
        sys.exit(130)
