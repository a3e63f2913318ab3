"""Every MoE family that the CPU engine serves: off is stock bit for bit, on is the oracle's routing, at the experts' door.

What a router answers and what reaches the experts are both recorded inside the engine, so a family whose layers pass the
seam by, reorder slots or share state would show. `families.py` has the models, `inside.py` the taps.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from sere_ext.contract.errors import UnsupportedError
from sere_ext.contract.policy import Policy
from sere_ext.control.switch import llm_states, switch_llm
from tests.kit import families
from tests.kit.inside import (
    NEW_TOKENS,
    PROMPT_LENGTHS,
    Recorder,
    answers,
    check_oracle,
    engine,
    random_similarity,
    recording,
    same,
)
from tests.kit.states import counted

pytestmark = pytest.mark.timeout(900)  # two engines, of which each may start for minutes on busy cores


@pytest.fixture(scope="module")
def recorder() -> Iterator[Recorder]:
    with recording() as kept:
        yield kept


@pytest.mark.parametrize("family", families.SERVED)
def test_off_is_stock_and_on_is_the_oracle(family: str, recorder: Recorder, tmp_path: Path) -> None:
    model = families.write(family, tmp_path / "model")
    with engine(model) as llm:
        recorder.clear()
        stock = answers(llm)
        calls = list(recorder.received)
    assert calls, "no MoE layer ran"
    assert same(calls, recorder.routed), "without the plug-in the experts get what the router said"

    with engine(model, additional_config={"sere": {}}) as llm:
        shape = llm_states(llm)[0].model
        layers, experts, S = shape.moe_layers, shape.num_experts, max(shape.top_k // 2, 1)
        recorder.clear()
        assert answers(llm) == stock, "off: the same tokens and log-probabilities"
        assert same(recorder.received, calls), "off: the same ids and weights at the experts"

        path = tmp_path / "similarity.safetensors"
        matrices = random_similarity(model, layers, experts, path)
        policy = Policy.parse({"buckets": [{"minTokens": 1, "kind": "sere", "S": S, "rho": 0.3}]})
        switch_llm(llm, policy, similarity=str(path))
        recorder.clear()
        changed = answers(llm)
        counters = counted(llm_states(llm)[0], policy)

    assert [len(tokens) for tokens, _ in changed] == [NEW_TOKENS] * len(PROMPT_LENGTHS), "on: it still generates"
    assert all(np.isfinite(logprob) for _, logprobs in changed for logprob in logprobs)
    assert len(recorder.routed) == NEW_TOKENS * len(layers), "every layer in every step"
    moved = check_oracle(recorder, policy.buckets[0], [matrices[layer] for layer in layers], experts)
    assert moved == counters.rerouted > 0, "the oracle moved something, and the operator counted the same"


@pytest.mark.parametrize(("family", "says"), families.REFUSED.items(), ids=families.REFUSED)
def test_a_family_that_cannot_work_is_refused_by_name(family: str, says: str, recorder: Recorder, tmp_path: Path) -> None:
    model = families.write(family, tmp_path / "model")
    with engine(model) as llm:
        assert answers(llm), "stock vLLM serves it, so the refusal is ours"
    with pytest.raises(UnsupportedError, match=says), engine(model, additional_config={"sere": {}}):
        pass
