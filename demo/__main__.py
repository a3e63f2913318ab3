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
from rich.table import Table

from demo import preflight
from demo.screen import console
from demo.watch import Watch
from tests.assets.make.models import ROWS_MOE

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "demo"
CALIBRATION_ITEMS = 400
# Ten minutes pay for a certificate and a trial, not for a search of all kinds: that of `make bench-policies` is on the model's
# page (docs/policies.md), and the demo takes what that page finds best.
POLICIES = "oea"
S_VALUES = (2.0,)
MIN_SHARE = (0.0,)  # 0.5 costs about as much as the limit, which 1,000 items cannot tell
SEARCH_ITEMS = 160
PAIRS = 4  # of blocks
CONCURRENCY = 16
TUNE_MINUTES, CLUSTER_MINUTES = 7, 3  # on two quiet cores
MINUTES = TUNE_MINUTES + CLUSTER_MINUTES
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
        for number, wait_s in ((signal.SIGINT, patience_s), (signal.SIGTERM, 10), (signal.SIGKILL, 5)):
            try:
                os.killpg(process.pid, number)
                process.wait(wait_s)
                break
            except (ProcessLookupError, subprocess.TimeoutExpired, KeyboardInterrupt):
                continue
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


def needs_similarity(args: argparse.Namespace) -> bool:
    return "sere" in args.policies.split(",")


def calibrate() -> None:
    """Make the widened model's similarity file from the small model, whose calibration takes seconds; once."""
    if (BUILD / "similarity.safetensors").exists():
        return
    make_items("calibration", CALIBRATION_ITEMS, BUILD / "calib.jsonl")
    narrow = BUILD / "narrow.safetensors"
    run("sere", "calibrate", ROWS_MOE.directory, "--data", BUILD / "calib.jsonl", "--out", narrow)
    run(sys.executable, "-m", "tests.assets.make.widen_similarity", narrow, BUILD / "model", BUILD / "similarity.safetensors")


def prepare(args: argparse.Namespace) -> Path:
    """The widened model, its items, and the tuning file. Returns the tuning file's path."""
    BUILD.mkdir(parents=True, exist_ok=True)
    model = BUILD / "model"
    if not (model / "model.safetensors").exists():
        run(sys.executable, "-m", "tests.assets.make.widen", ROWS_MOE.directory, model)
    make_items("eval", args.items, BUILD / "items.jsonl")
    slo = {"tpotMs": {"p95": args.tpot_p95_ms}, "ttftMs": {"p99": 5000}}
    tuning = {
        "model": str(model),
        "engine": {"maxModelLen": 128, "extraArgs": list(ROWS_MOE.engine_arguments)},
        **({"similarity": str(BUILD / "similarity.safetensors")} if needs_similarity(args) else {}),
        "workload": {"load": {"concurrency": [CONCURRENCY]}},
        "slo": slo,
        "accuracy": {
            "maxDropPoints": args.max_drop_points,
            "confidence": 0.95,
            "searchItems": SEARCH_ITEMS,
            "tasks": [{"file": str(BUILD / "items.jsonl"), "metric": "exact", "maxTokens": ROWS_MOE.longest_answer}],
        },
        "search": {
            "policies": args.policies.split(","),
            "sValues": list(S_VALUES),
            "minShare": list(MIN_SHARE),
            "trials": args.trials,
            "rungs": 1,
            "deviceHours": 0.25,
            "itemsPerTrial": 96,
        },
        # A request lasts two seconds here, so that 15 of them (the default) would make blocks of half a minute at least.
        "certify": {"pairs": PAIRS, "blockSeconds": 8, "blockResidences": 4},
        "out": str(BUILD / "run"),
    }
    path = BUILD / "tuning.yaml"
    path.write_text(yaml.safe_dump(tuning, sort_keys=False))
    return path


def stage_engine(args: argparse.Namespace) -> dict[str, Any]:
    """Calibrate and tune; returns the profile's spec. Ends the program with the tuner's exit code if it chose nothing."""
    heading(f"1/2  Tune: a real MoE model on a live vLLM engine, about {TUNE_MINUTES} minutes on two quiet cores")
    tuning = prepare(args)
    if needs_similarity(args):
        calibrate()
    if args.fresh:
        import shutil

        shutil.rmtree(BUILD / "run", ignore_errors=True)
    # --fresh forgets the ledger of opened items with the run: a demonstration's items are nobody's evidence.
    os.environ["XDG_STATE_HOME"] = str(BUILD / "run" / "state")
    run_folder = BUILD / "run"
    console.print(f"[dim]logs and the study: {run_folder.relative_to(ROOT)}; Ctrl-C stops and leaves nothing running[/dim]")
    watch = Watch(console, run_folder / "study.journal", ROWS_MOE.experts, TUNE_MINUTES if args.no_cluster else MINUTES)
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


def answers_per_minute(summary: dict[str, Any]) -> dict[str, float]:
    """Answers that the certificate's blocks finished per minute: so many requests are always in flight, each for its mean time."""
    latency = summary["ladder"][summary["chosen"] - 1]["result"]["latency_ms"]
    return {
        name: 60_000 * CONCURRENCY / latency[routing]["e2el"]["mean"]
        for name, routing in (("exact", "exact"), ("tuned", "chosen"))
    }


def most_load(found: dict[str, Any] | None) -> dict[str, Any]:
    """What the closing bisection measured, or the sentence that says why it measured nothing."""
    if not found or found["ratio"] is None:
        return {"why_not": found["sentence"] if found else "was not asked for"}
    return {
        "requests": {"exact": found["tuned"], "tuned": found["load"]},
        "at_least": found["at_least"],
        "times": found["times"],
        "tpot_ms": {"exact": found["tpot_ms"]["exact"], "tuned": found["tpot_ms"]["chosen"]},
        "ratio": found["ratio"],
    }


def result(
    spec: dict[str, Any], summary: dict[str, Any], rollout: dict[str, Any] | None, why_not: str, seconds: dict[str, int]
) -> dict[str, Any]:
    """The content of build/demo.json.

    Args:
        spec: of the profile.
        summary: what the tuner wrote beside it.
        seconds: of each stage.
    """
    evidence = spec["evidence"]
    accuracy = evidence["accuracy"]

    def pair(value: dict[str, float] | None) -> dict[str, float] | None:
        return {"exact": value["exact"], "tuned": value["chosen"]} if value else None

    answer: dict[str, Any] = {
        "tpot_ms": pair(evidence["tpotMeanMs"]),
        "accuracy": {
            "exact": accuracy["exact"],
            "tuned": accuracy["chosen"],
            "items": accuracy["items"],
            "certified": evidence["certified"],
            "noise_floor": accuracy["noiseFloor"],
        },
        "active_experts": pair(evidence.get("activeExperts")),
        "speedup_mean": evidence.get("speedupMean"),
        "answers_per_minute": answers_per_minute(summary),
        "most_load": most_load(summary["mostLoad"]),
        "policy": spec["policy"],
        "seconds": seconds,
        "rollout": rollout,
    }
    if rollout is None:
        answer["rollout_skipped"] = why_not
    return answer


def gained(answer: dict[str, Any]) -> str:
    """In plain words what was measured, what it means, and what was not measured."""
    tpot, accuracy, active, rate = (answer[key] for key in ("tpot_ms", "accuracy", "active_experts", "answers_per_minute"))
    points = 100 * (accuracy["exact"] - accuracy["tuned"])
    cost = f"for {points:.2f} points of accuracy" if points > 0 else "for no accuracy"
    experts = (
        f", because a step touches {active['tuned']:.0f} experts of a layer instead of {active['exact']:.0f}" if active else ""
    )
    return (
        f"With {CONCURRENCY} requests at a time the same engine gives each of them its next token {tpot['exact'] / tpot['tuned']:.2f} times "
        f"as fast {cost}{experts}. It finishes {rate['tuned']:.0f} answers a minute instead of {rate['exact']:.0f}: the same "
        f"machine does {rate['tuned'] / rate['exact']:.2f} times the work. {held(answer['most_load'])}"
    )


def held(most: dict[str, Any]) -> str:
    """How much more load the same latency holds, as the closing bisection measured it."""
    if "why_not" in most:
        return f"How many more requests at a time it holds at the old latency: {most['why_not']}."
    load, tpot, ratio = most["requests"], most["tpot_ms"], most["ratio"]
    least = "at least " if most["at_least"] else ""
    return (
        f"The same engine holds {least}{most['times']:.1f}x the load at the same latency: {load['tuned']:.0f} requests at a time at "
        f"{tpot['tuned']:.1f} ms where exact routing holds {load['exact']:.0f} at {tpot['exact']:.1f} ms (exact / tuned {ratio['value']:.2f} "
        f"[{ratio['low']:.2f}, {ratio['high']:.2f}] in {ratio['pairs']} pairs of blocks). Accuracy is certified at {load['exact']:.0f} at a time."
    )


def show(answer: dict[str, Any], speedups: list[dict[str, Any] | None]) -> None:
    table = Table(title="Measured in this run", title_justify="left")
    for column in ("", "exact", "tuned"):
        table.add_column(column, justify="right" if column else "left")
    tpot, accuracy, active = answer["tpot_ms"], answer["accuracy"], answer["active_experts"]
    table.add_row("mean TPOT", f"{tpot['exact']:.2f} ms", f"{tpot['tuned']:.2f} ms  ({tpot['exact'] / tpot['tuned']:.2f}x)")
    table.add_row("accuracy", f"{accuracy['exact']:.2%}", f"{accuracy['tuned']:.2%}")
    if active:
        table.add_row("active experts per layer", f"{active['exact']:.1f}", f"{active['tuned']:.1f}")
    console.print(table)
    for ratio in speedups:
        if ratio and ratio.get("low") is not None:
            console.print(f"{ratio['condition']}: {ratio['value']:.2f}x, 95 % limits [{ratio['low']:.2f}, {ratio['high']:.2f}]")
    console.print(gained(answer))
    word = "certified" if accuracy["certified"] else "NOT certified"
    console.print(
        f"Accuracy {word} on {accuracy['items']} held-out items; exact differed from exact on {accuracy['noise_floor']:.1%} of search items."
    )
    if answer["rollout"]:
        r = answer["rollout"]
        console.print(
            f"Rollout: hot in {r['seconds']:.1f} s; {r['requests']} client requests, {r['errors']} errors, {r['pod_restarts']} pod restarts."
        )
    else:
        console.print(f"Rollout: not run: {answer['rollout_skipped']}")
    console.print(f"Report: file://{BUILD / 'run' / 'report.html'}", soft_wrap=True)
    console.print("Figures: build/demo.json")


def arguments(given: list[str]) -> argparse.Namespace:
    """The command line; what cannot go together is refused."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__.split("\n\n", 1)[0])
    parser.add_argument("--max-drop-points", type=float, default=1.0, help="accuracy budget of stage 1 in points")
    parser.add_argument("--tpot-p95-ms", type=float, default=200.0, help="latency limit of stage 1 in ms")
    parser.add_argument("--trials", type=int, default=2, help="trials of stage 1, exact routing included")
    parser.add_argument("--items", type=int, default=1160, help=f"items that stage 1 makes; {SEARCH_ITEMS} are searched on")
    parser.add_argument(
        "--policies",
        default=POLICIES,
        help="kinds that stage 1 searches, of topk, sere and oea, with commas; sere is calibrated first",
    )
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
        help="stage 2 tunes in the cluster, 8 minutes more, in place of rolling out what stage 1 certified",
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
    began = time.monotonic()
    spec = stage_engine(args)
    tuned = time.monotonic()
    rollout, why_not = stage_cluster(args)
    seconds = {"tune": round(tuned - began), "cluster": round(time.monotonic() - tuned)}
    summary = json.loads((BUILD / "run" / "summary.json").read_text())
    answer = result(spec, summary, rollout, why_not, seconds)
    (ROOT / "build" / "demo.json").write_text(json.dumps(answer, indent=2) + "\n")
    heading(f"Done in {(time.monotonic() - began) / 60:.1f} minutes")
    show(answer, [spec["evidence"].get("speedupMean"), spec["evidence"]["speedup"]])


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
