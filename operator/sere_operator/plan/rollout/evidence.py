"""What a rollout has seen so far: counters of both sides and golden answers, kept in `status.rollout.state`. Pure.

Counters are remembered when a window opens and subtracted later, so that a
restarted operator goes on counting where it was.
"""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from typing import Any

from sere_ext.contract.policy import Kind, Policy
from sere_ext.contract.slo import LatencyLimits, LatencySlo
from sere_operator.plan import histogram
from sere_operator.plan.rollout.analysis import Side
from sere_operator.plan.rollout.wanted import Wanted, suited
from sere_operator.plan.snapshot import Object, PodView, Snapshot
from sere_operator.plan.times import stamp

LEAST_GOLDEN_IN_FLIGHT = 8  # for policies of small batches: the prompts would take long one by one
MAX_GOLDEN_IN_FLIGHT = 256  # a batch that vLLM schedules by default
MAX_STABLE_PODS = 8  # of the stable side, whose counters are remembered
MAX_SERIES = 1000  # of one pod; with more, what it says is no answer of ours and would swell the status


class Stage(StrEnum):
    BASELINE = "Baseline"
    CANARY = "Canary"
    ANALYSING = "Analysing"
    AWAITING_APPROVAL = "AwaitingApproval"
    PROMOTING = "Promoting"
    ROLLING_BACK = "RollingBack"


def with_state(known: Object, **changes: Any) -> Object:
    return {**known, "state": {**(known.get("state") or {}), **changes}}


def golden_count(wanted: Wanted) -> int:
    return len(wanted.profile.golden_prompts) if wanted.profile is not None else 0


def golden_in_flight(policy: Policy) -> int:
    """How many golden prompts must decode beside each other, so that the policy's buckets of the largest batches are met."""
    edges = [bucket.min_tokens for table in policy.tables() for bucket in table if bucket.kind is not Kind.EXACT]
    return min(MAX_GOLDEN_IN_FLIGHT, max([LEAST_GOLDEN_IN_FLIGHT, *edges]))


def golden_beyond_reach(policy: Policy) -> str | None:
    """Why golden prompts cannot show what the policy does to answers, None where they can."""
    edges = [b.min_tokens for table in policy.tables() for b in table if b.kind is not Kind.EXACT]
    if not edges or max(edges) <= MAX_GOLDEN_IN_FLIGHT:
        return None
    return (
        f"the policy begins at {max(edges)} tokens a step, and golden prompts put at most {MAX_GOLDEN_IN_FLIGHT} in flight, so the "
        "canary cannot be checked for harm to answers"
    )


def golden_answers(known: Object, side: str) -> tuple[bool | None, ...] | None:
    answers = ((known.get("state") or {}).get("golden") or {}).get(side)
    return tuple(answers) if answers is not None else None


def collect_golden(snapshot: Snapshot, known: Object, side: str, digest: str) -> Object:
    """Take over the answers that `observe` brought for this side, once."""
    if golden_answers(known, side) is not None:
        return known
    for result in snapshot.golden:
        canary = any(pod.uid == result.pod_uid and pod.name in known["canaryPods"] for pod in snapshot.pods)
        belongs = canary if (side == "canary" or known["state"]["alone"]) else not canary
        if result.digest == digest and belongs and None not in result.right:
            answers = {**(known["state"].get("golden") or {}), side: list(result.right)}
            return with_state(known, golden=answers, start=None, stableStart=None, countedSince=None)
    return known


def golden_needed(snapshot: Snapshot, wanted: Wanted, stable: str) -> list[tuple[PodView, str]]:
    """Pods that must answer the golden prompts now, and the policy under which they must do so."""
    known = snapshot.status.get("rollout") or {}
    if not golden_count(wanted) or known.get("candidate") != wanted.digest or not known.get("canaryPods"):
        return []
    canaries = [pod for pod in suited(snapshot, wanted) if pod.name in known["canaryPods"] and pod.ready]
    others = [
        pod for pod in suited(snapshot, wanted) if pod.name not in known["canaryPods"] and pod.ready and pod.digest == stable
    ]
    needed: list[tuple[PodView, str]] = []
    if known.get("stage") == Stage.BASELINE and golden_answers(known, "stable") is None:
        needed += [(pod, stable) for pod in canaries[:1]]
    if known.get("stage") in (Stage.ANALYSING, Stage.AWAITING_APPROVAL):
        if golden_answers(known, "canary") is None:
            needed += [(pod, wanted.digest) for pod in canaries[:1]]
        if golden_answers(known, "stable") is None and not known["state"]["alone"]:
            needed += [(pod, stable) for pod in others[:1]]
    return [(pod, digest) for pod, digest in needed if pod.digest == digest]


def metrics_needed(status: Object) -> bool:
    """Whether `observe` must read the pods' histograms."""
    return (status.get("rollout") or {}).get("stage") in (Stage.ANALYSING, Stage.AWAITING_APPROVAL)


def slo_limits(slo: LatencySlo | None) -> frozenset[str]:
    """The limits of the SLO as keys of `Histogram.over` (ms); other bounds are not needed and would swell the status."""
    return _keys(slo.tpot_ms if slo else None) | _keys(slo.ttft_ms if slo else None)


def _keys(limits: LatencyLimits | None) -> frozenset[str]:
    return frozenset(f"{limit:g}" for limit in limits.limits().values()) if limits is not None else frozenset()


def counted_by(known: Object, slo: LatencySlo | None) -> Object:
    """`status.rollout`, in which counting begins anew where the SLO is not the one that requests were counted by."""
    limits = slo.to_json_dict() if slo is not None else {}
    if (known["state"].get("slo") or {}) == limits:
        return known
    return with_state(known, slo=limits or None, start=None, stableStart=None, countedSince=None)


def _counters(pod: PodView, digest: str, slo: LatencySlo | None) -> Object | None:
    """A pod's histograms under one policy, packed by bucket.

    None where they cannot be read, or have no bound at a limit of the SLO yet: they will begin anew with these bounds.
    """
    if pod.metrics is None or len(pod.metrics.tpot) + len(pod.metrics.ttft) > MAX_SERIES:
        return None
    found = {}
    for name, series, limits in (
        ("tpot", pod.metrics.tpot, slo.tpot_ms if slo else None),
        ("ttft", pod.metrics.ttft, slo.ttft_ms if slo else None),
    ):
        if any(not _keys(limits) <= set(one.over) for one in series.values()):
            return None
        found[name] = histogram.packed({bucket: h for (policy, bucket), h in series.items() if policy == digest})
    return found


def measured(
    known: Object, pods: list[PodView], digest: str, slo: LatencySlo | None, key: str = "start"
) -> tuple[Object, Side | None]:
    """What these pods did under one policy since the remembered start: (`status.rollout`, the side).

    Where no start is remembered, the pods' counters become it and there is no side yet. A pod whose counters fell has
    restarted and counts for nothing.

    Args:
        key: of `status.rollout.state`, where the start is remembered.
    """
    start: Object | None = known["state"].get(key)
    if start is None:
        counters = {pod.uid: _counters(pod, digest, slo) for pod in pods[:MAX_STABLE_PODS]}
        if not counters or any(value is None for value in counters.values()):
            return known, None
        return with_state(known, **{key: counters}), None
    tpot, ttft = [], []
    for pod in pods:
        if pod.uid not in start or pod.metrics is None:
            continue
        series = [
            histogram.window(start[pod.uid].get(name), {b: h for (policy, b), h in seen.items() if policy == digest})
            for name, seen in (("tpot", pod.metrics.tpot), ("ttft", pod.metrics.ttft))
        ]
        if series[0] is not None and series[1] is not None:
            tpot.append(series[0])
            ttft.append(series[1])
    return known, Side(histogram.merged(tpot), histogram.merged(ttft))


def sides(
    snapshot: Snapshot, stable: str, wanted: Wanted, known: Object, canaries: list[PodView], slo: LatencySlo | None
) -> tuple[Object, Side | None, Side | None]:
    """What both sides did since counting began: (`status.rollout`, stable side, canary); None: counting begins now.

    Where there are no other pods, the canary pods are both sides, in turns: histograms tell policies apart.

    Args:
        stable: digest of the policy in force.
        known: `status.rollout`.
    """
    known = counted_by(known, slo)
    known, canary = measured(known, canaries, wanted.digest, slo)
    others = [pod for pod in suited(snapshot, wanted) if pod.name not in known["canaryPods"] and pod.digest == stable]
    known, side = measured(known, canaries if known["state"]["alone"] else others, stable, slo, "stableStart")
    if canary is None or side is None:
        counting = known["state"].get("start") and known["state"].get("stableStart")
        if counting and not known["state"].get("countedSince"):
            known = with_state(known, countedSince=stamp(snapshot.now))
    canary_golden, stable_golden = golden_answers(known, "canary"), golden_answers(known, "stable")
    return (
        known,
        replace(side, golden=stable_golden) if side is not None else None,
        replace(canary, golden=canary_golden) if canary is not None else None,
    )
