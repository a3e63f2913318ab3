"""The report's plot of step time against active experts: the fit, what is refused, and what the page says."""

import pytest

from sere_autotune.result.step_time import Line, Point, deviation, fit, points, section


def world(*at: tuple[float, float], line: Line) -> list[Point]:
    return [Point(active, slots, line.at(active, slots), "") for active, slots in at]


def test_the_fit_finds_the_world_it_was_measured_in() -> None:
    truth = Line(9.0, 0.5, 0.4)
    measured = world((48, 8), (33, 7.5), (21, 2), (21, 7), (11, 6), (28, 3), line=truth)
    found = fit(measured)
    assert found is not None
    assert (found.a, found.b, found.c) == pytest.approx((9.0, 0.5, 0.4))
    assert deviation(found, measured) == pytest.approx(0, abs=1e-9)
    assert found.share(48, 8) == pytest.approx(1 - 9 / (9 + 24 + 3.2))


def test_slots_that_hardly_differ_are_no_slope_of_their_own() -> None:
    found = fit(world((48, 8), (33, 7.9), (21, 7.6), (11, 7.5), line=Line(9.0, 0.5, 0.0)))
    assert found is not None
    assert found.c == 0
    assert found.b == pytest.approx(0.5)


def test_points_that_are_few_or_close_together_give_no_line() -> None:
    line = Line(9.0, 0.5, 0.0)
    assert fit(world((48, 8), (20, 8), line=line)) is None
    assert fit(world((48, 8), (47, 8), (46, 8), line=line)) is None


def level(active: float, ms: float) -> dict:
    return {"active_after": active, "latency_ms": {"tpot": {"mean": ms}}}


SUMMARY = {
    "ceiling": None,
    "trials": [
        {"number": 0, "policy": "exact", "digest": "exact", "firstLoadTpotMs": 33.0, "slots": [8.0], "levels": [level(48, 33)]},
        {
            "number": 1,
            "policy": "oea S=2 <b>",
            "digest": "x",
            "firstLoadTpotMs": 19.5,
            "slots": [8.0],
            "levels": [level(21, 18.0)],
        },
        {"number": 2, "policy": "crashed", "digest": "y", "firstLoadTpotMs": None, "slots": [], "levels": []},
    ],
    "ladder": [
        {
            "number": 1,
            "describe": "oea S=2",
            "slots": [8.0],
            "result": {
                "active_before": 48.0,
                "active_after": 21.0,
                "latency_ms": {"exact": {"tpot": {"mean": 34.0}}, "chosen": {"tpot": {"mean": 20.0}}},
            },
        }
    ],
}


def test_trials_and_certificate_are_points_and_the_page_compares_prediction_and_measurement() -> None:
    found = points(SUMMARY)
    assert [(point.active, point.step_ms, point.certified) for point in found] == [
        (48, 33, False), (21, 19.5, False), (48, 34, True), (21, 20, True)
    ]  # fmt: skip
    page = section(SUMMARY)
    assert page.count("<rect") == 2
    assert page.count("<path") == 2
    assert "active experts take 7" in page  # 1 - a/T with a = 9.25 of 33.5
    assert "For the certified policy this line, drawn through its own diamond too, gives 1.70x; measured: 1.70x." in page
    assert "<b>" not in page


def test_a_trials_milliseconds_are_those_of_the_table_of_trials_and_the_axis_says_what_they_are() -> None:
    page = section(SUMMARY)
    assert "trial 1: oea S=2 &lt;b&gt;, 21.0 active experts, 8.0 slots, 19.50 ms" in page, "not the 18 ms of a faster moment"
    assert ">mean TPOT (trials: drift taken out), ms<" in page


def ceiling(**changed: object) -> dict:
    """Of a model whose exact step of 40 ms has 50 active experts and 128 slots."""
    load = {"requests": 16, "asked": True, "expertsShare": [0.92, 0.91, 0.93], "promptsShare": 0.06}
    smaller = {"requests": 4, "asked": False, "expertsShare": [0.8, 0.7, 0.9], "promptsShare": 0.06}
    step = {"requests": 16, "exact": True, "predictedMs": [40.0, 39.0, 41.0], "activeExperts": 50.0, "slots": 128.0}
    steps = [{**step, "requests": 4}, {**step, "exact": False}, step]
    law = {"msPerActiveExpert": [0.56, 0.5, 0.6], "msPerSlot": [0.07, 0.06, 0.08]}
    found = {"sentence": "at most 3.8x; experts take 92%", "ceilings": [smaller, load], "law": law, "steps": steps}
    return {key: value for key, value in (found | changed).items() if value is not None}


def test_the_page_says_why_the_ceiling_and_the_line_name_two_shares_of_experts() -> None:
    page = section({**SUMMARY, "ceiling": ceiling()})
    assert (
        "at most 3.8x; experts take 92%. Of such a step of 16 requests under exact routing active experts take 70.0% and slots 22.4%"
        in page
    )
    assert "together the 92.0% that the ceiling calls the share of experts" in page
    assert "The line above has prompts in its step (6% of it), and slots in its constant." in page
    apart = [{**trial, "slots": [slots]} for trial, slots in zip(SUMMARY["trials"], (8.0, 2.0), strict=False)]
    assert "active experts and slots take" in section({**SUMMARY, "trials": apart, "ceiling": ceiling()})


@pytest.mark.parametrize("found", [None, ceiling(law=None), ceiling(ceilings=[]), ceiling(steps=[])])
def test_without_a_ceiling_that_was_measured_nothing_is_compared(found: dict | None) -> None:
    assert "The line above" not in section({**SUMMARY, "ceiling": found})


def test_an_engine_that_counts_no_experts_has_no_plot() -> None:
    blind = [{**trial, "levels": [{**lv, "active_after": None} for lv in trial["levels"]]} for trial in SUMMARY["trials"]]
    assert section({"trials": blind, "ladder": []}) == ""
