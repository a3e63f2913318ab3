"""The committed result of `make bench-tuner`: whole tuning studies beside simpler ways to search."""

import json
from typing import Any

import pytest

from benchmarks import tuner

MOST_REGRET = 0.08  # share of the best feasible policy's speed
INFEASIBLE = 0.0375  # largest share of studies that may end over the limit of accuracy: the level of a first certificate
LEAST_CHOSEN = 0.95  # share of the studies where at least `tuner.WORTH_HAVING` is to be had that must end with a policy


def broken(result: dict[str, Any]) -> list[str]:
    """What of the promise a result does not keep, in words."""
    found = {
        "mean regret": result["meanRegret"][tuner.OURS] > MOST_REGRET,
        "infeasible outcomes": result["infeasibleShare"] > INFEASIBLE,
        "nothing chosen": result["chosenShare"] < LEAST_CHOSEN,
    }
    for name in tuner.NAMES[1:]:
        paired = result["pairedWithOurs"][name]
        found[f"no less regret than {name}"] = not paired["lessRegret"] - paired["halfWidth95"] > 0
    return [words for words, so in found.items() if so]


def committed() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tuner.RESULT.read_text())
    return found


def test_the_committed_result_is_that_of_its_studies_and_within_what_is_promised() -> None:
    result = committed()
    made = json.loads(json.dumps(tuner.summary([tuner.Study(**each) for each in result["each"]])))
    assert {key: result[key] for key in made} == made, "each figure follows from the studies in the same file"
    assert broken(result) == []
    assert result["studies"] >= 130 and result["replayedStudies"] >= 30
    assert {*tuner.LAWS, tuner.REPLAYED} == set(result["worlds"])
    assert min(paired["studies"] for paired in result["pairedWithOurs"].values()) >= 70
    assert result["infeasibleUpperLimit"] <= 0.05, "as many studies as show it"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"meanRegret": {"ours": 0.081}}, "mean regret"),
        ({"infeasibleShare": 0.038}, "infeasible outcomes"),
        ({"chosenShare": 0.94}, "nothing chosen"),
    ],
)
def test_a_result_that_breaks_the_promise_is_named(changed: dict[str, Any], words: str) -> None:
    assert broken({**committed(), **changed}) == [words]


def test_a_rival_that_is_not_shown_to_leave_more_is_named() -> None:
    result = committed()
    result["pairedWithOurs"]["tpe"]["halfWidth95"] = result["pairedWithOurs"]["tpe"]["lessRegret"]
    assert broken(result) == ["no less regret than tpe"]
