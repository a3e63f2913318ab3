"""From a candidate's blocks to a verdict, and from verdicts to the chosen candidate."""

from dataclasses import replace

import numpy as np
import pytest
from sere_autotune.certify.verdict import judge, walk
from sere_autotune.study.schema import MeasuredBlock


@pytest.mark.parametrize(
    ("verdicts", "chosen", "ended"),
    [
        ([], None, False),
        (["passed"], 0, False),
        (["slo", "passed"], 1, False),  # a candidate over a latency limit is skipped: the safe ones are slow
        (["passed", "accuracy"], 0, True),
        (["accuracy"], None, True),  # nothing beyond the first failure is ever looked at
        (["passed", "slo"], 0, False),
    ],
)
def test_the_fixed_sequence(verdicts: list[str], chosen: int | None, ended: bool) -> None:
    assert walk(verdicts) == (chosen, ended)


def blocks(
    lost: int, gained: int, n: int, tpot: tuple[float, float] = (20.0, 15.0), pairs: int = 10, seed: int = 0
) -> list[MeasuredBlock]:
    rng = np.random.default_rng(seed)
    found = []
    per = n // pairs
    for pair in range(pairs):
        for routing in ("exact", "chosen"):
            right = ""
            for i in range(pair * per, (pair + 1) * per):
                exact_right = i >= gained
                chosen_right = (exact_right and not (gained <= i < gained + lost)) or i < gained
                right += str(int(exact_right if routing == "exact" else chosen_right))
            scale = tpot[routing == "chosen"]
            times = {m: list(scale * np.exp(rng.normal(0, 0.1, per))) for m in ("tpot", "ttft", "e2el")}
            items = [f"item{i}" for i in range(pair * per, (pair + 1) * per)]
            found.append(MeasuredBlock(pair, 0, routing, items, right, ["x"] * per, times, 10.0, per, 0, 16.0))
    return found


def test_a_candidate_passes_fails_on_accuracy_or_on_latency() -> None:
    limits = [("tpot", "p95", 25.0)]
    passed = judge(blocks(4, 2, 3000), limits, 0.01, 0.05, 0.0)
    assert (passed.verdict, passed.items, passed.losses, passed.gains) == ("passed", 3000, 4, 2)
    assert passed.speedup["p95"].value == pytest.approx(20 / 15, rel=0.1)
    assert passed.upper_bound < 0.01
    worse = judge(blocks(60, 0, 3000), limits, 0.01, 0.05, 0.0)
    assert worse.verdict == "accuracy"
    assert "-2.00 points" in worse.reason
    slow = judge(blocks(4, 2, 3000, (20.0, 24.0)), limits, 0.01, 0.05, 0.0)
    assert slow.verdict == "slo"
    assert "TPOT p95" in slow.reason
    assert "25 ms" in slow.reason


def test_a_repeated_item_is_no_new_evidence() -> None:
    once = blocks(0, 0, 150, pairs=5)
    again = [replace(b, pair=b.pair + 5) for b in once]
    result = judge([*once, *again], [], 0.01, 0.05, 0.0)
    assert result.items == 150
    assert result.verdict == "accuracy"  # 149 certify 2 points, 299 would be needed for 1


def test_too_few_requests_leave_a_percentile_undecided_and_undecided_never_passes() -> None:
    enough = judge(blocks(0, 0, 3000, pairs=5), [("tpot", "p99", 40.0)], 0.01, 0.05, 0.0)
    assert enough.slo[0]["verdict"] == "pass"
    few = judge(blocks(0, 0, 250, pairs=5), [("tpot", "p99", 19.3)], 0.05, 0.05, 0.0)
    assert few.slo[0]["verdict"] == "undecided"
    assert few.verdict == "slo"


def test_a_limit_far_above_everything_seen_is_kept_even_on_few_requests() -> None:
    few = judge(blocks(0, 0, 250, pairs=5), [("tpot", "p99", 200.0)], 0.05, 0.05, 0.0)
    assert few.slo[0]["high"] > 0.01  # the share alone could not tell
    assert few.slo[0]["verdict"] == "pass"


def test_failed_requests_count_against_a_candidate() -> None:
    some = blocks(0, 0, 600)
    broken = [replace(b, failures=1) for b in some]
    assert judge(broken, [], 0.01, 0.05, 0.0).verdict == "slo"
    assert judge(broken, [], 0.01, 0.05, 0.1).verdict == "passed"
