"""What an engine without a model says of itself: the body of `GET /sere` for fakes."""

from __future__ import annotations

from typing import Any

from sere_ext.contract.policy import Policy
from sere_ext.contract.profile import ProfileKey
from sere_ext.contract.state import CounterRow, EngineState, ModelShape, RankInForce, RankState, by_key


def engine_state(digest: str, key: dict[str, Any], *, ranks: tuple[str, ...] | None = None, **fields: Any) -> EngineState:
    """A ready engine that serves the policy with this digest.

    Args:
        key: of a profile that fits the engine.
        ranks: digests that its ranks apply, where they differ.
        fields: of `EngineState`, to set otherwise.
    """
    generation = fields.get("generation", 0)
    said = (RankInForce(rank=rank, policy_digest=its, generation=generation) for rank, its in enumerate(ranks or (digest,)))
    whole: dict[str, Any] = {
        "ready": True, "source": "file", "policy": Policy(), "policy_digest": digest, "generation": generation, "switches": 0,
        "key": ProfileKey.model_validate(key), "model": ModelShape(num_experts=16, top_k=4, moe_layers=(0,)), "counters": (),
        "ranks": tuple(said),
    }  # fmt: skip
    return EngineState(**whole | fields)


def counted(state: EngineState | RankState, policy: Policy) -> CounterRow:
    """What was counted in the first bucket of a policy without layer groups."""
    return by_key(state.counters)[policy.digest, None, policy.buckets[0].label]
