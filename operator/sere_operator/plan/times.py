"""Times in a status: RFC 3339 text with whole seconds, in UTC. Pure."""

from __future__ import annotations

from datetime import UTC, datetime

from sere_operator.api.conditions import timestamp


def seconds(text: str | None) -> float:
    """RFC 3339 to seconds since the epoch; 0 for none."""
    return datetime.fromisoformat(text).timestamp() if text else 0.0


def stamp(now: float) -> str:
    """Seconds since the epoch to RFC 3339."""
    return timestamp(datetime.fromtimestamp(now, UTC))
