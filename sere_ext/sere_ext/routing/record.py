"""A bounded record of one MoE layer's router calls, from which a tuner counts what other policies would have done."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MAX_TOKENS = 256  # of a call that is kept: beyond it nearly all experts are active under any policy
CALLS_PER_SIZE = 4  # kept for each power of two of tokens
EVERY = 8  # calls of a size: consecutive steps have mostly the same sequences


@dataclass
class Recorder:
    """Keeps every eighth call of each size, up to four. The layers of a model see the same steps, so they keep the same."""

    constants: tuple[int, ...] = ()  # experts that answer with a constant: their slots are recorded as none (-1)
    calls: list[dict[str, Any]] = field(default_factory=list)
    _seen: dict[int, int] = field(default_factory=dict)

    def add(self, weights: Any, ids: Any, logits: Any) -> None:
        """Keep one call under exact routing, if it is due.

        Args:
            weights, ids: torch tensors [T, k] on the CPU, float32 and int32 or int64.
            logits: [T, E], of any float type.
        """
        tokens = len(ids)
        if not 1 <= tokens <= MAX_TOKENS:
            return
        size = tokens.bit_length()
        seen = self._seen.get(size, 0)
        self._seen[size] = seen + 1
        if seen % EVERY or seen >= EVERY * CALLS_PER_SIZE:
            return
        experts = int(logits.shape[1])
        for constant in self.constants:
            ids = ids.masked_fill(ids == constant, -1)
        self.calls.append({
            "tokens": tokens, "experts": experts,
            "ids": ids.int().numpy().tobytes(), "weights": weights.float().numpy().tobytes(),
            "logits": logits.float().numpy().astype("<f2").tobytes(),
        })  # fmt: skip
