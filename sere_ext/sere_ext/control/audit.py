"""The audit trail of live control: one log line for every change that was made or refused, whatever its source.

    sere audit: {"outcome": "applied", "source": "http", "who": "token 5e88489c from 127.0.0.1:52144", "from": "exact",
                 "to": "sere-9f3c01d2", "generation": 3, "policy": "topk 2 for 8-64 tokens, exact elsewhere"}

`who` is the token's fingerprint and the peer's address for HTTP, and the directory and the file in it that decided for the
declarative source. A refusal has `error` in place of what was put in force. Lines are written at level INFO.
"""

from __future__ import annotations

import hashlib
import json
import logging
from typing import Any

from sere_ext.contract.errors import SereError
from sere_ext.contract.policy import Policy
from sere_ext.contract.state import RankState

logger = logging.getLogger("vllm.sere")
PREFIX = "sere audit: "


def fingerprint(token: str) -> str:
    """8 hex digits of a token's SHA-256, which tell tokens apart without giving them away."""
    return hashlib.sha256(token.encode()).hexdigest()[:8]


def applied(source: str, who: str, policy: Policy, state: RankState, *, clean: bool = False) -> None:
    """Log a change that every rank has read back. `state` is a rank's answer, with the digest that it `replaced`."""
    _write(
        outcome="applied", source=source, who=who, **{"from": state.replaced}, to=policy.digest,
        generation=state.generation, clean=clean, policy=policy.describe(),
    )  # fmt: skip


def refused(source: str, who: str, error: SereError | str, *, policy: Policy | None = None) -> None:
    """Log a change that was asked for and not made."""
    text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    _write(outcome="refused", source=source, who=who, to=policy.digest if policy else None, error=text)


def _write(**fields: Any) -> None:
    logger.info("%s%s", PREFIX, json.dumps({name: value for name, value in fields.items() if value is not None}))
