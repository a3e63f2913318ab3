"""An upgrade of the operator replaces the pods of a few models at a time; a user's own edit is never held up."""

from __future__ import annotations

from typing import Any

from sere_operator.plan.snapshot import Plan, Snapshot
from sere_operator.runtime.pacing import STUCK_S, Rollouts
from sere_operator.runtime.reconciler import Key

HASH = "serving.sere.dev/config-hash"


def deployment(content: str, replacing: bool = False) -> dict[str, Any]:
    status = {"observedGeneration": 1, "replicas": 2, "updatedReplicas": 1 if replacing else 2, "availableReplicas": 2}
    metadata = {"name": "m", "generation": 1, "annotations": {HASH: content}}
    return {"kind": "Deployment", "metadata": metadata, "spec": {"replicas": 2}, "status": status}


class Fleet:
    """Models whose pods are of one content, under an operator that wants another."""

    def __init__(self, size: int, limit: int) -> None:
        self.now = 1000.0
        self.rollouts = Rollouts(limit, clock=lambda: self.now)
        self.content = {f"m{index}": "old" for index in range(size)}
        self.replacing: set[str] = set()

    def look(self, name: str, wanted: str = "new", edited: bool = False) -> bool:
        """One look; whether the Deployment was written."""
        key: Key = ("SereDeployment", "ns", name)
        metadata = {"name": name, "namespace": "ns", "uid": name, "generation": 2 if edited else 1}
        snapshot = Snapshot(
            now=self.now,
            object={"metadata": metadata, "status": {"observedGeneration": 1}},
            children={"Deployment": deployment(self.content[name], name in self.replacing)},
        )
        apply = [] if self.content[name] == wanted else [deployment(wanted)]
        plan = self.rollouts.paced(key, snapshot, Plan(apply=[*apply, {"kind": "Service"}], requeue_after=45.0))
        assert {"kind": "Service"} in plan.apply, "only the Deployment waits"
        written = any(body["kind"] == "Deployment" for body in plan.apply)
        if written:
            self.content[name] = wanted
            self.replacing.add(name)
        elif apply:
            assert plan.requeue_after == 15.0
        return written


def test_ten_models_are_replaced_two_at_a_time() -> None:
    fleet, most = Fleet(10, limit=2), 0
    for _ in range(10):
        for name in fleet.content:
            fleet.look(name)
            most = max(most, len(fleet.replacing))
        fleet.replacing.clear()  # their pods are ready
    assert most == 2
    assert set(fleet.content.values()) == {"new"}


def test_what_a_user_edits_is_not_held_up() -> None:
    fleet = Fleet(2, limit=1)
    assert fleet.look("m0")
    assert not fleet.look("m1")
    assert fleet.look("m1", edited=True)


def test_a_foreign_edit_is_put_back_and_a_first_deployment_made_at_once() -> None:
    fleet = Fleet(2, limit=1)
    fleet.look("m0")
    same = deployment("old")
    snapshot = Snapshot(now=0.0, object={"metadata": {"name": "m1"}, "status": {}}, children={"Deployment": same})
    assert fleet.rollouts.paced(("SereDeployment", "ns", "m1"), snapshot, Plan(apply=[deployment("old")])).apply
    first = Snapshot(now=0.0, object={"metadata": {"name": "m9"}, "status": {}})
    assert fleet.rollouts.paced(("SereDeployment", "ns", "m9"), first, Plan(apply=[deployment("new")])).apply


def test_a_rollout_that_is_stuck_or_gone_keeps_no_other_waiting() -> None:
    fleet = Fleet(3, limit=1)
    fleet.look("m0")
    fleet.now += STUCK_S - 1
    assert not fleet.look("m1")
    fleet.now += 1
    assert fleet.look("m1")
    assert not fleet.look("m2")
    fleet.rollouts.forget(("SereDeployment", "ns", "m1"))
    assert fleet.look("m2")


def test_a_new_process_sees_what_is_under_way() -> None:
    fleet = Fleet(2, limit=1)
    fleet.look("m0")
    fleet.rollouts = Rollouts(1, clock=lambda: fleet.now)
    fleet.look("m0")
    assert not fleet.look("m1")
