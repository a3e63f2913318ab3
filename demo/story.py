"""What the second stage tells of a rollout while it goes on. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sere_operator.api.conditions import Reason


class Story:
    """What is to be told of a rollout: its condition PolicyApplied whenever it changes, and that the canary passed.

    The message that the canary passed stays in the condition for an instant only, which whoever asks twice a second can miss. The
    operator also posts it as an Event, right after it has written the condition, and an Event stays.
    """

    def __init__(self) -> None:
        self._line = ""
        self._passed: set[str] = set()  # messages that were told

    def news(self, condition: dict[str, Any], passed: Callable[[], list[str]]) -> list[str]:
        """Lines that are new, in the order in which they came true.

        Args:
            condition: PolicyApplied as it is now.
            passed: asks for the messages of Events of a canary that passed. It is called once the canary is over.
        """
        line, message = f"{condition.get('reason')}: {condition.get('message')}", condition.get("message", "")
        if line == self._line:
            return []
        self._line = line
        found = []
        if condition.get("reason") in (Reason.PROMOTING, Reason.APPLIED):
            new = [text for text in passed() if text not in self._passed]
            self._passed.update((*new, message))
            found = [f"CanaryPassed: {text}" for text in new if text != message]
        return [*found, line]
