"""What a run of the demo measured: the content of build/demo.json, and the last lines on the screen. No figure is made up here."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

from rich.table import Table

from demo.screen import console
from tests.kit import ROOT

CONCURRENCY = 16  # requests at a time, for which stage 1 tunes


def result(
    spec: dict[str, Any],
    summary: dict[str, Any],
    rollout: dict[str, Any] | None,
    why_not: str,
    seconds: dict[str, int],
    machine: dict[str, Any],
) -> dict[str, Any]:
    """The content of build/demo.json.

    Args:
        spec: of the profile.
        summary: what the tuner wrote beside it.
        seconds: of each stage.
        machine: processor, versions, and the load before stage 1, as `benchmarks.ground.machine` gives them.
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
            "points_lost_at_most": accuracy["upperBoundPoints"],
        },
        "active_experts": pair(evidence.get("activeExperts")),
        "speedup_mean": evidence.get("speedupMean"),
        "answers_per_minute": answers_per_minute(summary),
        "most_load": most_load(summary["mostLoad"]),
        "policy": spec["policy"],
        "seconds": seconds,
        "rollout": rollout,
        "machine": machine,
    }
    if tree := commit():
        answer["commit"] = tree
    if rollout is None:
        answer["rollout_skipped"] = why_not
    return answer


def commit() -> str:
    """The commit of this tree, with `-dirty` where files differ from it; empty where git or its folder is missing."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


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


def show(answer: dict[str, Any], speedups: list[dict[str, Any] | None], report: Path) -> None:
    """Print the last lines.

    Args:
        answer: see `result`.
        speedups: ratios of the profile's evidence, each with its 95 % limits.
        report: the tuner's, as HTML.
    """
    table = Table(title="Measured in this run", title_justify="left")
    for column in ("", "exact", "tuned"):
        table.add_column(column, justify="right" if column else "left")
    tpot, accuracy, active = answer["tpot_ms"], answer["accuracy"], answer["active_experts"]
    table.add_row("mean TPOT", f"{tpot['exact']:.2f} ms", f"{tpot['tuned']:.2f} ms")
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
        f"Accuracy {word} on {accuracy['items']} held-out items: at most {accuracy['points_lost_at_most']:.2f} points are lost, at 95 %. "
        "Exact routing, asked twice, "
        f"answered {accuracy['noise_floor']:.1%} of search items differently."
    )
    if answer["rollout"]:
        r = answer["rollout"]
        console.print(
            f"Rollout: hot in {r['seconds']:.1f} s; {r['requests']} client requests, {r['errors']} errors, {r['pod_restarts']} pod restarts."
        )
    else:
        console.print(f"Rollout: not run: {answer['rollout_skipped']}")
    console.print(f"Report: file://{report}", soft_wrap=True)
    console.print("Figures: build/demo.json")


def gained(answer: dict[str, Any]) -> str:
    """In plain words what was measured, what it means, and what was not measured."""
    tpot, accuracy, active, rate = (answer[key] for key in ("tpot_ms", "accuracy", "active_experts", "answers_per_minute"))
    # The same ratio as in the lines above: over pairs of blocks, not of the two means, which differ in the second decimal.
    paired = answer.get("speedup_mean")
    faster = paired["value"] if paired else tpot["exact"] / tpot["tuned"]
    points = 100 * (accuracy["exact"] - accuracy["tuned"])
    cost = f"for {points:.2f} points of accuracy" if points > 0 else "for no accuracy"
    experts = (
        f", because a step touches {active['tuned']:.0f} experts of a layer instead of {active['exact']:.0f}" if active else ""
    )
    return (
        f"With {CONCURRENCY} requests at a time the same engine gives each of them its next token {faster:.2f} times "
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
