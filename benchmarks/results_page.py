"""The table of docs/results.md on runs of the tuner and on telemetry, from benchmarks/results/{tune,telemetry}.json."""

from __future__ import annotations

from typing import Any

from benchmarks.tables import interval, table


def _widened(result: dict[str, Any]) -> str:
    """Which model an engine ran."""
    times = f", widened {result['factor']} times, {result['dtype']}" if "factor" in result else ", widened"
    return f"`{result['model']}` ({result['experts']} experts, top-{result['topK']}){times}"


def engine_runs(tune: dict[str, Any], telemetry: dict[str, Any]) -> str:
    """A row for each benchmark that runs the tuner or the engine's telemetry once."""
    ranking, certification, chosen = tune["ranking"], tune["certification"], tune["speedup"]["meanTpot"]
    if chosen:
        gained = interval(chosen["value"], chosen["low"], chosen["high"], 2).replace(" [", "x [")
        found = (
            f"certificate {certification['verdict']} on {certification['items']:,} items, {certification['seconds'] / 60:.1f} minutes for "
            f"{certification['candidates']} of the ladder; "
            f"{certification['policy']}: {gained} mean TPOT at {tune['speedup']['condition']}"
        )
    else:
        found = f"nothing was certified ({tune['outcome']})"
    shares = telemetry["shareOfStepTime"]
    parts = {"operator with nothing to re-route": "operatorUnderExactRouting", "hook": "hookPerStep", "poll": "pollPerSecond"}
    ratios = [telemetry["tpotOverNone"][kind] for kind in ("hook", "hookAndPolling")]
    hook, both = (interval(each["mean"], each["interval95"][0], each["interval95"][1], 2).replace(" [", "x [") for each in ratios)
    rows = [
        [
            f"{_widened(tune)}: {ranking['trials']} ranking trials of {ranking['itemsPerTrial']} items, then a limit of "
            f"{certification['limitPoints']} point tried ({certification['pairs']} pairs of {certification['blockSeconds']:.0f} s)",
            f"{ranking['trialsIn10Minutes']:.0f} trials in 10 minutes, {found}; a restart per trial would cost "
            f"{tune['restartPerTrial']['ratio']:.1f} times as much",
            _source("tune"),
        ],
        [
            f"{_widened(telemetry)}, concurrency {telemetry['concurrency']}: counters, polling and latency metrics",
            f"{shares['total']:.1%} of a step's {telemetry['stepMs']:.1f} ms by parts timed alone: ".replace("%", " %")
            + ", ".join(f"{name} {100 * shares[key]:.2f} %" for name, key in parts.items())
            + f"; blocks of the same requests in turn, {telemetry['rounds']} rounds: {hook} the TPOT with the hook, {both} with hook and polling",
            _source("telemetry"),
        ],
    ]
    return table(["what", "figure", "how"], rows)


def _source(name: str) -> str:
    return f"`make bench-{name}`, [{name}.json](../benchmarks/results/{name}.json)"
