"""An MoE layer's experts by two plain Triton kernels: grouped matrix products without padding, for decode batches.

Slots are sorted by expert. A program takes one expert and one tile of output columns and goes over that expert's slots in blocks;
an expert without slots costs an early return, so what is read are the weights of active experts, each once per column tile.
"""

from typing import Any

import triton
import triton.language as tl


@triton.jit
def gate_up(x: Any, w13: Any, hidden: Any, order: Any, starts: Any, K: tl.constexpr, H: tl.constexpr, M: tl.constexpr,
            ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr) -> None:  # fmt: skip
    """hidden[place] = silu(gate) * up of the token in that place of the sorted slots.

    Args:
        x: [B, H] tokens. w13: [E, 2 M, H]. hidden: [B * K, M], by place in the order. order: [B * K] slot of each place.
        starts: [E + 1] first place of each expert.
    """
    expert = tl.program_id(0)
    first, last = tl.load(starts + expert), tl.load(starts + expert + 1)
    if first == last:
        return
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    weights = w13 + expert.to(tl.int64) * 2 * M * H + columns[None, :] * H + depth[:, None]
    for begin in range(first, last, ROWS):
        places = begin + tl.arange(0, ROWS)
        inside = places < last
        tokens = tl.load(order + places, mask=inside, other=0) // K
        gate = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        up = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for step in range(0, H, DEPTH):
            rows = tl.load(x + tokens[:, None] * H + step + depth[None, :], mask=inside[:, None], other=0.0)
            gate = tl.dot(rows, tl.load(weights + step), gate)
            up = tl.dot(rows, tl.load(weights + M * H + step), up)
        made = gate * tl.sigmoid(gate) * up
        tl.store(hidden + places[:, None] * M + columns[None, :], made.to(hidden.dtype.element_ty), mask=inside[:, None])


@triton.jit
def down(hidden: Any, w2: Any, weights: Any, out: Any, order: Any, starts: Any, H: tl.constexpr, M: tl.constexpr,
         ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr) -> None:  # fmt: skip
    """out[slot] = the slot's weight times its expert's answer.

    Args:
        hidden: [B * K, M], by place. w2: [E, H, M]. weights: [B * K] float32, by slot. out: [B * K, H] float32, by slot.
    """
    expert = tl.program_id(0)
    first, last = tl.load(starts + expert), tl.load(starts + expert + 1)
    if first == last:
        return
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    tile = w2 + expert.to(tl.int64) * H * M + columns[None, :] * M + depth[:, None]
    for begin in range(first, last, ROWS):
        places = begin + tl.arange(0, ROWS)
        inside = places < last
        slots = tl.load(order + places, mask=inside, other=0)
        answer = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for step in range(0, M, DEPTH):
            rows = tl.load(hidden + places[:, None] * M + step + depth[None, :], mask=inside[:, None], other=0.0)
            answer = tl.dot(rows, tl.load(tile + step), answer)
        weight = tl.load(weights + slots, mask=inside, other=0.0)
        tl.store(out + slots[:, None] * H + columns[None, :], answer * weight[:, None], mask=inside[:, None])
