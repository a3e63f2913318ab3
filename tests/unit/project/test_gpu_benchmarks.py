"""The GPU stages as far as no GPU is needed: arithmetic, known routing, judgements, and the page."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import ground
from benchmarks.gpu import bound, page, quality, report, routing, serve, three_launch, tuner
from benchmarks.gpu import kernel as kernel_stage
from benchmarks.gpu.shapes import DEEPSEEK_V2_LITE, QWEN3_30B, QWEN15_MOE, TINY, Shape
from sere_ext.routing import build
from tests.kit import ROOT
from tests.kit.planted import PlantedEngine, run, spec_for, write_items


@pytest.mark.parametrize(
    ("shape", "expert_mb", "routed_gb", "fixed_gb", "kv_kb"),
    [(QWEN3_30B, 9.44, 58.0, 2.46, 98.3), (QWEN15_MOE, 17.30, 24.9, 3.09, 196.6), (DEEPSEEK_V2_LITE, 17.30, 28.8, 2.20, 31.1)],
    ids=lambda value: getattr(value, "name", None),
)
def test_bytes_that_a_step_reads(shape: Shape, expert_mb: float, routed_gb: float, fixed_gb: float, kv_kb: float) -> None:
    """Against figures worked out by hand from the published configs."""
    assert shape.expert_bytes / 1e6 == pytest.approx(expert_mb, abs=0.005)
    assert shape.expert_bytes * shape.experts * shape.moe_layers / 1e9 == pytest.approx(routed_gb, abs=0.05)
    assert shape.fixed_bytes / 1e9 == pytest.approx(fixed_gb, abs=0.005)
    assert shape.kv_bytes / 1e3 == pytest.approx(kv_kb, abs=0.05)


def test_bound_at_a_known_bandwidth() -> None:
    """Qwen3-30B-A3B, batch 16, context 144, 4.3 TB/s: 9.3 ms evenly routed, 6.3 with the skew."""
    for kind, wanted in (("uniform", 9.3), ("skewed", 6.3)):
        active = bound.drawn_active(kind, 128, 8, 16)
        assert bound.bound_ms(QWEN3_30B, active, 16, 144, 4.3e12) == pytest.approx(wanted, abs=0.06)


@pytest.mark.parametrize(("top", "published"), [(3, 26.2), (5, 38.4), (8, 53.9)])
def test_the_skew_gives_the_active_experts_it_was_fitted_to(top: int, published: float) -> None:
    assert bound.skewed_active(128, top, 16) == pytest.approx(published, rel=0.015)


def test_a_line_is_fitted_and_predicts() -> None:
    line = bound.fit([(u, 2.0 + 0.05 * u) for u in (8, 40, 100)])
    assert line is not None
    assert (line.base, line.per_expert, line.r2) == pytest.approx((2.0, 0.05, 1.0))
    assert line.speedup(100, 20) == pytest.approx(7.0 / 3.0)
    noisy = bound.fit([(8, 3.0), (40, 3.0), (100, 9.0), (100, 7.0)])
    assert noisy is not None
    assert 0.5 < noisy.r2 < 1
    assert bound.fit([(8, 3.0), (8, 3.1), (40, 5.0)]) is None, "two numbers of experts say nothing about a line"
    assert bound.Line(-3.0, 0.05, 0.9).speedup(100, 20) is None, "no time is left at 20 experts"


SMALL = Shape("small", {**TINY.config, "num_experts": 64, "num_experts_per_tok": 8, "hidden_size": 256, "vocab_size": 8192})


@pytest.mark.parametrize("kind", routing.ROUTINGS)
@pytest.mark.parametrize("layer", [0, 7])
def test_routers_draw_experts_as_their_tokens_say(kind: str, layer: int) -> None:
    """Through the norm that the model has before them, for the tokens that the prompts and their answers are made of."""
    embedding = routing.embedding(SMALL, "cpu", torch.float32)
    tokens = torch.tensor(routing.prompts(SMALL, kind, 256, 8, 1)).flatten()
    x = torch.nn.functional.rms_norm(embedding[tokens], (SMALL.hidden,))
    logits = x @ routing.router(SMALL, layer).T
    for batch in (4, 16):
        assert bound.distinct(logits, 8, batch) == pytest.approx(bound.drawn_active(kind, 64, 8, batch), rel=0.03)


@pytest.mark.parametrize("kind", routing.ROUTINGS)
def test_sequences_never_meet_and_stay_on_their_side(kind: str) -> None:
    last = torch.tensor(routing.prompts(TINY, kind, 128, 4, 3))[:, -1]
    for _ in range(200):
        assert len(last.unique()) == 128
        assert (last % 2 == (kind == "uniform")).all()
        last = routing.successor(last, TINY.vocabulary)
    assert routing.prompts(TINY, kind, 4, 4, 3) == routing.prompts(TINY, kind, 4, 4, 3) != routing.prompts(TINY, kind, 4, 4, 4)


def planted_model(shape: Shape) -> torch.nn.Module:
    """Parameters named and shaped as the engine's, as its dummy loader leaves them."""
    layers, wide = shape.moe_layers, shape.hidden
    found = {
        "model.embed_tokens.weight": (shape.vocabulary, wide),
        "lm_head.weight": (shape.vocabulary, wide),
        "model.norm.weight": (wide,),
    }
    for layer in range(layers):
        name = f"model.layers.{layer}."
        found |= {
            f"{name}mlp.gate.weight": (shape.experts, wide),
            f"{name}mlp.experts.w13_weight": (shape.experts, 8, wide),
            f"{name}mlp.experts.w2_weight": (shape.experts, wide, 4),
            f"{name}input_layernorm.weight": (wide,),
        }
    model = torch.nn.Module()
    named = {name: torch.nn.Parameter(torch.empty(size).uniform_(-1e-3, 1e-3)) for name, size in found.items()}
    model.named_parameters = lambda *_: iter(named.items())  # type: ignore[method-assign, assignment]
    model.found = named  # type: ignore[assignment]
    return model


def test_the_head_answers_with_the_successor() -> None:
    model: Any = planted_model(SMALL)
    routing.fill(model, SMALL)
    tokens = torch.arange(500)
    hidden = torch.nn.functional.rms_norm(model.found["model.embed_tokens.weight"][tokens], (SMALL.hidden,))
    logits = hidden @ model.found["lm_head.weight"].T
    assert (logits.argmax(1) == routing.successor(tokens, SMALL.vocabulary)).all()
    assert logits.log_softmax(1).amax(1).max() < -1e-3, "a log-probability of 0 would hide what a policy changes"
    assert (model.found["model.layers.0.input_layernorm.weight"] == 1).all()
    assert model.found["model.layers.1.mlp.experts.w13_weight"].std().item() == pytest.approx(
        1 / math.sqrt(SMALL.hidden), rel=0.05
    )


def test_an_engine_with_other_names_is_refused() -> None:
    model: Any = planted_model(SMALL)
    del model.found["model.layers.1.mlp.gate.weight"]
    with pytest.raises(ValueError, match=r"found .*'gate': 1.* wanted .*'gate': 2"):
        routing.fill(model, SMALL)


def cell(arm: str, batch: int, active: float, ms: float, exact_ms: float, kind: str = "skewed") -> dict[str, Any]:
    return {
        "shape": QWEN3_30B.name, "routing": kind, "batch": batch, "arm": arm, "active": active, "tpotMs": ms, "context": 100.0,
        "speedup": exact_ms / ms, "speedupLow": 0.9 * exact_ms / ms, "speedupHigh": 1.1 * exact_ms / ms, "switchMs": [3.0, 5.0],
    }  # fmt: skip


# Exact cells lie on 2 + 0.1 * active.
CELLS = [
    cell("exact", 1, 8, 2.8, 2.8), cell("exact", 4, 22, 4.2, 4.2), cell("exact", 16, 54, 7.4, 7.4), cell("sere S=1", 16, 11, 4.0, 7.4),
    cell("sere S=2", 16, 19, 3.9, 7.4), cell("exact", 256, 127, 40.0, 40.0),
]  # fmt: skip


def test_cells_are_held_against_the_line_through_the_exact_ones() -> None:
    found, line = serve.judged(CELLS, QWEN3_30B, 3.0e12)
    assert line is not None
    assert (line.base, line.per_expert) == pytest.approx((2.0, 0.1)), "batch 256 is arithmetic as well, and no part of it"
    one, two = found[3], found[4]
    assert one["predicted"] == pytest.approx(7.4 / 3.1)
    assert one["share"] == pytest.approx((7.4 / 4.0) / (7.4 / 3.1))
    assert two["share"] == pytest.approx(1.0)
    assert one["boundMs"] == pytest.approx(bound.bound_ms(QWEN3_30B, 11, 16, 100, 3.0e12))
    said = {check.target: check.met for check in serve.checks(found, {"changedUnderS1": 9, "returnsExactly": True})}
    assert said["sere S=1, batch 16, skewed routing: speed-up >= 2x"] is False, "1.85x"
    assert said["sere S=2, batch 16, skewed routing: speed-up >= 1.6x"] is True
    assert said["sere S=1, batch 16, skewed routing: share of the fitted >= 0.85"] is False
    assert said["sere S=2, batch 16, uniform routing: speed-up >= 1.6x"] is None, "not measured is neither met nor missed"
    assert said["longest live switch <= 20 ms"] is True
    assert said["all return with exact routing"] is True


def test_a_switch_that_does_not_return_is_missed() -> None:
    said = {check.target: check.met for check in serve.checks(CELLS, {"changedUnderS1": 0, "returnsExactly": False})}
    assert (said["log-probabilities that change under S=1"], said["all return with exact routing"]) == (False, False)


@pytest.mark.parametrize(("batch", "room", "rounds"), [(16, 10**6, 5), (256, 256 * 256, 2), (256, 256 * 60, 1), (1, 10**6, 5)])
def test_rounds_fit_the_cache(batch: int, room: int, rounds: int) -> None:
    assert serve.rounds_that_fit(5, 6, 10, batch, room, 1024) == rounds


def test_kernel_targets() -> None:
    def row(experts: int, us: float, launches: float) -> dict[str, Any]:
        ours = dict.fromkeys(kernel_stage.POLICIES, us)
        return {"experts": experts, "tokens": 256, "emptyUs": 1.0, "topkUs": 4.0, "threeUs": 12.0, "oursUs": ours, "timesFaster": 12 / us, "launches": {"ours": launches}}  # fmt: skip

    good = kernel_stage.checks([row(128, 2.0, 1.0), row(256, 9.0, 1.0)], {"passed": True}, {"memcheck": "clean"})
    assert [check.met for check in good] == [True] * 5
    bad = kernel_stage.checks([row(128, 4.0, 2.0)], {"passed": False}, {"memcheck": "clean", "racecheck": "rc 9: 1 hazard"})
    assert [check.met for check in bad] == [False] * 5
    assert [check.met for check in kernel_stage.checks([], None, {})] == [None] * 5
    assert len(kernel_stage.lines([row(128, 2.0, 1.0)])[0]) == len(kernel_stage.HEAD)


@pytest.mark.skipif(build._first("/usr/local/cuda/bin/nvcc", "nvcc") is None, reason="no nvcc; install the CUDA toolkit")
def test_the_three_launch_form_compiles(tmp_path: Path) -> None:
    """Compiled, not run: that needs a GPU."""
    made = three_launch.compiled(tmp_path)
    assert three_launch.load(made).graph_nodes
    assert [n for n in build.CUDA_ARCHITECTURES if f"sm_{n}".encode() not in made.read_bytes()] == []


def test_the_trained_model_decodes_as_it_was_taught() -> None:
    """The pass that trains and the pass with a cache give the same logits, and routing all to one side changes them."""
    from benchmarks.gpu import moe

    model = moe.Moe(moe.config(64, 2, 8, 2, 16), "cpu")
    ids = torch.randint(3, 40, (3, 7), generator=torch.Generator().manual_seed(1))
    taught, routers = model.teach(ids)
    positions, rows = torch.arange(7).expand(3, -1), torch.arange(3)
    decoded = model.forward(ids, positions, model.cache(3, 8), rows, model.exact)  # type: ignore[arg-type]
    assert torch.allclose(taught, decoded, atol=1e-5)
    assert [tuple(router.shape) for router in routers] == [(21, 8)] * 2
    only_first = model.forward(ids, positions, model.cache(3, 8), rows, lambda _, x: torch.eye(8)[0].expand_as(x))  # type: ignore[arg-type]
    assert not torch.allclose(taught, only_first, atol=1e-5)
    alike = model.similarity(["S321=", "Rab="])
    assert alike.shape == (2, 8, 8)
    assert torch.allclose(alike, alike.mT)
    assert (alike.diagonal(dim1=1, dim2=2) == 1).all()


def test_training_learns_something() -> None:
    from benchmarks.gpu import moe

    torch.manual_seed(0)
    model = moe.Moe(moe.config(64, 1, 4, 2, 16), "cpu")
    untaught = math.log(64)
    assert model.train_for(0.1, lambda _: None, least_steps=30)["loss"] < untaught - 0.5
    assert not any(weight.requires_grad for weight in model.weights.values())


def test_the_model_that_is_trained_is_as_large_as_promised() -> None:
    from benchmarks.gpu import moe

    size = quality.SIZES["gpu"]
    shapes = moe.Moe._shapes(
        SimpleNamespace(config=moe.config(**size), heads=8, key_heads=4, head=32, experts=size["experts"], layers=size["layers"])  # type: ignore[arg-type]
    )
    assert sum(math.prod(shape) for _, shape in shapes) >= quality.LEAST_PARAMETERS
    assert size["experts"] >= quality.LEAST_EXPERTS


def test_the_tuners_limit_lies_between_exact_and_the_best_feasible() -> None:
    def trial(policy: str, p95: float, feasible: bool) -> dict[str, Any]:
        return {"policy": policy, "tpotMs": 1.5, "feasible": feasible, "levels": [{"latency_ms": {"tpot": {"p95": p95}}}]}

    trials = [trial("exact", 9.0, True), trial("a", 4.0, True), trial("b", 1.0, False)]
    assert tuner.between({"trials": trials}) == (9.0, 4.0, 6.0)
    with pytest.raises(ValueError, match=r"faster than exact routing .9\.000 ms"):
        tuner.between({"trials": trials[::2]})


def test_the_tuners_flags_are_a_tuning_file(tmp_path: Path) -> None:
    from sere_autotune.tuning.file import load_spec
    from sere_autotune.tuning.options import leaves, overrides

    flags = tuner.flags(tmp_path, tmp_path / "m", tmp_path / "s", "run", 6.0, 14, 6, gpu=True, wall_s=90.0)
    given, names = dict(zip(flags[::2], flags[1::2], strict=True)), {leaf.flag: leaf.name for leaf in leaves()}
    spec = load_spec(None, overrides({names[flag]: value for flag, value in given.items()}))
    assert spec.slo.tpot_ms is not None
    assert spec.slo.tpot_ms.p95 == 6.0
    assert "bfloat16" in spec.engine.extra_args
    assert spec.search.wall_minutes == 1.5


def test_a_tuner_out_of_time_ends_with_the_table_of_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The run measures some trials and then hangs; its study is all that is left of it."""
    import json

    class Hanging(PlantedEngine):
        def block(self, *args: Any, **kwargs: Any) -> Any:
            if self.blocks >= 6:
                raise KeyboardInterrupt
            return super().block(*args, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        run(spec_for(tmp_path / "made", write_items(tmp_path / "items.jsonl", 2000), accuracy__maxDropPoints=2), Hanging())
    hang = f"cp -r {tmp_path}/made {tmp_path}/probe && trap '' TERM && while true; do sleep 0.1; done"
    monkeypatch.setattr(tuner, "TUNE", ("sh", "-c", hang))
    monkeypatch.setattr(tuner, "STOP_S", 0.3)
    monkeypatch.setattr(tuner, "LEAST_S", 0.1)
    monkeypatch.setattr(ground, "widened", lambda *_: (tmp_path / "m", tmp_path / "s"))
    out = tmp_path / "tuner.json"
    monkeypatch.setattr(sys, "argv", ["tuner.py", "--time-limit", "4", "--folder", str(tmp_path), "--out", str(out)])
    tuner.main()
    result = json.loads(out.read_text())
    assert result["timedOut"] is True
    assert result["seconds"] < 30
    trials = result["probe"]["trials"]
    assert len(trials) >= 2
    met = [check["met"] for check in result["checks"]]
    assert met[1:] == [None, None, None], "of the chosen policy nothing is met or missed in a run that did not end"
    said = capfd.readouterr().out.rstrip().splitlines()
    assert said[-1] == str(out), "the table is the last thing it prints"
    head = next(i for i, line in enumerate(said) if line.split() == " ".join(tuner.HEAD).split())
    assert said[head + 1].split()[:2] == ["0", "exact"]
    assert [line.split()[0] for line in said[head + 1 : head + 1 + len(trials)]] == [str(trial["number"]) for trial in trials]


def test_a_run_is_not_begun_without_time_for_it(tmp_path: Path) -> None:
    made = tuner.out_of_time(None, report.Report("tuner", tmp_path / "tuner.json"))
    assert (made["outcome"], made["trials"]) == (tuner.TIMED_OUT, [])
    assert [check.met for check in tuner.checks(made, 9.0, 6.0)] == [True, None, None, None]


def test_a_table_is_in_line_and_targets_say_what_was_not_measured() -> None:
    assert report.table(["a", "bcd"], [["12", "3"]]) == " a  bcd\n12    3\n"
    assert report.at_most("t", None, 3).line() == ["t", "", "not measured"]
    assert report.at_least("t", 2.5, 2, "x").line() == ["t", "2.5x", "met"]
    assert report.at_most("t", 2.5, 2, " us").line() == ["t", "2.5 us", "missed"]


def test_the_page_says_what_the_results_say() -> None:
    text = page.PAGE.read_text()
    assert page.rendered(text) == text, "docs/benchmarks/README.md is out of date; run `python -m benchmarks.gpu.page`"
    assert {match[2] for match in page.BLOCK.finditer(text)} <= set(page.BLOCKS)


def test_the_page_is_made_of_results(tmp_path: Path) -> None:
    import json

    found, line = serve.judged(CELLS, QWEN3_30B, 3.0e12)
    result = {
        "machine": {"cpu": "none", "gpu": "GPU X", "driver": "1", "torch": "2"}, "command": "python x", "seconds": 3.0, "shape": "Y z",
        "copyBytesPerS": 3.0e12, "fit": line and line.__dict__, "cells": found,
        "checks": [check.__dict__ for check in serve.checks(found, None)],
    }  # fmt: skip
    (tmp_path / "serve-qwen3-30b.json").write_text(json.dumps(result))
    made = page.rendered("<!-- bench:serve-qwen3-30b -->\n<!-- /bench -->\n<!-- bench:kernel -->\n<!-- /bench -->\n", tmp_path)
    assert "GPU X, driver 1, torch 2; `python x`, 3 s." in made
    assert "Random weights at the dimensions of Y z; a copy moved 3.00 TB/s" in made
    assert "results/speedup-y-z-skewed.svg" in made
    assert "| skewed | 16 | sere S=2 | 19.0 | 3.900 |" in made
    assert made.count(page.NOT_YET) == 1
    assert page.rendered(made, tmp_path) == made
    drawn = page.figure(result, "skewed")
    assert drawn.count("<polyline") == 3
    assert "nan" not in drawn


@pytest.mark.parametrize(("stage", "rows"), [("kernel", 2), ("quality", 1)])
def test_a_stage_runs_to_its_end_without_a_gpu(stage: str, rows: int, tmp_path: Path) -> None:
    """`--tiny`, as the runbook asks for before a machine is lent; `layer` and those that need an engine have tests of their own."""
    out = tmp_path / f"{stage}.json"
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.gpu.{stage}", "--tiny", "--out", str(out)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    result = json.loads(out.read_text())
    assert len(result["rows"]) >= rows
    if stage == "kernel":
        assert set(result["rows"][0]["coldUs"]) == set(kernel_stage.POLICIES)
    assert done.stdout.rstrip().endswith(str(out)), "the table is the last thing it prints"


def test_rows_are_kept_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that goes away in the middle leaves the rows that it had measured."""
    out = tmp_path / "kernel.json"
    sizes = iter((1, 2))

    def row(*_: Any, **__: Any) -> dict[str, Any]:
        if next(sizes) == 2:
            raise KeyboardInterrupt
        return {"experts": 16, "tokens": 1}

    monkeypatch.setattr(kernel_stage, "row", row)
    monkeypatch.setattr(kernel_stage, "cold", lambda *_, **__: {})
    monkeypatch.setattr(sys, "argv", ["kernel", "--tiny", "--out", str(out)])
    with pytest.raises(KeyboardInterrupt):
        kernel_stage.main()
    assert json.loads(out.read_text())["rows"] == [{"experts": 16, "tokens": 1, "coldUs": {}}]
