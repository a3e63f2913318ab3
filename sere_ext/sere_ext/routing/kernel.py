"""The compiled re-routing kernels (`csrc/`) as Python sees them: codes, limits, and calls on addresses by ctypes.

A decode step calls `reroute` once per MoE layer, so a call must cost microseconds where a chain of torch operators would
cost hundreds. What stays the same for a layer is put into a `Layer` once; a call passes addresses and sizes.
A call under kind `exact` writes no id and no weight, but reads every slot all the same, since its counters are what a policy's are
compared with: that is their price (on CUDA two barriers and the adds to the sets of experts).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable
from ctypes import POINTER, byref, c_char_p, c_int, c_int32, c_int64, c_uint32, c_void_p
from typing import Any

from sere_ext.contract.errors import UnsupportedError
from sere_ext.contract.policy import Kind
from sere_ext.routing import build

# The numbers of csrc/reroute_core.h; a test compares them.
CODES = {kind: code for code, kind in enumerate((Kind.EXACT, Kind.SERE, Kind.TOPK, Kind.OEA, Kind.BUDGET, Kind.HYBRID))}
SOFTMAX, SIGMOID = 0, 1
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2
REPEAT, MINUS_ONE = 0, 1  # what the id of a freed slot becomes
MAX_EXPERTS, MAX_TOP_K = 512, 32
# Columns of a policy table's row (int32; the share as the bits of a float32) and of a counter row (int64).
MIN_TOKENS, MAX_TOKENS, KIND, TOP_SLOTS, MAX_ACTIVE, MIN_SHARE, COLUMNS = range(7)
CALLS, TOKENS, ACTIVE_BEFORE, ACTIVE_AFTER, SLOTS, REROUTED, MERGED = range(7)
COUNTERS = ("calls", "tokens", "activeBefore", "activeAfter", "slots", "rerouted", "merged")


def bits_of(experts: Iterable[int]) -> ctypes.Array[c_uint32]:
    """A set of experts as the kernels read it: bit e % 32 of word e // 32."""
    words = (c_uint32 * (MAX_EXPERTS // 32))()
    for expert in experts:
        words[expert // 32] |= 1 << expert % 32
    return words


class Layer(ctypes.Structure):
    """`sere::Layer`: addresses of what holds for one MoE layer. Their owner must outlive it."""

    _fields_ = (
        ("table", c_void_p),  # int32 [MAX_BUCKETS, COLUMNS]
        ("neighbours", c_void_p),  # uint16 [E, E - 1]
        ("limits", c_void_p),  # uint16 [MAX_BUCKETS, E]
        ("counters", c_void_p),  # int64 [MAX_BUCKETS + 1, len(COUNTERS)]
        ("real", c_void_p),  # int32 [1]
        ("experts", c_int32),
        ("renormalise", c_int32),
        ("scoring", c_int32),
        ("freed", c_int32),
        ("constants", c_uint32 * (MAX_EXPERTS // 32)),  # set of experts, one bit each
    )


class Call(ctypes.Structure):
    """`sere::Call`: addresses of one call's tensors, all contiguous. Ids and weights are rewritten in place."""

    _fields_ = (
        ("ids", c_void_p),  # [T, k] int32 or int64
        ("weights", c_void_p),  # [T, k] float32
        ("logits", c_void_p),  # [T, logits_columns] of `logits_type`
        ("tokens", c_int64),
        ("top_k", c_int32),
        ("wide_ids", c_int32),
        ("logits_type", c_int32),
        ("logits_columns", c_int32),
    )


@functools.cache
def _cpu() -> Any:
    found = ctypes.CDLL(str(build.library("cpu")))
    found.sere_reroute_cpu.argtypes = [POINTER(Layer), POINTER(Call)]
    found.sere_columns_in_use.argtypes = [c_void_p, c_int64, c_int64]
    found.sere_columns_in_use.restype = c_int64
    return found


@functools.cache
def _cuda() -> Any:
    found = ctypes.CDLL(str(build.library("cuda")))
    found.sere_reroute_cuda.argtypes = [POINTER(Layer), POINTER(Call), c_void_p]
    found.sere_cuda_error.argtypes = [c_int]
    found.sere_cuda_error.restype = c_char_p
    return found


def load(device: str) -> None:
    """Find or build the kernel of a device, so that no step waits for it.

    Args:
        device: torch device type, `cpu` or `cuda`.

    Raises:
        UnsupportedError: it cannot be had; says what to install.
    """
    try:
        _cuda() if device == "cuda" else _cpu()
    except OSError as error:  # not a library, or one of another machine
        raise UnsupportedError(
            f"the {device} kernel cannot be loaded ({error}); remove that file to have it built again"
        ) from error


def reroute_cpu(layer: Layer, call: Call) -> None:
    """Re-route one call on the CPU, as `reference.reroute` specifies."""
    _cpu().sere_reroute_cpu(byref(layer), byref(call))


def reroute_cuda(layer: Layer, call: Call, stream: int) -> None:
    """Launch the same on a CUDA stream, given by its handle; addresses are the device's.

    Raises:
        RuntimeError: the launch was refused.
    """
    if code := _cuda().sere_reroute_cuda(byref(layer), byref(call), stream):
        raise RuntimeError(f"sere: the CUDA kernel was not launched: {_cuda().sere_cuda_error(code).decode()}")


def columns_in_use(weights: int, tokens: int, top_k: int) -> int:
    """1 + the last column of the float32 [T, k] at address `weights` that holds anything but 0; at least 1."""
    return int(_cpu().sere_columns_in_use(weights, tokens, top_k))
