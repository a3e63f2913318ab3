"""What `make demo` asks and shows, as far as no engine is needed."""

from __future__ import annotations

import io
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console

from benchmarks.ground import machine
from demo import __main__ as demo
from demo import cluster, figures, runs
from demo.story import Story
from demo.watch import LEGEND, Watch, active_experts
from sere_autotune.progress import AT_WORK
from sere_autotune.study.ledger import spent_alpha
from sere_autotune.trial.stats import power
from sere_autotune.tuning.spec import TuningSpec
from sere_ext.contract.profile import Profile
from tests.assets.make.models import ROWS_MOE
from tests.kit import ROOT


def block(before: float | None, after: float | None) -> str:
    """A line of a study's journal as certification and search write them, cut down to what is read."""
    return json.dumps({"user_attr": {"block": [{"levels": [{"active_before": before, "active_after": after}]}]}})


@pytest.mark.parametrize(
    ("lines", "found"),
    [
        ([], None),
        ([block(None, None)], None),
        ([block(50.4, 50.4)], None),  # exact routing changes nothing
        ([block(50.4, 28.2), block(50.1, 20.5), block(50.2, 50.2)], (50.1, 20.5)),
        ([block(50.4, 28.2), block(50.1, 20.5)[:-4]], (50.4, 28.2)),  # a line that is still being written
    ],
)
def test_the_last_policys_active_experts_are_found(lines: list[str], found: tuple[float, float] | None) -> None:
    assert active_experts("\n".join(lines)) == found


def watched(journal: Path, code: str) -> tuple[int, str]:
    """Exit status of a Python child that is followed, and what stood on a screen that is no terminal."""
    screen = io.StringIO()
    watch = Watch(Console(file=screen, width=200), journal, 64, 10)
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return watch.follow(child), screen.getvalue()


def test_a_process_is_followed_with_its_lines_its_status_and_the_live_line(tmp_path: Path) -> None:
    journal = tmp_path / "study.journal"
    journal.write_text(block(50.4, 20.5) + "\n")
    status, said = watched(journal, "import sys; print('trial 1 [bold]'); print('oh', file=sys.stderr); sys.exit(3)")
    assert status == 3
    assert "trial 1 [bold]" in said, "brackets in the tuner's lines are no markup"
    assert "oh" in said
    assert said.count("50.4 exact -> 20.5 with the policy") == 1, "a line that did not change is not printed again"


def test_a_log_has_what_the_bars_parts_are_once_and_the_line_first_and_at_the_end_of_each_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = tmp_path / "study.journal"
    clock = itertools.count(0, 2)  # the journal is read at most once a second
    monkeypatch.setattr("demo.watch.time.monotonic", lambda: next(clock))

    def output() -> Iterator[str]:
        for heading, counted in (("search", (20, 21, 22)), ("certify candidate 1", (30, 31, 32)), ("", (33,)), ("Chosen", ())):
            yield f"{heading}\n"
            for active in counted:
                with journal.open("a") as file:
                    file.write(block(50.0, active) + "\n")
                yield f"  block of {active}\n"

    process: Any = SimpleNamespace(stdout=output(), wait=lambda: 0)
    screen = io.StringIO()
    assert Watch(Console(file=screen, width=200), journal, 64, 10).follow(process) == 0
    shown = [re.sub(r"active experts per .*-> (\S+) with the policy.*", r"\1", line) for line in screen.getvalue().splitlines()]
    assert [line for line in shown if not line.startswith("  block")] == [
        "search", LEGEND, "20.0", "22.0", "certify candidate 1", "32.0", "", "33.0", "Chosen",
    ]  # fmt: skip
    assert shown.index("20.0") < shown.index("  block of 21"), "as soon as there is one"


def test_on_a_terminal_the_live_line_says_what_came_last_and_how_long_ago(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("demo.watch.time.monotonic", lambda: now[0])
    screen = io.StringIO()
    watch = Watch(Console(file=screen, force_terminal=True, width=200), tmp_path / "study.journal", 64, 10)

    def output() -> Iterator[str]:
        yield "certify candidate 1\n"
        yield "  block 1 of 8 done, about 3 min left\n"
        now[0] = 34.0
        yield f'  {AT_WORK} 34 s since "block 1 of 8 done"\n'
        assert "0.6 minutes gone, about 9 to go; 34 s since: block 1 of 8 done, about 3 min left" in watch._clock().plain

    process: Any = SimpleNamespace(stdout=output(), wait=lambda: 0)
    assert watch.follow(process) == 0
    assert "block 1 of 8 done, about 3 min left\n" in screen.getvalue()
    assert AT_WORK not in screen.getvalue(), "the live line counts these seconds"


def test_on_a_terminal_the_bars_parts_stand_below_it(tmp_path: Path) -> None:
    journal = tmp_path / "study.journal"
    watch = Watch(Console(file=io.StringIO(), force_terminal=True, width=200), journal, 64, 10)
    assert LEGEND not in watch._clock().plain
    journal.write_text(block(48.0, 16.0) + "\n")
    watch.line(now=True)
    shown = watch._clock().plain.splitlines()
    assert shown[0].endswith("█" * 8 + "░" * 16 + "·" * 8)
    assert shown[1] == LEGEND


def test_without_a_study_nothing_is_invented(tmp_path: Path) -> None:
    _, said = watched(tmp_path / "none", "print('starting')")
    assert said.strip() == "starting"


def test_the_tuning_file_of_the_demo_is_one_the_tuner_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "BUILD", tmp_path)
    monkeypatch.setattr(demo, "run", lambda *_, **__: 0)
    spec = TuningSpec.model_validate(yaml.safe_load(demo.prepare(demo.arguments([])).read_text()))
    assert list(spec.workload.load.levels) == [16]
    assert spec.accuracy.max_drop_points == 1
    assert spec.accuracy.tasks[0].max_tokens == ROWS_MOE.longest_answer


@pytest.mark.parametrize("sample", ["demo.yaml", "demo-profile.yaml"])
def test_the_samples_start_the_engine_that_the_first_stage_tuned(sample: str) -> None:
    spec = yaml.safe_load((ROOT / "manifests/samples" / sample).read_text())["spec"]
    arguments = [part for argument in spec["engine"]["extraArgs"] for part in argument.split("=", 1)]
    assert arguments == list(ROWS_MOE.engine_arguments)


MOST_LOAD = {
    "tuned": 16.0, "load": 31.0, "times": 31 / 16, "at_least": False, "sentence": "31 requests at a time",
    "tpot_ms": {"exact": 36.0, "chosen": 35.2}, "ratio": {"value": 1.023, "low": 0.99, "high": 1.05, "pairs": 3},
}  # fmt: skip


def test_what_was_gained_is_said_in_plain_words() -> None:
    answer = {
        "tpot_ms": {"exact": 71.0, "tuned": 37.8},
        "accuracy": {"exact": 1.0, "tuned": 0.9972},
        "active_experts": {"exact": 50.4, "tuned": 20.4},
        "answers_per_minute": {"exact": 240.0, "tuned": 400.0},
        "most_load": figures.most_load(MOST_LOAD),
    }
    said = figures.gained(answer)
    assert "1.88 times as fast for 0.28 points of accuracy" in said
    assert "20 experts of a layer instead of 50" in said
    assert "finishes 400 answers a minute instead of 240: the same machine does 1.67 times the work" in said
    assert (
        "The same engine holds 1.9x the load at the same latency: 31 requests at a time at 35.2 ms where exact routing holds 16 at 36.0 ms"
        in said
    )
    assert "(exact / tuned 1.02 [0.99, 1.05] in 3 pairs of blocks). Accuracy is certified at 16 at a time." in said
    top = figures.most_load({**MOST_LOAD, "load": 32.0, "times": 2.0, "at_least": True})
    assert "holds at least 2.0x the load at the same latency: 32 requests" in figures.gained({**answer, "most_load": top})
    none = figures.most_load({**MOST_LOAD, "ratio": None, "sentence": "not measured: deviceHours 0.25 is spent"})
    assert "at the old latency: not measured: deviceHours 0.25 is spent." in figures.gained({**answer, "most_load": none})
    assert "for no accuracy" in figures.gained({**answer, "accuracy": {"exact": 0.99, "tuned": 0.99}})


def test_the_last_lines_name_one_ratio_and_one_interval_for_mean_tpot(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr(figures, "console", Console(file=shown, width=400))
    kept = json.loads((ROOT / "benchmarks/results/demo-run-1.json").read_text())
    mean = kept["speedup_mean"]
    kept["tpot_ms"]["tuned"] = 1.02 * kept["tpot_ms"]["exact"] / mean["value"]  # the ratio of the two means is another
    accuracy = {**kept["accuracy"], "points_lost_at_most": 0.8}
    figures.show(
        {**kept, "accuracy": accuracy, "most_load": {"why_not": "was not asked for"}}, [mean], Path("/there/report.html")
    )
    text = shown.getvalue()
    assert "at most 0.80 points are lost, at 95 %" in text, "what the certificate proves"
    assert re.findall(r"\d\.\d\dx", text) == [f"{mean['value']:.2f}x"]
    assert f"its next token {mean['value']:.2f} times as fast" in text
    assert text.count("[") == 1 and f"95 % limits [{mean['low']:.2f}, {mean['high']:.2f}]" in text
    assert "Report: file:///there/report.html" in text


def test_the_certified_profile_is_carried_into_the_cluster_with_a_similarity_file_that_the_operator_can_read(
    tmp_path: Path,
) -> None:
    (manifest, _) = yaml.safe_load_all((ROOT / "manifests/samples/profile.yaml").read_text())
    manifest["spec"]["similarity"] = {"uri": "file:///home/me/similarity.safetensors", "digest": "sha256:" + "1" * 64}
    certified = Profile.parse(manifest)
    certified.write(tmp_path / "profile.json")
    there = cluster.carried(tmp_path / "profile.json")
    assert there.metadata == {"name": "demo"}
    assert there.spec.similarity is not None
    assert there.spec.similarity.uri == "configmap://demo-similarity/similarity.safetensors"
    assert there.spec.similarity.digest == "sha256:" + "1" * 64
    kept = {"similarity": None}
    assert there.spec.model_copy(update=kept) == certified.spec.model_copy(update=kept), "all else stays as it was certified"


def test_stage_2_tunes_only_where_it_is_asked_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(demo, "BUILD", tmp_path)
    asked: list[tuple[object, ...]] = []

    def run(*command: object, **_: object) -> int:
        asked.append(command)
        (tmp_path / "rollout.json").write_text("{}")
        return 0

    monkeypatch.setattr(demo, "run", run)
    for options in ([], ["--tune-in-cluster"]):
        demo.stage_cluster(demo.arguments(["--kubeconfig", "c", *options]))
    assert ["--tune" in command for command in asked] == [False, True]


PASSED = "canary passed: mean TPOT 27.7 ms against 31.1 ms"
SWITCHING = {"reason": "Promoting", "message": "1 of 1 pods do not show sere-1 yet"}
APPLIED = {"reason": "Applied", "message": "every pod runs sere-1"}


@pytest.mark.parametrize(
    ("seen", "told"),
    [
        ([({"reason": "Promoting", "message": PASSED}, [PASSED]), (APPLIED, [PASSED])], [f"Promoting: {PASSED}"]),
        # The condition is written before the Event is posted.
        ([({"reason": "Promoting", "message": PASSED}, []), (SWITCHING, [PASSED]), (APPLIED, [PASSED])],
         [f"Promoting: {PASSED}", "Promoting: 1 of 1 pods do not show sere-1 yet"]),
        # Both of these looked when the condition had gone on.
        ([(SWITCHING, [PASSED]), (APPLIED, [PASSED])], [f"CanaryPassed: {PASSED}", "Promoting: 1 of 1 pods do not show sere-1 yet"]),
        ([(APPLIED, [PASSED])], [f"CanaryPassed: {PASSED}"]),
    ],
)  # fmt: skip
def test_that_the_canary_passed_is_told_once_however_short_its_condition_lasted(
    seen: list[tuple[dict[str, str], list[str]]], told: list[str]
) -> None:
    story, found = Story(), []
    waiting = {"reason": "Canary", "message": "stable side finished 17 of 40 requests"}
    for condition in (waiting, waiting):
        found += story.news(condition, lambda: pytest.fail("no Event is asked for while the canary runs"))
    for condition, events in seen:
        found += story.news(condition, lambda events=events: events)
    assert found == ["Canary: stable side finished 17 of 40 requests", *told, "Applied: every pod runs sere-1"]


def test_the_events_of_a_passed_canary_are_asked_for_by_resource_and_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def kubectl(*arguments: str, **_: object) -> str:
        asked.append(arguments)
        newer, older = ({"message": text, "lastTimestamp": f"2026-01-01T00:00:0{i}Z"} for text, i in (("newer", 2), ("older", 1)))
        return json.dumps({"items": [newer, older]})

    monkeypatch.setattr(cluster.kube, "kubectl", kubectl)
    assert cluster.canary_passed() == ["older", "newer"]
    ((*command, _, _),) = asked
    assert command[:2] == ["get", "events"]
    assert "involvedObject.kind=SereDeployment,involvedObject.name=demo,reason=CanaryPassed" in command


def test_the_quickstart_says_why_the_demo_leaves_min_share_at_0_with_the_figures_of_the_policies_page() -> None:
    rows = {
        name: float(batch_16.split()[0]) for name, batch_16 in re.findall(
            r"^\| `(oea S=2(?: share=0\.50)?)` \| [^|]+ \| [^|]+ \| ([^|]+) \|", (ROOT / "docs/policies.md").read_text(), re.MULTILINE
        )[:2]
    }  # fmt: skip
    without, with_share = rows["oea S=2"], rows["oea S=2 share=0.50"]
    assert f"loses {with_share:.2f} points instead of {without:.2f}" in (ROOT / "docs/quickstart.md").read_text()
    certified = demo.ITEMS
    assert (demo.MIN_SHARE, certified) == ((0.0,), 1000)
    chances = [power(certified, d, with_share / 100, 0.01, spent_alpha(0.05, 0)) for d in (with_share / 100, 0.01, 0.02)]
    assert max(chances) == chances[0] < 0.3, "three times in ten at most, however many answers differ"


def test_what_the_quickstart_says_of_a_search_is_what_its_run_kept() -> None:
    kept = json.loads((ROOT / "benchmarks/results/demo-search.json").read_text())
    tpot, ratio, active, accuracy = (kept[key] for key in ("tpot_ms", "speedup_mean", "active_experts", "accuracy"))
    lost = 100 * (accuracy["exact"] - accuracy["tuned"])
    assert (
        f"mean TPOT {tpot['exact']:.1f} -> {tpot['tuned']:.1f} ms, {ratio['value']:.2f}x [{ratio['low']:.2f}, {ratio['high']:.2f}]; "
        f"{lost:.2f} points lost, at most {accuracy['points_lost_at_most']:.2f}; {active['tuned']:.1f} active experts of {active['exact']:.1f}"
    ) in (ROOT / "docs/quickstart.md").read_text()


def test_answers_per_minute_are_those_of_so_many_requests_in_flight() -> None:
    """A request of 2.4 s and 16 of them at a time: 400 a minute."""
    latency = {"exact": {"e2el": {"mean": 2400.0}}, "chosen": {"e2el": {"mean": 1200.0}}}
    summary = {"chosen": 1, "ladder": [{"result": {"latency_ms": latency}}]}
    assert figures.answers_per_minute(summary) == {"exact": 400.0, "tuned": 800.0}


RUN = {
    "tpot_ms": {"exact": 35.0, "tuned": 20.0},
    "speedup_mean": {"value": 1.75, "low": 1.66, "high": 1.84, "pairs": 4},
    "accuracy": {"exact": 0.999, "tuned": 0.998, "certified": True},
    "active_experts": {"exact": 48.5, "tuned": 22.2},
    "most_load": {"requests": {"exact": 16.0, "tuned": 31.0}, "at_least": False, "times": 31 / 16, "ratio": {"low": 1.0}},
    "seconds": {"tune": 402, "cluster": 162},
    "rollout": {"requests": 400, "errors": 0, "pod_restarts": 0, "seconds": 61.4},
}


def test_several_runs_are_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "1.json").write_text(json.dumps(RUN))
    assert runs.main([str(tmp_path / "1.json")]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    (tmp_path / "2.json").write_text(
        json.dumps({**RUN, "most_load": {"at_least": True, "times": 2.0, "requests": {"tuned": 32.0}, "ratio": {"low": 0.97}}})
    )
    runs.main([str(tmp_path / "2.json")])
    assert "| not shown |" in capsys.readouterr().out, "an interval that holds less than 1 shows no load"
    assert (
        line
        == "| 1 | 6.7 + 2.7 | 35.0 -> 20.0 ms | 1.75x [1.66, 1.84] | 1.9x, 31 requests at a time | 0.10 | 48.5 -> 22.2 | 61 s, 0 of 400 failed |"
    )


def test_a_run_names_its_machine_and_its_commit_and_the_table_has_them_where_they_are_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    latency = {"tpot": {"mean": 20.0}, "e2el": {"mean": 1200.0}}
    summary = {"chosen": 1, "ladder": [{"result": {"latency_ms": {"exact": latency, "chosen": latency}}}], "mostLoad": None}
    accuracy = {"exact": 1.0, "chosen": 1.0, "items": 1000, "noiseFloor": 0.0, "upperBoundPoints": 0.4}
    spec = {"evidence": {"accuracy": accuracy, "tpotMeanMs": None, "certified": True}, "policy": {}}
    made = figures.result(spec, summary, None, "left out", {"tune": 1, "cluster": 1}, machine())
    assert made["machine"]["cpus"] and made["machine"]["cpu"] and made["machine"]["torch"]
    assert made.get("commit", "") == figures.commit()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert figures.commit() == "", "no git"

    files = [tmp_path / "1.json", tmp_path / "2.json"]
    files[0].write_text(json.dumps(RUN))
    files[1].write_text(json.dumps({**RUN, "machine": made["machine"], "commit": "c0ffee"}))
    assert runs.main([str(file) for file in files]) == 0
    *_, row, gap, named = capsys.readouterr().out.splitlines()
    assert row.startswith("| 2 |") and not gap
    assert named.startswith(f"Run 2: {made['machine']['cpus']} cores, ") and named.endswith("commit c0ffee.")


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"speedup_mean": {"value": 1.59, "low": 1.5, "high": 1.7}}, "less than 1.6x"),
        ({"speedup_mean": {"value": 1.7, "low": 1.4, "high": 1.9}}, "lower limit not above 1.4x"),
        ({"accuracy": {"exact": 0.999, "tuned": 0.98, "certified": True}}, "more than 1 point lost"),
        ({"accuracy": {"exact": 0.999, "tuned": 0.999, "certified": False}}, "not certified"),
        ({"seconds": {"tune": 500, "cluster": 101}}, "more than 10 minutes"),
        ({"rollout": None}, "no rollout"),
        ({"rollout": {"requests": 400, "errors": 1, "seconds": 60.0}}, "failed requests"),
    ],
)
def test_a_run_that_breaks_the_promise_is_named(changed: dict[str, object], word: str) -> None:
    assert runs.broken({**RUN, **changed}) == [word]


def test_the_runs_of_the_quickstart_are_those_that_were_kept_and_kept_the_promise(capsys: pytest.CaptureFixture[str]) -> None:
    kept = sorted((ROOT / "benchmarks" / "results").glob("demo-run-*.json"))
    assert len(kept) == 5
    assert runs.main([str(path) for path in kept]) == 0
    assert capsys.readouterr().out in (ROOT / "docs" / "quickstart.md").read_text()
