"""The report: whole, self-contained, safe against odd names; and the closing lines."""

import html
import html.parser
import re
from pathlib import Path

import pytest

from sere_autotune.result import results, screen
from sere_autotune.result.report import pareto, pareto_svg, render
from tests.kit.planted import PlantedEngine, run, spec_for, write_items


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tuned")
    return run(spec_for(folder / "out", write_items(folder / "items.jsonl", 6000), search__trials=8), PlantedEngine())


class Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag, attrs) -> None:
        self.seen.append(tag)
        if tag not in {"meta", "circle", "line", "path", "polyline", "html"}:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        if self.open and self.open[-1] == tag:
            self.open.pop()


def test_the_page_is_whole_and_loads_nothing(finished) -> None:
    page = (Path(finished.summary["out"]) / "report.html").read_text()
    tags = Tags()
    tags.feed(page)
    assert not [tag for tag in tags.open if tag in {"table", "svg", "div", "script", "style"}]
    assert "svg" in tags.seen
    assert not re.search(r"(src|href)=|url\(|@import", page)
    for words in ("Certificate", "Ladder", "Trials", "Noise floor", "budget 1 point<", "equal concurrency 16"):
        assert words in page
    assert page.count("<circle") == len(finished.summary["trials"])


def test_the_plot_and_the_table_of_trials_have_one_figure_for_each_trial(finished) -> None:
    """Each trial is measured while the machine is faster or slower than it was in trial 0."""
    page = render(finished.summary)
    tuned = [trial for trial in finished.summary["trials"] if trial["levels"] and trial["digest"] != "exact"]
    assert any(abs(trial["tpotMs"] / trial["levels"][0]["latency_ms"]["tpot"]["mean"] - 1) > 0.001 for trial in tuned)
    plot = page.partition("Step time against active experts")[2].partition("</svg>")[0]
    for trial in tuned:
        assert trial["firstLoadTpotMs"] == pytest.approx(trial["tpotMs"]), "there is one load"
        assert re.search(rf"<title>trial {trial['number']}: [^<]*, {trial['tpotMs']:.2f} ms</title>", plot)
    assert "Mean TPOT: over several loads" in page


def test_the_table_of_trials_says_that_a_trial_over_the_limit_of_accuracy_only_ranks(finished) -> None:
    over = {**finished.summary["trials"][-1], "violations": {"accuracy": 0.04}, "items": 96, "crash": None}
    page = render({**finished.summary, "trials": [*finished.summary["trials"][:-1], over]})
    assert (
        "over the limit of accuracy</span>" in page
        and "A trial only ranks: one answer of its items weighs 100 / items points." in page
    )


def test_names_are_escaped(finished) -> None:
    page = render({**finished.summary, "model": "</script><b>x", "message": "<i>"})
    assert "<b>x" not in page
    assert "<i>" not in page


def test_the_front_is_what_no_other_beats() -> None:
    assert pareto([(0.0, 20.0), (1.0, 15.0), (0.5, 25.0), (2.0, 15.0), (3.0, 10.0)]) == [0, 1, 4]


def test_a_run_without_trials_still_has_a_page(finished) -> None:
    empty = {**finished.summary, "trials": [], "ladder": [], "chosen": None, "outcome": "BudgetExhausted", "noiseFloor": None}
    assert "nothing to draw" in render(empty)
    assert "<svg" not in pareto_svg(empty)


def test_the_closing_lines_name_policy_limits_condition_and_report(finished) -> None:
    text = screen.lines(finished.summary)
    assert text.startswith("Chosen   ")
    assert re.search(r"TPOT p95 +[\d.]+ ms +[\d.]+ ms +40 ms +1\.\d\dx \[[\d.]+, [\d.]+\] at equal concurrency 16, 3 pairs", text)
    assert "certified at 95% on" in text
    assert re.search(r"accuracy +\d\d\.\d\d% +\d\d\.\d\d% +-1", text)  # differences of some hundredths of a point decide
    assert text.splitlines()[-2].endswith("report.html")
    assert text.splitlines()[-1].startswith("Serve    SERE_PROFILE=")


def test_a_policy_that_was_no_trial_is_said_to_be_picked_by_the_model(finished) -> None:
    """People look for it among the trials."""
    summary = finished.summary
    chosen = summary["ladder"][summary["chosen"] - 1]["describe"]
    others = [trial for trial in summary["trials"] if trial["policy"] != chosen]
    text = screen.lines({**summary, "trials": others})
    assert f"Picked   by a model of all {len(others)} trials, none of which was this policy" in text
    assert "Picked" not in screen.lines({**summary, "trials": [*others, {**others[0], "policy": chosen}]})


def test_the_last_line_serves_it_by_the_engine_that_it_was_measured_on(tmp_path: Path) -> None:
    spec = spec_for(tmp_path / "my out", write_items(tmp_path / "items.jsonl", 100))
    engine = spec.engine.model_copy(update={"max_model_len": 128, "extra_args": ["--dtype", "float32"]})
    line = results.serve_line(spec.model_copy(update={"engine": engine, "model": "a/b"}), Path("my out"))
    assert line == "SERE_PROFILE='my out/profile.json' sere serve a/b --max-model-len 128 --dtype float32"


def test_the_stepped_line_keeps_to_trials_within_the_limits(finished) -> None:
    trials = [trial for trial in finished.summary["trials"] if trial["levels"]]
    far = {**trials[-1], "dropPoints": 9.0, "tpotMs": 0.5 * min(t["tpotMs"] for t in trials), "feasible": False}
    line = re.compile(r'<polyline points="([^"]*)"')
    with_far = line.search(pareto_svg({**finished.summary, "trials": [*trials, far]}))
    without = line.search(pareto_svg(finished.summary))
    assert (with_far is None) == (without is None)
    if with_far and without:
        assert len(with_far.group(1).split()) == len(without.group(1).split())


def test_the_verdict_on_speed_and_the_drops_by_load_and_task_are_shown(finished) -> None:
    parts = [
        {
            "kind": "load",
            "name": "equal concurrency 4",
            "items": 1000,
            "losses": 30,
            "gains": 5,
            "p_value": 0.001,
            "harmed": True,
        },
        {"kind": "task", "name": "sums.jsonl", "items": 500, "losses": 1, "gains": 3, "p_value": 1.0, "harmed": False},
    ]
    ladder = [
        {**row, "result": {**row["result"], "parts": parts}} if row["result"] else row for row in finished.summary["ladder"]
    ]
    summary = {**finished.summary, "ladder": ladder}
    text, page = screen.lines(summary), render(summary)
    ratio = summary["ladder"][summary["chosen"] - 1]["result"]["speedup"]["mean"]
    limits = f"{ratio['value']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]; limits in brackets are at 95%, too"
    assert re.search(rf"^speed +faster, shown at 95%: mean TPOT {re.escape(limits)}$", text, re.MULTILINE)
    assert "load equal concurrency 4: -2.50 points on 1,000 items, shown to be over the limit" in text
    assert "task sums.jsonl: +0.40 points on 500 items" in text
    assert "speed verdict" in page
    assert "-2.50 points, harm shown" in page and "task sums.jsonl" in page


def test_a_prediction_stands_beside_what_was_found_and_a_chance_only_where_no_verdict_is(finished) -> None:
    page = render(finished.summary)
    for head in ("points, predicted", "points, found", "speed, predicted", "speed, found"):
        assert f"<th >{head}</th>" in page
    assert "chance" not in page.partition("<script")[0], "the certificate has decided"
    first, *others = finished.summary["ladder"]
    speed = first["result"]["speedup"]["mean"]["value"]
    assert f'data-head="speed, found">{speed:.2f}x</td>' in page
    waiting = {**first, "result": None, "verdict": "not run", "power": 0.29}
    page = render({**finished.summary, "ladder": [waiting, *others], "chosen": None})
    assert "the items certify it with a chance of 29%, by what the trials predict" in page


def test_one_confidence_is_shown_and_one_paragraph_says_how_its_risk_is_shared(finished) -> None:
    page, text = render(finished.summary).partition("<script")[0], screen.lines(finished.summary)
    assert set(re.findall(r"at (9[\d.]+%)", text)) == {"95%"}
    assert page.count("Every confidence on this page is 95%") == 1
    result = finished.summary["ladder"][finished.summary["chosen"] - 1]["result"]
    assert "share the 5%, and this one, the first, may spend 3.75%: p may be at most 0.0375" in page
    assert f"one judgement has {100 * result['speed']['alpha']:g}%" in page
    assert "97.5% confidence, everything else 95%" in render(
        {**finished.summary, "accuracy": {**finished.summary["accuracy"], "confidence": 0.975}}
    )
    assert finished.outcome.message in html.unescape(page)
    mean = result["speedup"]["mean"]
    assert f"(mean {mean['value']:.2f}x [{mean['low']:.2f}, {mean['high']:.2f}])" in finished.outcome.message, "at 95%, too"


def test_on_a_phone_each_cell_has_its_columns_name(finished) -> None:
    page = render(finished.summary)
    assert "@media(max-width:40rem){thead{display:none}" in page
    body = "".join(re.findall(r"<tbody>.*?</tbody>", page))
    assert body.count("<td") == body.count("data-head=") > 50
