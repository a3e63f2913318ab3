"""What a policy would have done to recorded router calls: active experts, slots and moved weight, without the engine.

The calls come from the engine under exact routing (`Routing`); each is put through the kernel that the engine itself runs,
so active experts and slots are counted, not estimated. Hundreds of policies take a second on one core. Where an engine
cannot record, calls are drawn with the skew that published models show.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sere_autotune.trial.routing import Call, Matrix, Routing
from sere_autotune.tuning.space import Choice, spared_layers
from sere_ext.contract.policy import Bucket, Kind
from sere_ext.routing import kernel
from sere_ext.routing.state import LayerState
from sere_ext.similarity.file import sorted_neighbours

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Counts:
    """Of every choice of one bucket, means over calls and MoE layers; exact routing is choice 0.

    Arrays are [choices]. `slots` are those of a token. `moved` is the share of router weight that another expert gets, or none,
    than under exact routing. `size` is the tokens of the steps over those that exact routing has at the same load: 1 where the
    load is a number of requests in flight, less where it is a rate (`open_loop`).
    """

    active: Floats
    slots: Floats
    moved: Floats
    size: Floats


def replay(state: LayerState, calls: Sequence[Call], bucket: Bucket) -> tuple[float, float, float]:
    """(active experts, slots of a token, moved share of weight) under one row of a policy, means over one layer's calls."""
    state.load_table((bucket,))
    active = slots = moved = 0.0
    for call in calls:
        after, before = mix(*rerouted(state, call), state.experts), mix(call.ids, call.weights, state.experts)
        used = after != 0
        active += float(used.any(axis=0).sum())
        slots += float(used.sum()) / len(after)
        moved += 0.5 * float(np.abs(after - before).sum() / before.sum())
    return active / len(calls), slots / len(calls), moved / len(calls)


def rerouted(state: LayerState, call: Call) -> tuple[NDArray[np.int32], Matrix]:
    """Ids and weights [T, k] of a call under the table that a layer has in force."""
    ids, weights = call.ids.copy(), call.weights.copy()
    addresses = (ids.ctypes.data, weights.ctypes.data, call.logits.ctypes.data)
    kernel.reroute_cpu(state.struct, kernel.Call(*addresses, len(ids), ids.shape[1], False, kernel.FLOAT32, call.logits.shape[1]))
    return ids, weights


def mix(ids: NDArray[np.int32], weights: Matrix, experts: int) -> Floats:
    """Weight of every expert for every token, [T, E]; an expert that a token has twice counts with both weights."""
    cells = (np.arange(len(ids))[:, None] * experts + ids).ravel()
    return np.asarray(np.bincount(cells, weights.ravel(), len(ids) * experts), np.float64).reshape(len(ids), experts)


def layer_states(routing: Routing, similarity: Sequence[Matrix] | None) -> list[LayerState]:
    """What the kernel needs of every MoE layer.

    Args:
        similarity: one [E, E] matrix per layer, in the model's order; None takes all experts for equally alike.
    """
    kernel.load("cpu")
    states = []
    for index in range(len(routing.calls)):
        state = LayerState(index, routing.experts, routing.top_k, routing.renormalise, routing.scoring)
        alike = np.full((routing.experts, routing.experts), 0.5, np.float32)
        np.fill_diagonal(alike, 1.0)
        state.load_similarity(*sorted_neighbours(alike if similarity is None else similarity[index]))
        states.append(state)
    return states


def count(routing: Routing, similarity: Sequence[Matrix] | None, choices: Sequence[Choice], order: Sequence[int] = ()) -> Counts:
    """Replay every choice of a bucket on the steps that exact routing had.

    Args:
        similarity: as `layer_states` takes it.
        order: of the space's layers. Calls of other layers than the model's (assumed ones, or those of one pipeline stage) are
            taken in their own order.
    """
    states = layer_states(routing, similarity)
    known: dict[Choice, Floats] = {}

    def layered(choice: Choice) -> Floats:
        """[layers, 3] of a choice with whole S."""
        if choice not in known:
            bucket = Bucket(min_tokens=1, kind=choice.kind, S=int(choice.S) if choice.kind is not Kind.EXACT else None,
                            rho=choice.rho, min_share=choice.share or None)  # fmt: skip
            known[choice] = np.array([replay(state, calls, bucket) for state, calls in zip(states, routing.calls, strict=True)])
        return known[choice]

    layers = order if len(order) == len(states) else range(len(states))
    rows = np.array([between(choice, layers, layered).mean(axis=0) for choice in choices])
    active, slots, moved = rows.T
    return Counts(active, slots, moved, np.ones(len(rows)))


def between(choice: Choice, order: Sequence[int], layered: Callable[[Choice], Floats]) -> Floats:
    """Rows [layers, ...] of a choice, of which `layered(choice)` has those of whole S; `order` is that of the space's layers."""
    whole = int(choice.S)
    low = layered(Choice(choice.kind, whole, choice.rho, choice.share if choice.S > 1 and whole > 1 else 0.0))
    spared = list(spared_layers(choice, order))
    if not spared:
        return low
    found = low.copy()
    found[spared] = layered(Choice(choice.kind, whole + 1, choice.rho, choice.share))[spared]
    return found
