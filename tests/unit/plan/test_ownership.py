"""Two operators that see one resource: one yields, a dead one is replaced, and nobody writes for ever."""

from __future__ import annotations

from typing import Any

from sere_operator.plan.ownership import CHALLENGE_S, marked, yielded
from sere_operator.plan.patch import merged
from sere_operator.plan.snapshot import Plan, Resource

A, B = "sere-system/a", "team/b"


class World:
    """One resource, and operators that look at it in turns."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0
        self.status: dict[str, Any] = {}
        self.writes: list[str] = []
        self.events: list[str] = []

    def look(self, who: str, may_challenge: bool = True) -> bool:
        """One look of this operator; whether it carried out its own plan."""
        metadata = {"name": "m", "namespace": "ns", "uid": "u", "generation": 1}
        seen = Resource(now=self.now, object={"kind": "SereDeployment", "metadata": metadata, "status": dict(self.status)})
        plan = yielded(seen, who, may_challenge)
        mine = plan is None
        if plan is None:
            # As `decide` does: its status knows nothing of operators, so its patch would take their names out.
            gone = {key: None for key in ("operator", "challenger") if key in self.status}
            plan = marked(seen, Plan(status=gone or None, requeue_after=45.0), who)
        if plan.status:
            self.status = merged(self.status, plan.status)
            self.writes.append(who)
        self.events += [event.reason for event in plan.events]
        assert plan.requeue_after is not None
        return mine


def test_one_operator_writes_its_name_once() -> None:
    world = World()
    assert world.look(A) and world.look(A)
    assert (world.status, world.writes, world.events) == ({"operator": A}, [A], [])


def test_the_second_yields_says_whose_it_is_and_is_answered_by_the_first() -> None:
    world = World()
    world.look(A)
    assert not world.look(B)
    assert world.status["challenger"]["name"] == B and world.events == ["NotOurs"]
    assert not world.look(B), "it waits for an answer"
    assert world.look(A), "the owner lives"
    assert world.status == {"operator": A}
    for _ in range(5):
        assert not world.look(B, may_challenge=False)
        assert world.look(A)
    assert world.writes == [A, B, A], "no further write"


def test_an_operator_that_is_gone_is_replaced() -> None:
    world = World()
    world.look(A)
    world.look(B)
    world.now += CHALLENGE_S - 1
    assert not world.look(B)
    world.now += 1
    assert world.look(B)
    assert world.status == {"operator": B}
    assert world.events == ["NotOurs", "TakenOver"]
    assert not world.look(A), "the first one comes back and yields"


def test_a_third_one_does_not_push_in() -> None:
    world = World()
    world.look(A)
    world.look(B)
    assert not world.look("x/c")
    assert world.status["challenger"]["name"] == B


def test_what_is_being_deleted_is_not_marked() -> None:
    seen = Resource(now=0.0, object={"metadata": {"deletionTimestamp": "now"}})
    assert marked(seen, Plan(), A).status is None
