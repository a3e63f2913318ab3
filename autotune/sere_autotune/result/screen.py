"""The closing lines that the engineer reads on the screen. Pure: from the summary to text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sere_autotune.outcome import Ending
from sere_autotune.words import bracketed, no_harm, percent


def lines(summary: dict[str, Any]) -> str:
    """The closing lines, as the engineer reads them."""
    report = f"Report   {Path(summary['out']) / 'report.html'}"
    hours = f"{summary['spent']['deviceHours']:.2f} device-hours"
    if summary["chosen"] is None:
        word = {
            Ending.INFEASIBLE: "Nothing feasible",
            Ending.BUDGET: "Budget spent",
            Ending.CANNOT_CERTIFY: "Cannot certify",
        }.get(Ending(summary["outcome"]), "Failed")
        miss = summary["nearestMiss"]
        found = [f"{word}   {len(summary['trials'])} trials, {hours}", f"  {summary['message']}"]
        if miss and summary["outcome"] != Ending.INFEASIBLE.value:
            found += [f"  closest so far   {miss['text']}", f"  would have to give   {miss['give']}"]
        return "\n".join([*found, *_not_taken(summary), report])
    candidate = summary["ladder"][summary["chosen"] - 1]
    result, name = candidate["result"], summary["headline"]
    ratio = result["speedup"][name]
    limit = {(row["metric"], row["statistic"]): row["limitMs"] for row in summary["limits"]}
    found = [
        f"Chosen   {candidate['describe']}       candidate {summary['chosen']} of {len(summary['ladder'])}, {hours}",
        f"            {'exact':<11}{'chosen':<11}limit",
    ]
    shown = [("tpot", name), *(key for key in limit if key != ("tpot", name))]
    for metric, statistic in shown:
        exact, chosen = (result["latency_ms"][routing][metric][statistic] for routing in ("exact", "chosen"))
        bound = limit.get((metric, statistic))
        extra = (
            f"{ratio['value']:.2f}x{bracketed(ratio['low'], ratio['high'])} at {summary['condition']}, {ratio['pairs']} pairs"
            if metric == "tpot"
            else ""
        )
        left = f"{metric.upper()} {statistic}"
        found.append(f"{left:<11} {exact:>6.1f} ms  {chosen:>6.1f} ms  {f'{bound:g} ms' if bound else '':<9} {extra}".rstrip())
    accuracy = summary["accuracy"]
    sure = "NOT certified (advisory)" if summary["advisory"] else f"certified at {percent(accuracy['confidence'])}"
    found.append(
        f"accuracy    {result['exact_accuracy']:>7.2%}    {result['chosen_accuracy']:>7.2%}    -{accuracy['maxDropPoints']:<8g} "
        f"{sure} on {result['items']:,} held-out items: at most {result['upper_bound'] * 100:.2f} points lost"
    )
    # The word on speed has 95% over the whole ladder; single judgements are stricter (docs/reference.md, "Confidences").
    mean, verdict = result["speedup"]["mean"], result["speed"]["verdict"]
    word = {"faster": "faster, shown at", "slower": "slower, shown at"}.get(verdict, "not shown to be faster at")
    found.append(
        f"speed       {word} 95%: mean TPOT {mean['value']:.2f}x{bracketed(mean['low'], mean['high'])}; limits in brackets are at 95%, too"
    )
    found += [f"  {part}" for part in parts(result)]
    if result["active_before"] is not None:
        found.append(
            f"experts     {result['active_before']:>6.1f}     {result['active_after']:>6.1f}              active per layer and step"
        )
    if summary["mostLoad"]:
        found.append(f"Most load {summary['mostLoad']['sentence']}")
    if summary["ceiling"]:
        found.append(f"Ceiling  {summary['ceiling']['sentence']}")
    if candidate["describe"] not in {trial["policy"] for trial in summary["trials"]}:
        found.append(f"Picked   by a model of all {len(summary['trials'])} trials, none of which was this policy")
    return "\n".join([*found, *_not_taken(summary), report, f"Serve    {summary['serve']}"])


def parts(result: dict[str, Any]) -> list[str]:
    """The drop at each load and in each task where there are several, and at each edge of the policy, one line each.

    Args:
        result: of one candidate, as the summary has it.
    """
    found = []
    for part in result["parts"]:
        if part["kind"] == "edge":
            seen = no_harm(part["losses"], part["gains"], part["items"], part["harmed"])
            found.append(f"harm check at {part['name']}, where the policy applies too: {seen}")
        else:
            drop = (part["losses"] - part["gains"]) / max(part["items"], 1)
            over = ", shown to be over the limit" if part["harmed"] else ""
            found.append(f"{part['kind']} {part['name']}: {-100 * drop + 0.0:+.2f} points on {part['items']:,} items{over}")
    return found


def _not_taken(summary: dict[str, Any]) -> list[str]:
    others, chosen = [], summary["chosen"]
    taken = summary["ladder"][chosen - 1]["result"]["speed"]["value"] if chosen else 0.0  # exact / candidate of mean TPOT
    for candidate in summary["ladder"]:
        if candidate["number"] == summary["chosen"]:
            continue
        reason = candidate["result"]["reason"] if candidate["result"] else "not run, the ladder had ended"
        if candidate["result"] and candidate["verdict"] == "passed":
            faster = candidate["result"]["speed"]["value"] > taken
            reason = "passed too, but a safer one showed harm where it applies too" if faster else "passed too, slower"
        others.append(f"candidate {candidate['number']}, {candidate['describe']}: {reason}")
    return ["Not taken   " + "; ".join(others)] if others else []
