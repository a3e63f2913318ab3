"""A canary over time: which pods it takes, what takes it back, and that it is observed until it ends."""

from __future__ import annotations

from typing import Any

import pytest

from sere_operator.plan.rollout.candidate import MAX_MOVES, least_ready
from tests.kit.plan_world import DIGEST, POLICY, Pod, World, profile_body

PROFILE = {"mode": "Profile", "profileRef": {"name": "p"}}
POLICY_ANNOTATION, COST = "serving.sere.dev/policy", "controller.kubernetes.io/pod-deletion-cost"


def begun(replicas: int = 3, profile: dict[str, Any] | None = None, **spec: Any) -> World:
    world = World(replicas, routing=PROFILE, **spec)
    world.profiles["p"] = profile or profile_body(POLICY)
    return world


def look_for(world: World, seconds: int) -> None:
    for _ in range(seconds):
        world.step()
        world.tick()


def until(world: World, stage: str | None) -> World:
    for _ in range(400):
        if (world.status.get("rollout") or {}).get("stage") == stage:
            return world
        world.step()
        world.tick()
    raise AssertionError(f"{stage} was never reached: {world.status}")


def canaries(world: World) -> list[Pod]:
    return [pod for pod in world.pods if POLICY_ANNOTATION in pod.annotations]


def until_annotated(world: World) -> World:
    while not canaries(world):
        world.step()
    return world


def replace_pod(world: World, old: Pod) -> None:
    """A drain: the pod goes, its Deployment makes another."""
    world.pods.remove(old)
    world.pods.append(world._pod(world.children["Deployment"]))


# ---- waiting for approval ----------------------------------------------------------------------------------------

ADVISORY = profile_body(POLICY, certified=False)


@pytest.mark.parametrize("harm", ["slow", "answers"])
def test_a_canary_that_waits_for_approval_is_judged_on(harm: str) -> None:
    world = until(begun(profile=ADVISORY, rollout={"canary": {"minRequests": 100}}), "AwaitingApproval")
    look_for(world, 60)
    assert world.status["rollout"]["stage"] == "AwaitingApproval", "nothing is wrong with it yet"
    if harm == "slow":
        world.tpot_ms[DIGEST] = 400.0
    else:
        world.harmful.add(DIGEST)
    for _ in range(140):
        world.step()
        world.tick(10)
    assert world.condition("PolicyApplied")["reason"] == "Rejected"
    assert {pod.digest for pod in world.pods} == {"exact"}


def test_one_pod_alone_serves_nothing_that_nobody_approved() -> None:
    world = until(begun(1, ADVISORY, rollout={"canary": {"minRequests": 100}}), "AwaitingApproval")
    look_for(world, 5)
    assert [pod.digest for pod in world.pods] == ["exact"]
    assert "until then the only pod runs exact" in world.condition("PolicyApplied")["message"]
    world.annotate("serving.sere.dev/approved", DIGEST)
    world.settle()
    assert [pod.digest for pod in world.pods] == [DIGEST]


# ---- an SLO that is edited meanwhile ----------------------------------------------------------------------------


def test_an_edit_of_the_slo_replaces_no_pod_and_the_canary_is_counted_anew_by_the_new_limits() -> None:
    world = until(begun(rollout={"canary": {"minRequests": 1000, "deadline": "600s"}}), "Analysing")
    look_for(world, 8)
    uids, (canary,) = [pod.uid for pod in world.pods], canaries(world)
    counted = world.status["rollout"]["state"]["start"]
    assert counted[canary.uid]["tpot"]["8-64"]["over"].keys() == {"20"}
    world.bounds_follow = False  # the kubelet has not shown the new limits yet
    world.tpot_ms[DIGEST] = 17.0  # within the old limit, above the new one
    world.edit(slo={"tpotMs": {"p95": 16}})
    look_for(world, 5)
    assert world.status["rollout"]["state"].get("start") is None, "nothing is counted by bounds that are not there"
    world.bounds_follow = True
    look_for(world, 120)
    assert [pod.uid for pod in world.pods] == uids
    assert world.condition("PolicyApplied")["reason"] == "Rejected"
    assert "above the limit of 16 ms" in world.condition("PolicyApplied")["message"]


# ---- deadlines and sick pods -------------------------------------------------------------------------------------


def test_histograms_that_cannot_be_read_do_not_keep_a_canary_for_ever_and_write_nothing_meanwhile() -> None:
    world = begun()
    world.sick = {pod.name for pod in world.pods}
    until(world, "Analysing")
    look_for(world, 5)
    writes = sum(world.step().writes for _ in range(10))
    assert writes == 0, "the same books again are no news"
    look_for(world, 80)  # deadline: 60 s
    assert world.condition("PolicyApplied")["reason"] == "Inconclusive"
    assert "histograms of both sides could not be read in time" in world.condition("PolicyApplied")["message"]
    assert {pod.digest for pod in world.pods} == {"exact"}


def test_a_canary_that_shows_the_policy_and_gives_no_token_under_it_is_not_compared() -> None:
    world = until(begun(), "Canary")
    (canary,) = canaries(until_annotated(world))
    world.unproven = {canary.name}
    look_for(world, 20)
    assert canary.digest == DIGEST
    assert world.status["rollout"]["stage"] == "Canary"
    assert "waiting for the canary" in world.condition("PolicyApplied")["message"]
    world.unproven = set()
    until(world, "Analysing")


# ---- pods come and go --------------------------------------------------------------------------------------------


def test_a_drained_canary_is_tried_on_another_pod_at_once() -> None:
    world = until(begun(), "Analysing")
    (first,) = canaries(world)
    replace_pod(world, first)
    look_for(world, 3)
    assert [pod.name for pod in canaries(world)] not in ([], [first.name])
    assert world.status["rollout"]["attempt"] == 1
    assert "PolicyInconclusive" not in world.events
    world.settle()
    assert {pod.digest for pod in world.pods} == {DIGEST}


def test_canaries_that_are_always_taken_away_end_as_inconclusive() -> None:
    world = begun()
    for _ in range(MAX_MOVES + 1):
        until(world, "Analysing")
        replace_pod(world, canaries(world)[0])
        world.step()
    assert world.condition("PolicyApplied")["reason"] == "Inconclusive"


def test_a_scale_down_takes_the_canary_last_and_the_mark_goes_with_the_canary() -> None:
    world = until(begun(), "Analysing")
    (canary,) = canaries(world)
    assert {pod.name for pod in world.pods if pod.annotations.get(COST) == "1000"} == {canary.name}
    users = next(pod for pod in world.pods if pod is not canary)
    users.annotations[COST] = "7"
    world.settle()
    assert [pod.annotations.get(COST) for pod in world.pods if pod is not users] == [None, None]
    assert users.annotations[COST] == "7", "somebody else's value stays"


@pytest.mark.parametrize(("total", "unavailable", "floor"), [(1, 0, 1), (2, 0, 2), (3, 0, 2), (5, 0, 4), (5, 2, 3), (2, 1, 2)])
def test_how_many_pods_must_be_ready(total: int, unavailable: int, floor: int) -> None:
    assert least_ready(total, unavailable) == floor


def test_a_fleet_that_is_never_whole_gets_its_policy() -> None:
    world = begun(5)
    world.pods[4].ready = False
    look_for(world, 120)
    assert world.stable == DIGEST
    assert {pod.digest for pod in world.pods[:4]} == {DIGEST}
    assert not canaries(world), "a pod that does not answer keeps no annotation in place"
    assert "1 of 5 pods do not answer" in world.condition("PolicyApplied")["message"]


def test_canary_annotations_go_only_when_all_others_show_the_policy() -> None:
    """Else a canary's volume may show the ConfigMap of before, and the pod would flip back for a moment."""
    world = begun()
    world.errors["m-2"] = "busy"  # one pod is late
    until(world, "Promoting")
    look_for(world, 5)
    assert world.stable == DIGEST
    assert world.pods[2].digest == "exact"
    assert [pod.name for pod in canaries(world)] == ["m-0"]
    del world.errors["m-2"]
    world.settle()
    assert not canaries(world)


def test_a_canary_is_never_a_pod_that_is_being_replaced() -> None:
    world = begun(3)
    for pod, generation in zip(world.pods, ("old", "new", "new"), strict=True):
        pod.labels["pod-template-hash"] = generation
        pod.created = "2026-01-01T00:00:00Z" if generation == "old" else "2026-01-02T00:00:00Z"
    until(world, "Analysing")
    assert [pod.name for pod in canaries(world)] == ["m-1"], "m-0 is of the old template"


# ---- one pod of another device -----------------------------------------------------------------------------------


def test_one_pod_of_another_device_keeps_the_policy_from_nobody_else_and_is_named() -> None:
    world = begun(3)
    world.pods[0].device = "NVIDIA A100"
    world.settle()
    assert [pod.digest for pod in world.pods] == ["exact", DIGEST, DIGEST]
    applied = world.condition("PolicyApplied")
    assert (applied["status"], world.condition("Ready")["status"]) == ("True", "True")
    assert "2 of 3 pods run" in applied["message"]
    assert "pod m-0 routes exactly: profile was made for device cpu, this pod runs NVIDIA A100" in applied["message"]
    assert not any(name == "m-0" for name, _ in world.golden_runs), "it is no side of a comparison"
    for pod in world.pods:
        pod.device = "NVIDIA A100"
    world.settle()
    assert world.condition("PolicyApplied")["reason"] == "PolicyStale"
    assert "(pod m-0, and 2 more)" in world.condition("PolicyApplied")["message"]


# ---- storms ------------------------------------------------------------------------------------------------------


def test_in_a_storm_of_edits_no_canary_begins() -> None:
    world = World(2)
    world.settle()
    for number in range(40):
        least = 2 + number % 7
        policy = {"buckets": [{"minTokens": least, "kind": "topk", "S": 2}]}
        world.edit(routing={"mode": "Static", "policy": policy})
        world.step()
        world.tick(0.5)
    assert "CanaryStarted" not in world.events
    world.settle()
    assert world.events.count("CanaryStarted") == 1
