"""The three ways a condition changes, and that types and reasons document themselves."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from sere_operator.api.conditions import ConditionType, Reason, find_condition, set_condition, timestamp

NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
LATER = NOW + timedelta(hours=1)


def ready(conditions: list[dict[str, object]], status: bool | None, reason: Reason, message: str, generation: int, now: datetime):
    return set_condition(conditions, ConditionType.READY, status, reason, message, generation=generation, now=now)


def test_a_new_condition_is_added_with_the_time_of_now() -> None:
    other = {"type": "Available", "status": "True"}
    assert ready([other], False, Reason.STARTING, "loading", 3, NOW) == [
        other,
        {
            "type": "Ready", "status": "False", "reason": "Starting", "message": "loading",
            "observedGeneration": 3, "lastTransitionTime": "2026-01-01T12:00:00Z",
        },
    ]  # fmt: skip


def test_the_same_status_keeps_its_transition_time_and_takes_the_rest() -> None:
    before = ready([], False, Reason.STARTING, "loading", 3, NOW)
    after = ready(before, False, Reason.POLICY_PENDING, "1 of 2 pods", 4, LATER)
    assert after[0]["lastTransitionTime"] == timestamp(NOW)
    assert (after[0]["reason"], after[0]["message"], after[0]["observedGeneration"]) == ("PolicyPending", "1 of 2 pods", 4)


def test_another_status_moves_the_transition_time() -> None:
    before = ready([], False, Reason.STARTING, "loading", 3, NOW)
    after = ready(before, True, Reason.SERVING, "serving", 3, LATER)
    assert after[0]["lastTransitionTime"] == timestamp(LATER)
    assert ready(after, None, Reason.STARTING, "?", 3, NOW)[0]["status"] == "Unknown"


def test_nothing_new_is_nothing_to_write_and_the_input_is_never_changed() -> None:
    before = ready([], True, Reason.SERVING, "serving", 3, NOW)
    copy = [dict(condition) for condition in before]
    assert ready(before, True, Reason.SERVING, "serving", 3, LATER) == before
    ready(before, False, Reason.STARTING, "x", 4, LATER)
    assert before == copy


def test_find() -> None:
    conditions = ready([], True, Reason.SERVING, "serving", 3, NOW)
    found = find_condition(conditions, ConditionType.READY)
    assert found is not None
    assert found["reason"] == "Serving"
    assert find_condition(conditions, ConditionType.TUNED) is None


@pytest.mark.parametrize("member", [*ConditionType, *Reason], ids=str)
def test_each_is_camel_case_and_has_a_sentence(member: ConditionType | Reason) -> None:
    assert member.value.isalpha()
    assert member.value[0].isupper()
    assert member.doc.endswith("."), "the reference page prints it"
