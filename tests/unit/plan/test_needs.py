"""What is read next: rounds, each decided by the answers of those before."""

from __future__ import annotations

from typing import Any

import pytest

from sere_operator.plan.needs import needs, taken
from sere_operator.plan.reads import Artefact, Child, Golden, Metrics, Read, ServiceToken, State, Token
from sere_operator.plan.snapshot import Snapshot
from tests.kit.plan_world import DIGEST, POLICY, World, profile_body

PROFILE = {"mode": "Profile", "profileRef": {"name": "p"}}


def rounds(world: World) -> list[tuple[Read, ...]]:
    """The reads of one whole snapshot, round by round."""
    snapshot, found = Snapshot(now=world.now, object=world.object), []
    while missing := needs(snapshot, world.defaults):
        assert len(found) < 20
        found.append(missing)
        snapshot = taken(snapshot, {read: world.answer(read) for read in missing})
    return found


def kinds(reads: tuple[Read, ...]) -> set[str]:
    return {type(read).__name__ for read in reads}


def test_objects_come_first_then_what_they_lead_to() -> None:
    world = World(2, routing=PROFILE)
    world.profiles["p"] = profile_body(POLICY)
    world.settle()
    assert [kinds(reads) for reads in rounds(world)] == [{"Child", "Listed"}, {"Child"}, {"State"}, {"Token"}, {"ServiceToken"}]
    assert rounds(world)[1] == (Child("SereProfile", "p"),)


@pytest.mark.parametrize("change", [{"suspend": True}, {"nonsense": 1}], ids=["suspended", "cannot be read"])
def test_of_a_spec_that_is_not_carried_out_only_the_objects_are_read(change: dict[str, Any]) -> None:
    world = World(2)
    world.settle()
    world.edit(**change)
    assert [kinds(reads) for reads in rounds(world)] == [{"Child", "Listed"}]


def test_histograms_are_read_only_while_a_canary_is_compared() -> None:
    world = World(2, routing=PROFILE, slo={"tpotMs": {"p95": 20, "p99": 35.5}})
    world.profiles["p"] = profile_body(POLICY)
    seen: dict[str | None, set[Read]] = {}
    for _ in range(60):
        stage = (world.status.get("rollout") or {}).get("stage")
        seen.setdefault(stage, set()).update(read for reads in rounds(world) for read in reads if isinstance(read, Metrics))
        world.step()
        world.tick()
    assert {stage for stage, reads in seen.items() if reads} == {"Analysing"}
    assert {read.limits for read in seen["Analysing"] if isinstance(read, Metrics)} == {frozenset({"20", "35.5"})}


@pytest.mark.parametrize(("least", "in_flight"), [(2, 8), (24, 24), (128, 128), (4096, 256)])
def test_golden_prompts_are_run_one_pod_at_a_time_with_enough_requests_in_flight(least: int, in_flight: int) -> None:
    """With fewer requests in flight than the bucket's lower edge every decode step would route exactly, and show nothing."""
    world = World(3, routing=PROFILE)
    world.profiles["p"] = profile_body({"buckets": [{"minTokens": least, "kind": "topk", "S": 2}]})
    runs: list[Golden] = []
    while len(runs) < 2:
        for reads in rounds(world):
            golden = [read for read in reads if isinstance(read, Golden)]
            assert len(golden) == 0 or len(reads) == 1
            runs += golden
        world.step()
        world.tick()
    assert {run.concurrency for run in runs} == {in_flight}
    assert len({run.uid for run in runs}) == len({run.digest for run in runs}) == 2, "a canary and a pod of the stable side"


def test_an_artefact_is_read_with_whatever_has_the_name_of_its_shards() -> None:
    uri = "configmap://s/x"
    buckets = [{"minTokens": 8, "kind": "sere", "S": 2}]
    world = World(1, routing={"mode": "Static", "policy": {"buckets": buckets}, "similarity": {"uri": uri}})
    reads = rounds(world)[1]
    assert Artefact(uri) in reads
    assert Child("ConfigMap", "m-policy-shard-0") in reads


def test_pods_without_an_answer_are_asked_nothing_more() -> None:
    world = World(2)
    world.settle()
    world.pods[0].ready = False  # in this world a pod that is not ready does not answer either
    asked = [read for reads in rounds(world) for read in reads]
    assert {read.uid for read in asked if isinstance(read, State)} == {"uid-0", "uid-1"}
    assert {read.uid for read in asked if isinstance(read, Token)} == {"uid-1"}
    (service,) = (read for read in asked if isinstance(read, ServiceToken))
    assert service.key == ("uid-Service", "uid-1/0/exact"), "proven anew when the pods behind it are others"
    assert DIGEST not in service.key
