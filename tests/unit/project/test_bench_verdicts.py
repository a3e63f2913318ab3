"""`make bench-verdicts`: a tiny run of it, and the committed result."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import verdicts
from sere_autotune.study.schema import SpeedVerdict, Verdict


def test_a_tiny_run_counts_every_world_and_tells_false_from_true(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("good policies", "half over the limit", "policies are slower", "five studies on the same items")
    monkeypatch.setattr(verdicts, "WORLDS", {name: replace(verdicts.WORLDS[name], times=1) for name in names})
    result = verdicts.run(studies=2, whole_studies=0, seed=0)
    assert set(result["worlds"]) == {*names, "exact routing is right on 0 to 5 %"}
    assert result["worlds"]["good policies"]["chosen"] == 2
    assert result["falseCertificates"]["studies"] == result["falseFaster"]["studies"] == 10
    assert result["falseCertificates"]["upperLimit"] > result["falseCertificates"]["count"] / 10
    monkeypatch.setattr(
        verdicts, "judge", lambda blocks, rules: Verdict("passed", "", speed=SpeedVerdict("faster", 1.1, 1.0, 1.2, 10, 0.03))
    )
    told = verdicts.run(studies=2, whole_studies=0, seed=0)
    assert told["falseCertificates"]["count"] == told["falseFaster"]["count"] + 2 == 4, "a judge that passes everything is seen"


def test_the_committed_result_is_of_enough_studies_and_within_what_is_promised() -> None:
    result = json.loads(Path(verdicts.RESULTS).read_text())
    for kind in ("falseCertificates", "falseFaster"):
        assert result[kind]["studies"] >= 2000
        assert result[kind]["count"] / result[kind]["studies"] <= result[kind]["upperLimit"] <= 0.05
    assert verdicts.not_shown(result) == [], 'false "faster" is shown to be rare in every world without a faster policy'
    assert set(verdicts.WORLDS) < set(result["worlds"])
    for kind in verdicts.WHOLE.values():
        risk = result["whereNothingTrueCanBeChosen"][kind]
        assert risk["count"] == result[kind]["count"] and risk["count"] / risk["studies"] <= 0.05


def test_a_world_without_a_faster_policy_is_judged_by_itself() -> None:
    result = json.loads(Path(verdicts.RESULTS).read_text())
    result["worlds"]["no policy is faster"]["falseFasterUpperLimit"] = 0.051
    assert verdicts.not_shown(result) == ["no policy is faster"]
