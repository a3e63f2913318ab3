"""Another controller that changes an object as soon as it is put back: pauses that grow, and one Warning each."""

from __future__ import annotations

from typing import Any

from sere_operator.plan.snapshot import Event, Plan
from sere_operator.runtime.healing import FREE, PEACE_S, Healing
from sere_operator.runtime.reconciler import Key

KEY: Key = ("SereDeployment", "ns", "m")
HASH = "serving.sere.dev/config-hash"


def body(kind: str = "Deployment", content: str = "1") -> dict[str, Any]:
    return {"kind": kind, "metadata": {"name": "m", "annotations": {HASH: content}}}


def heal(kind: str = "Deployment", content: str = "1") -> Plan:
    return Plan(apply=[body(kind, content)], events=[Event("Normal", "Healed", "put back")], requeue_after=45.0)


def fight(healing: Healing, clock: list[float], seconds: float, kind: str = "Deployment") -> tuple[int, int]:
    """Somebody undoes each write at once, and the operator looks ten times a second: (writes, Warnings)."""
    writes = warnings = 0
    for _ in range(int(seconds * 10)):
        clock[0] += 0.1
        plan = healing.paced(KEY, heal(kind))
        writes += len(plan.apply)
        warnings += sum(event.reason == "Fighting" for event in plan.events)
    return writes, warnings


def test_a_fight_over_a_deployment_makes_few_pods_and_is_said() -> None:
    clock = [1000.0]
    healing = Healing(clock=lambda: clock[0])
    assert fight(healing, clock, 29) == (FREE, 1), "then a pause of 30 s"
    writes, warnings = fight(healing, clock, 3600)
    assert writes == warnings <= 7, "pauses of 30 s, 1 min, 2 min, ... 30 min"
    waiting = healing.paced(KEY, heal())
    assert not waiting.apply and not waiting.events, "nothing is called healed that was not put back"
    assert waiting.requeue_after is not None and waiting.requeue_after <= 45.0


def test_another_content_or_a_long_peace_begins_anew() -> None:
    clock = [1000.0]
    healing = Healing(clock=lambda: clock[0])
    fight(healing, clock, 10)
    assert healing.paced(KEY, heal(content="2")).apply, "the spec was edited"
    fight(healing, clock, 10)
    clock[0] += PEACE_S + 1801
    assert fight(healing, clock, 5) == (FREE, 1)


def test_the_policy_config_map_is_always_put_back_at_once() -> None:
    clock = [1000.0]
    healing = Healing(clock=lambda: clock[0])
    assert fight(healing, clock, 10, "ConfigMap") == (100, 0)


def test_what_the_api_server_refused_was_not_put_back() -> None:
    clock = [1000.0]
    healing = Healing(clock=lambda: clock[0])
    for _ in range(20):
        plan = healing.paced(KEY, heal())
        assert plan.apply and not any(event.reason == "Fighting" for event in plan.events)
        healing.not_written(KEY, plan)


def test_a_plan_without_a_fight_is_left_as_it_is_and_memory_is_given_back() -> None:
    clock = [1000.0]
    healing = Healing(clock=lambda: clock[0])
    plan = heal()
    assert healing.paced(KEY, plan) is plan
    clock[0] += 10_000
    healing.forget()
    assert healing._known == {}
