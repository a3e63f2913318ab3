"""The CPU kernel of re-routing: `reference.reroute` as one compiled loop (numba, single thread, no GIL).

A decode step calls this once per MoE layer, so a call must cost microseconds where a chain of torch operators would
cost hundreds. numba is a dependency of vLLM. Compiled on first use per id dtype (seconds), see `warm_up`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit  # type: ignore[import-untyped]

# Codes of `policy.Kind` inside tables; a CUDA kernel reads the same.
EXACT, SERE, TOPK, OEA = 0, 1, 2, 3
SOFTMAX, SIGMOID = 0, 1
# Columns of a counter row.
CALLS, TOKENS, ACTIVE_BEFORE, ACTIVE_AFTER, SLOTS, REROUTED, MERGED = range(7)
COUNTERS = ("calls", "tokens", "activeBefore", "activeAfter", "slots", "rerouted", "merged")

_NOBODY = -1


def _shield_llvmlite() -> None:
    """Make llvmlite's library object answer "no such attribute" when asked for `__dict__`.

    vLLM's CPU platform looks through all attributes of all loaded modules at engine start and fails on that object, which
    answers any name with a function (seen with vLLM 0.32, llvmlite 0.47). So an engine could not start in a process that
    has loaded numba, for instance a second `LLM`.
    """
    from llvmlite.binding import ffi  # type: ignore[import-untyped]

    library = type(ffi.lib)
    if library.__name__ == "_Shielded":
        return

    class _Shielded(library):  # type: ignore[misc, valid-type]
        __slots__ = ()

        def __getattr__(self, name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            return super().__getattr__(name)

    ffi.lib.__class__ = _Shielded


_shield_llvmlite()


def _compiled(function: Callable[..., Any]) -> Any:
    """Compile with numba, keeping the machine code on disk where some cache directory can be written."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # read-only file system and home: compile in every process
        return njit(nogil=True)(function)


@_compiled
def reroute(
    ids: Any,  # [T, k] int32 or int64
    weights: Any,  # [T, k] float32
    padding: Any,  # [T] bool, or [0] if every row is real
    kind: int,
    S: int,
    rho: Any,  # float32
    neighbours: Any,  # [E, E - 1] int32, most similar first
    similarities: Any,  # [E, E - 1] float32, in the order of `neighbours`
    renormalise: bool,
    logits: Any,  # [T, E] float32, or [0, 0] unless kind is OEA
    scoring: int,
    out_ids: Any,  # [T, k]
    out_weights: Any,  # [T, k]
    counter: Any,  # [7] int64, added to
) -> None:
    T, k = ids.shape
    E = neighbours.shape[0]
    masked = padding.shape[0] == T
    zero = np.float32(0.0)
    before = np.zeros(E, np.uint8)
    primary = np.zeros(E, np.uint8)
    after = np.zeros(E, np.uint8)
    keep = np.zeros((T, k), np.uint8)  # 0 does not count, 1 counts, 2 is among the top S
    best = np.full(T, _NOBODY, np.int64)  # slot of the largest weight
    tokens = 0
    slots = 0
    for t in range(T):
        if masked and padding[t]:
            continue
        tokens += 1
        for j in range(k):
            e = ids[t, j]
            w = weights[t, j]
            if e >= 0 and e < E and w != zero and w == w:
                keep[t, j] = 1
                before[e] = 1
                slots += 1
        if kind == EXACT:
            continue
        for rank in range(min(S, k)):
            top = _NOBODY
            for j in range(k):
                if keep[t, j] == 1 and (
                    top == _NOBODY
                    or weights[t, j] > weights[t, top]
                    or (weights[t, j] == weights[t, top] and ids[t, j] < ids[t, top])
                ):
                    top = j
            if top == _NOBODY:
                break
            if rank == 0:
                best[t] = top
            keep[t, top] = 2
            primary[ids[t, top]] = 1

    counter[CALLS] += 1
    counter[TOKENS] += tokens
    counter[SLOTS] += slots
    active = 0
    for e in range(E):
        active += before[e]
    counter[ACTIVE_BEFORE] += active
    if kind == EXACT:
        for t in range(T):
            for j in range(k):
                out_ids[t, j] = ids[t, j]
                out_weights[t, j] = weights[t, j]
        counter[ACTIVE_AFTER] += active
        return

    target = np.arange(E)
    if kind == SERE:
        for u in range(E):
            if before[u] == 0 or primary[u] == 1:
                continue
            for n in range(E - 1):
                if primary[neighbours[u, n]] == 1:
                    if similarities[u, n] >= rho:
                        target[u] = neighbours[u, n]
                    break

    rerouted = 0
    merged = 0
    new_ids = np.empty(k, np.int64)
    new_weights = np.empty(k, np.float32)
    held = np.zeros(E, np.uint8)
    for t in range(T):
        if best[t] == _NOBODY:  # padding, or nothing to re-route
            for j in range(k):
                out_ids[t, j] = ids[t, j]
                out_weights[t, j] = weights[t, j]
            continue
        top = best[t]
        for j in range(k):
            new_ids[j] = ids[t, j]
            new_weights[j] = weights[t, j]
        if kind == SERE:
            for j in range(k):
                if keep[t, j] == 0:
                    continue
                e = target[ids[t, j]]
                new_ids[j] = e
                if e != ids[t, j]:
                    rerouted += 1
                for i in range(j):
                    if keep[t, i] != 0 and new_ids[i] == e:
                        new_weights[i] += new_weights[j]
                        new_weights[j] = zero
                        break
        else:
            for j in range(k):
                if keep[t, j] == 1:
                    new_ids[j] = ids[t, top]
                    new_weights[j] = zero
            if kind == OEA:
                for j in range(k):
                    if keep[t, j] == 2:
                        held[ids[t, j]] = 1
                anchor = logits[t, ids[t, top]]
                for j in range(k):
                    if keep[t, j] != 1:
                        continue
                    choice = _NOBODY
                    for e in range(E):
                        if primary[e] == 1 and held[e] == 0 and (choice == _NOBODY or logits[t, e] > logits[t, choice]):
                            choice = e
                    if choice == _NOBODY:
                        break
                    held[choice] = 1
                    new_ids[j] = choice
                    if scoring == SOFTMAX:
                        ratio = np.exp(logits[t, choice] - anchor)
                    else:
                        one = np.float32(1.0)
                        ratio = (one + np.exp(-anchor)) / (one + np.exp(-logits[t, choice]))
                    new_weights[j] = weights[t, top] * ratio
                    if choice != ids[t, j]:
                        rerouted += 1
                for j in range(k):
                    if keep[t, j] != 0:
                        held[ids[t, j]] = 0
                        held[new_ids[j]] = 0
            if renormalise:
                old = zero
                new = zero
                for j in range(k):
                    if keep[t, j] != 0:
                        old += weights[t, j]
                        new += new_weights[j]
                if new != zero:
                    scale = old / new
                    for j in range(k):
                        if keep[t, j] != 0:
                            new_weights[j] *= scale
        n = 0
        for j in range(k):
            if new_weights[j] != zero:
                out_ids[t, n] = new_ids[j]
                out_weights[t, n] = new_weights[j]
                n += 1
                if keep[t, j] != 0:
                    after[new_ids[j]] = 1
        for j in range(k):
            if new_weights[j] == zero:
                out_ids[t, n] = new_ids[j]
                out_weights[t, n] = zero
                n += 1
                if keep[t, j] != 0:
                    merged += 1

    active = 0
    for e in range(E):
        active += after[e]
    counter[ACTIVE_AFTER] += active
    counter[REROUTED] += rerouted
    counter[MERGED] += merged


@_compiled
def columns_in_use(weights: Any) -> int:
    """1 + the last column of `weights` [T, k] that holds anything but 0; at least 1."""
    T, k = weights.shape
    used = 1
    for t in range(T):
        for j in range(k - 1, used - 1, -1):
            if weights[t, j] != 0:
                used = j + 1
                break
    return used


def warm_up(dtype: Any) -> None:
    """Compile for one id dtype, so that the first request does not pay for it."""
    ids = np.zeros((1, 1), dtype)
    weights = np.ones((1, 1), np.float32)
    table = np.zeros((1, 0), np.int32), np.zeros((1, 0), np.float32)
    none = np.zeros(0, np.bool_)
    scratch = np.zeros(len(COUNTERS), np.int64)
    logits = np.zeros((0, 0), np.float32)
    reroute(ids, weights, none, SERE, 1, np.float32(0), *table, False, logits, 0, ids.copy(), weights.copy(), scratch)
    columns_in_use(weights)
