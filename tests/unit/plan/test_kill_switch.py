"""The kill switch whatever the spec says, and that who edits the policy ConfigMap by hand decides nothing."""

from __future__ import annotations

from typing import Any

import pytest

from sere_operator.api import meta
from tests.kit.plan_world import DIGEST, POLICY, CrashError, World, profile_body

PROFILE = {"mode": "Profile", "profileRef": {"name": "p"}}
OVERRIDE = "serving.sere.dev/override"


def look_for(world: World, seconds: int) -> None:
    for _ in range(seconds):
        world.step()
        world.tick()


def promoted() -> World:
    world = World(2, routing=PROFILE)
    world.profiles["p"] = profile_body(POLICY)
    world.settle()
    assert {pod.digest for pod in world.pods} == {DIGEST}
    return world


@pytest.mark.parametrize("change", [{"suspend": True}, {"nonsense": 1}], ids=["suspended", "invalid"])
def test_the_kill_switch_works_whatever_the_spec_says(change: dict[str, Any]) -> None:
    world = promoted()
    world.edit(**change)
    look_for(world, 2)
    world.annotate(OVERRIDE, "exact")
    plan = world.step()
    assert [body["kind"] for body in plan.apply] == ["ConfigMap"]
    assert world.children["ConfigMap"]["data"]["override"] == "exact", "for pods that start now"
    look_for(world, 2)
    assert {pod.digest for pod in world.pods} == {"exact"}
    assert world.status["policy"]["override"] == "exact"
    assert world.step().writes == 0
    world.annotate(OVERRIDE, None)
    look_for(world, 2)
    assert {pod.digest for pod in world.pods} == {DIGEST}
    assert "override" not in world.children["ConfigMap"]["data"]
    assert world.step().writes == 0
    assert world.children["Deployment"]["metadata"]["generation"] == 1, "nothing else was touched"


def test_of_somebody_elses_config_map_nothing_is_written() -> None:
    world = promoted()
    world.children["ConfigMap"] = {"kind": "ConfigMap", "metadata": {"name": "m-policy"}, "data": {"stable": DIGEST}}
    world.annotate(OVERRIDE, "exact")
    assert world.step().apply == []


def rejected() -> World:
    world = World(2, routing=PROFILE)
    world.profiles["p"] = profile_body(POLICY)
    world.harmful.add(DIGEST)
    world.settle()
    assert world.condition("PolicyApplied")["reason"] == "Rejected"
    return world


def write_by_hand(world: World, digest: str) -> None:
    data = world.children["ConfigMap"]["data"]
    data["stable"] = digest
    data[f"{digest}.json"] = world_policy_text()


def world_policy_text() -> str:
    from sere_ext.contract.policy import Policy

    return Policy.parse(POLICY).model_dump_json(by_alias=True, exclude_none=True)


def test_a_rejected_policy_is_not_put_in_force_by_hand() -> None:
    world = rejected()
    world.events.clear()
    write_by_hand(world, DIGEST)
    look_for(world, 5)
    assert world.stable == "exact"
    assert {pod.digest for pod in world.pods} == {"exact"}
    assert world.condition("PolicyApplied")["reason"] == "Rejected"
    assert "Healed" in world.events


@pytest.mark.parametrize("digest", ["exact", "sere-00000000"])
def test_the_policy_in_force_is_not_taken_away_by_hand(digest: str) -> None:
    """Only the kill switch, the rollback annotation and the spec do that."""
    world = promoted()
    world.children["ConfigMap"]["data"]["stable"] = digest
    world.step()
    assert world.stable == DIGEST
    look_for(world, 3)
    assert {pod.digest for pod in world.pods} == {DIGEST}
    assert world.condition("PolicyApplied")["reason"] == "Applied"


def test_a_candidate_is_not_promoted_by_hand_in_the_middle_of_its_canary() -> None:
    world = World(3, routing=PROFILE)
    world.profiles["p"] = profile_body(POLICY)
    world.rate = 0.0
    look_for(world, 20)
    assert world.status["rollout"]["stage"] == "Analysing"
    write_by_hand(world, DIGEST)
    world.step()
    assert world.stable == "exact"
    look_for(world, 3)
    assert world.status["rollout"]["stage"] == "Analysing", "the canary goes on as if nothing had happened"
    assert [pod.digest for pod in world.pods].count(DIGEST) == 1


@pytest.mark.parametrize("edited", [False, True], ids=["as the operator wrote it", "edited by hand"])
def test_without_a_status_the_config_map_is_believed_only_as_it_was_written(edited: bool) -> None:
    world = rejected() if edited else promoted()
    if edited:
        write_by_hand(world, DIGEST)
    world.object.pop("status")
    world.step()
    assert world.stable == ("exact" if edited else DIGEST)


def test_a_promotion_that_was_cut_off_after_the_config_map_goes_on() -> None:
    """The operator died between the ConfigMap and the status; the status of before says that it was promoting."""
    world = World(3, routing=PROFILE)
    world.profiles["p"] = profile_body(POLICY)
    while (world.status.get("rollout") or {}).get("stage") != "Promoting":
        world.step()
        world.tick()
    assert world.stable == "exact"
    with pytest.raises(CrashError):
        world.step(crash_after=1)
    assert (world.stable, world.status["policy"]["stable"]) == (DIGEST, "exact")
    world.settle()
    assert {pod.digest for pod in world.pods} == {DIGEST}


def test_what_the_operator_wrote_is_marked() -> None:
    annotations = promoted().children["ConfigMap"]["metadata"]["annotations"]
    assert len(annotations[meta.DECIDED_ANNOTATION]) == 16
