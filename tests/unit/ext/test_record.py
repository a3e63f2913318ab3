"""The bounded record of router calls: what is kept, and that it comes back as it was."""

import numpy as np
import torch

from sere_autotune.trial.routing import Routing
from sere_ext.routing import ops
from sere_ext.routing.kernel import SOFTMAX
from sere_ext.routing.record import CALLS_PER_SIZE, EVERY, MAX_TOKENS, Recorder
from sere_ext.routing.state import LayerState


def call(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logits = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(seed))
    weights, ids = logits.softmax(-1).topk(4, -1)
    return weights, ids.int(), logits


def test_every_eighth_call_of_a_size_is_kept_up_to_four() -> None:
    recorder = Recorder()
    for step in range(100):
        recorder.add(*call(16, step))
        recorder.add(*call(3, step))
    recorder.add(*call(MAX_TOKENS + 1))
    sizes = [kept["tokens"] for kept in recorder.calls]
    assert sizes.count(16) == sizes.count(3) == CALLS_PER_SIZE and len(sizes) == 2 * CALLS_PER_SIZE
    kept = [k for k in recorder.calls if k["tokens"] == 16]
    for index, found in enumerate(kept):
        assert np.frombuffer(found["ids"], "<i4").tolist() == call(16, EVERY * index)[1].flatten().tolist()


def test_what_is_kept_comes_back_and_padding_does_not() -> None:
    """Through the operator itself: 16 rows, 12 of them real."""
    layer = LayerState(0, 16, 4, True, SOFTMAX)
    layer.recorder, layer.real[0] = Recorder(), 12
    slot = ops.bind([layer])
    weights, ids, logits = call(16)
    torch.ops.sere.reroute(weights.clone(), ids.clone(), logits, slot)
    routing = Routing.of([{"renormalise": True, "scoring": SOFTMAX, "calls": layer.recorder.calls}])
    assert routing is not None
    (found,) = routing.calls[0]
    assert found.ids.tolist() == ids[:12].tolist()
    assert np.allclose(found.weights, weights[:12]) and np.allclose(found.logits, logits[:12], atol=2e-3)
    assert (routing.experts, routing.top_k) == (16, 4)
    assert Routing.of([{"renormalise": True, "scoring": SOFTMAX, "calls": []}]) is None
