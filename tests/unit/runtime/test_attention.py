"""Time that nobody looked at counts for nothing."""

from __future__ import annotations

from sere_operator.runtime.attention import GAP_S, Attention
from sere_operator.runtime.reconciler import Key

A: Key = ("SereDeployment", "ns", "a")


def test_looks_that_follow_each_other_as_planned_add_up_and_a_gap_starts_anew() -> None:
    now = [100.0]
    attention = Attention(clock=lambda: now[0])
    assert attention.begin(A) == 0
    attention.end(A, 45.0)
    now[0] += 45 + GAP_S  # late, but not too late
    assert attention.begin(A) == 45 + GAP_S
    now[0] += 30  # the look itself takes long
    attention.end(A, 2.0)
    now[0] += 2
    assert attention.begin(A) == 77 + GAP_S
    attention.end(A, 2.0)
    now[0] += 2 + GAP_S + 0.1
    assert attention.begin(A) == 0


def test_a_look_that_failed_leaves_a_gap_and_what_is_gone_is_forgotten() -> None:
    now = [100.0]
    attention = Attention(clock=lambda: now[0])
    attention.begin(A)  # no end: it failed
    now[0] += GAP_S + 1
    assert attention.begin(A) == 0
    attention.end(A, None)
    assert attention.begin(A) == 0
