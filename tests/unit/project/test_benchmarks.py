"""The benchmarks' own arithmetic: many batches at once against the reference, intervals, and tables that cannot drift."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import novices, policies, policies_page, pruned, render, rerouted, results_page
from benchmarks.experts import Experts, least, observed
from benchmarks.lanes import Lanes, answers, prompted
from sere_ext.contract.errors import PolicyError
from sere_ext.contract.policy import Kind
from sere_ext.routing import reference
from tests.assets.make import tokenizer
from tests.assets.make.models import ROWS_MOE, TINY

EXPERTS, TOP_K, BATCHES, BATCH = 16, 4, 3, 5
OPTIONS = {"maxExperts": "max_experts", "minShare": "min_share"}  # outside name -> argument


class Routers(Lanes):
    """A model of which only the router's shape is there."""

    def __init__(self) -> None:
        self.experts, self.top_k, self.layers = EXPERTS, TOP_K, 2
        self.config = {"norm_topk_prob": True}


@pytest.mark.parametrize("bucket", rerouted.grid((1, 2, 3), (0.3, 0.5), (4, 8), EXPERTS), ids=rerouted.describe)
def test_many_batches_at_once_are_rerouted_as_each_one_alone(bucket: dict[str, Any]) -> None:
    """Batches share a tensor and nothing else: each gets what `reference.reroute` gives it by itself; the counts are theirs."""
    given = {OPTIONS.get(name, name): value for name, value in bucket.items()} | {"kind": Kind(bucket["kind"])}
    source = torch.Generator().manual_seed(1)
    logits = torch.randn(BATCHES * BATCH, EXPERTS, generator=source) * 2
    similarity = torch.rand(2, EXPERTS, EXPERTS, generator=source)
    similarity = (similarity + similarity.mT) / 2
    model = Routers()
    weights, ids = model.top(logits)
    route = rerouted.Rerouted(model, similarity, bucket, BATCH)
    found = route(1, logits)
    active = []
    for group in range(BATCHES):
        mine = slice(group * BATCH, (group + 1) * BATCH)
        told = reference.reroute(
            ids[mine],
            weights[mine],
            num_experts=EXPERTS,
            similarity=similarity[1],
            renormalise=True,
            logits=logits[mine],
            **given,
        )
        active.append(told.active_after)
        expected = torch.zeros(BATCH, EXPERTS).scatter_add_(1, told.ids.long(), told.weights)
        torch.testing.assert_close(found[mine], expected, atol=1e-6, rtol=0)
    assert route.counts()["active"] == pytest.approx(sum(active) / BATCHES)


@pytest.mark.parametrize("keep_active", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.6])
def test_a_dropped_slot_of_kind_novice_becomes_a_mean_output_with_its_own_weight(keep_active: bool, share: float) -> None:
    """Worked out token by token: the top S with enough weight stay; with keepActive so does what another token of the batch keeps."""
    S, model = 2, Routers()
    logits = torch.randn(BATCHES * BATCH, EXPERTS, generator=torch.Generator().manual_seed(3)) * 2
    bucket = {"kind": "novice", "S": S, "minShare": share, "keepActive": keep_active}
    route = novices.Novices(model, bucket, BATCH)
    found = route(0, logits)
    weights, ids = model.top(logits)
    active = []
    for group in range(BATCHES):
        tokens = range(group * BATCH, (group + 1) * BATCH)
        kept = {
            t: {int(ids[t, slot]) for slot in range(S) if weights[t, slot] >= share * weights[t, 0]} for t in tokens
        }  # a router's slots come best first
        union = set().union(*kept.values())
        active.append(len(union))
        for t in tokens:
            stays = union if keep_active else kept[t]
            expected = torch.zeros(2 * EXPERTS)
            for expert, weight in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
                expected[expert if expert in stays else EXPERTS + expert] = weight
            torch.testing.assert_close(found[t], expected, atol=1e-6, rtol=0)
    assert route.counts()["active"] == pytest.approx(sum(active) / BATCHES)
    assert route.counts()["slots"] == pytest.approx(float((found[:, :EXPERTS] > 0).sum()) / len(found))


@pytest.fixture(scope="module")
def tiny() -> Lanes:
    return Lanes(TINY.directory)


@pytest.fixture(scope="module")
def tiny_experts(tiny: Lanes) -> Experts:
    return observed(tiny, TINY.tasks.items("calibration", 40, 0))


def test_experts_are_observed_on_the_tokens_that_chose_them(tiny: Lanes, tiny_experts: Experts) -> None:
    """Mean, variance, frequency and saliency of two experts of the second layer, from all outputs held at once."""
    layer, outputs, tokens = 1, {0: [], 7: []}, 0
    for item in TINY.tasks.items("calibration", 40, 0):
        ids = torch.tensor([[tokenizer.IDS[c] for c in item.prompt + item.answer]])
        seen: dict[int, torch.Tensor] = {}
        length = ids.shape[1]
        tiny.forward(ids, torch.arange(length)[None], tiny.cache(1, length), torch.arange(1), tiny.exact, seen.__setitem__)
        tokens += length
        mix = tiny.exact(layer, seen[layer] @ tiny.weights[f"model.layers.{layer}.mlp.gate.weight"].T)
        for expert, found in outputs.items():
            mine = mix[:, expert] > 0
            found += list(zip(mix[mine, expert], tiny.expert(layer, expert, seen[layer][mine]), strict=True))
    for expert, found in outputs.items():
        made = torch.stack([output for _, output in found])
        one = [getattr(tiny_experts, name)[layer, expert] for name in ("means", "variance", "frequency", "saliency")]
        torch.testing.assert_close(one[0], made.mean(0), atol=1e-4, rtol=1e-4)
        assert float(one[1]) == pytest.approx(float((made - made.mean(0)).square().sum(1).mean()), rel=1e-3)
        assert float(one[2]) == pytest.approx(len(found) / tokens)
        assert float(one[3]) == pytest.approx(
            sum(float(weight * output.norm()) for weight, output in found) / len(found), rel=1e-4
        )


def _logits(model: Lanes, prompt: str) -> torch.Tensor:
    ids = torch.tensor([[tokenizer.IDS[c] for c in prompt]])
    length = ids.shape[1]
    return model.forward(ids, torch.arange(length)[None], model.cache(1, length), torch.arange(1), model.exact)


def test_a_pruned_checkpoint_is_the_model_without_these_experts(tiny: Lanes, tiny_experts: Experts, tmp_path: Path) -> None:
    """As transformers loads it, and as the lanes mask it; and it is not the whole model."""
    from transformers import Qwen3MoeForCausalLM

    smaller = pruned.prune(TINY.directory, tiny_experts, "reap", 0.5)
    assert smaller.removed.sum(1).tolist() == [TINY.experts // 2] * smaller.layers
    written = pruned.write(TINY.directory, tmp_path / "half", smaller.removed)
    prompt = TINY.tasks.items("eval", 1, 2)[0].prompt
    expected = _logits(smaller, prompt)
    torch.testing.assert_close(_logits(Lanes(written), prompt), expected, atol=1e-4, rtol=0)
    ids = torch.tensor([[tokenizer.IDS[c] for c in prompt]])
    with torch.no_grad():
        torch.testing.assert_close(Qwen3MoeForCausalLM.from_pretrained(written)(ids).logits, expected, atol=1e-3, rtol=0)
    assert (_logits(tiny, prompt) - expected).abs().max() > 1e-2


def test_layers_that_keep_different_numbers_of_experts_are_no_checkpoint(tmp_path: Path) -> None:
    removed = torch.zeros(4, TINY.experts, dtype=torch.bool)
    removed[2, 5] = True
    with pytest.raises(ValueError, match="as many experts"):
        pruned.write(TINY.directory, tmp_path, removed)


def test_an_expert_removed_as_mone_removes_it_puts_out_its_mean(tiny_experts: Experts) -> None:
    """By hand for one layer: chosen as before, with its weight, whatever the token; what is left counts as active."""
    model = pruned.prune(TINY.directory, tiny_experts, "mone", 0.5)
    assert torch.equal(model.removed, least(tiny_experts.frequency * tiny_experts.variance, 0.5))
    x = torch.randn(6, 128, generator=torch.Generator().manual_seed(5))
    route = pruned.Remaining(rerouted.Rerouted(model, torch.empty(0), {"kind": "exact"}, 3), model.removed, 3)
    found = model.moe(1, x, route)
    mix = model.exact(1, x @ model.weights["model.layers.1.mlp.gate.weight"].T)
    gone = model.removed[1]
    expected = (mix * gone) @ tiny_experts.means[1]
    for expert in (~gone).nonzero().flatten().tolist():
        expected += mix[:, expert, None] * model.expert(1, expert, x)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    own = ((mix > 0) & ~gone).view(2, 3, -1)
    assert route.counts()["active"] == pytest.approx(float(own.any(1).sum()) / 2)
    assert route.counts()["slots"] == pytest.approx(float(own.sum()) / 6)


def test_the_sequences_of_a_batch_are_at_different_places_of_their_answers(tiny: Lanes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that start together would choose alike at every step, and touch fewer experts than a server's do."""
    asked = prompted(tiny, TINY.tasks.items("eval", 64, 2))
    places: list[int] = []
    forward = tiny.forward

    def watched(ids: torch.Tensor, positions: torch.Tensor, *rest: Any) -> torch.Tensor:
        places.append(len(set(positions.flatten().tolist())))
        return forward(ids, positions, *rest)

    monkeypatch.setattr(tiny, "forward", watched)
    texts = answers(tiny, asked, tiny.exact, batch=32)
    assert sum(text == item.answer for text, item in zip(texts, asked.items, strict=True)) >= 63
    assert min(places[asked.longest :]) > asked.longest // 2


def _cell(policy: str, kind: str, active: float, wrong: int) -> policies.Cell:
    right = [index >= wrong for index in range(200)]
    return policies.Cell(16, {"kind": kind}, policy, right, [], row={"active": active, "dropPoints": wrong / 2})


def test_a_rival_is_picked_by_its_cost_and_never_by_its_answers() -> None:
    cells = [
        _cell("oea a", "oea", 10.0, 0), _cell("oea b", "oea", 15.2, 30), _cell("oea c", "oea", 15.5, 0), _cell("topk a", "topk", 16.0, 0),
        _cell("novice a", "novice", 15.0, 10),
    ]  # fmt: skip
    (found,) = policies.duels(cells)
    assert (found["policy"], found["rival"], found["verdict"], found["gainPoints"]) == ("novice a", "oea b", "wins", 10.0)


def test_a_policy_that_the_model_cannot_run_is_refused() -> None:
    with pytest.raises(PolicyError, match="S"):
        rerouted.Rerouted(Routers(), torch.eye(EXPERTS).expand(2, -1, -1), {"kind": "topk", "S": TOP_K + 1}, BATCH)


@pytest.mark.parametrize(("losses", "gains", "n"), [(0, 0, 4000), (7, 2, 4000), (3, 9, 4000), (400, 100, 4000), (40, 0, 200)])
def test_the_interval_of_a_drop_holds_exactly_what_the_score_test_accepts(losses: int, gains: int, n: int) -> None:
    """Against the tuner's one-sided test at each limit that it is made for (drops above 0)."""
    from scipy import stats as sps

    from sere_autotune.trial.stats import noninferiority_p

    low, high = policies.drop_interval(losses, gains, n)
    assert low <= (losses - gains) / n <= high
    assert (low, high) == pytest.approx(tuple(-edge for edge in reversed(policies.drop_interval(gains, losses, n))), abs=1e-9)
    # The tuner's p-value has the chance of seeing no loss at all as its floor.
    assert noninferiority_p(losses, gains, n, high) == pytest.approx(max(1 - sps.norm.cdf(policies.Z), (1 - high) ** n), rel=0.01)


@pytest.mark.parametrize(("points", "code"), [(0.9, 0), (1.1, 1)])
def test_a_model_trained_anew_may_differ_by_a_point_and_no_more(
    points: float, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import retrained

    compared: list[Path] = []

    def accuracies(directory: Path, *_: object) -> dict[str, float]:
        compared.append(directory)
        return {"exact": 99.5 - (points if directory == Path("build/retrained/rows_moe") else 0)}

    monkeypatch.setattr(retrained, "accuracies", accuracies)
    monkeypatch.setattr("sys.argv", ["retrained", "build/retrained/rows_moe"])
    with pytest.raises(SystemExit) as ended:
        retrained.main()
    assert ended.value.code == code
    assert compared == [ROWS_MOE.directory, Path("build/retrained/rows_moe")]
    assert '"exactApartPoints"' in capsys.readouterr().out


@pytest.mark.parametrize("chosen", [True, False], ids=["certified", "nothing found"])
def test_what_the_engine_benchmarks_write_is_what_the_page_reads(
    chosen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of half an hour must not end in a row that cannot be made; `sere` is replaced by the form of what it leaves."""
    from benchmarks import tune

    telemetry = json.loads((render.RESULTS / "telemetry.json").read_text())

    def search(command: list[Any], flags: dict[str, Any], accept: tuple[int, ...]) -> dict[str, Any]:
        result = {
            "items": 900,
            "p_value": 0.01,
            "speedup": {"mean": {"value": 1.5, "low": 1.4, "high": 1.6, "pairs": 4}, "p95": None},
        }
        found = {
            "seconds": {"search": 60.0, "certification": 90.0},
            "trials": [{}] * 6,
            "pace": {"startSeconds": 30.0},
            "outcome": "Chosen",
        }
        rung = {"result": result, "verdict": "passed", "describe": "oea 2 for 8-64 tokens"}
        ladder = {"ladder": [{**rung, "describe": "topk 3"}, rung] if chosen else [], "chosen": 2 if chosen else None}
        return found | ladder | {"condition": "equal concurrency 16", "noiseFloor": None}

    monkeypatch.setattr(tune, "sere", search)
    monkeypatch.setattr(tune, "tuner_flags", lambda *_, **__: {})
    out = tmp_path / "tune.json"
    monkeypatch.setattr("sys.argv", ["benchmark", "--folder", str(tmp_path), "--out", str(out)])
    tune.main()
    text = results_page.engine_runs(json.loads(out.read_text()), telemetry)
    assert f"`rows_moe` (64 experts, top-8), widened {ROWS_MOE.widening} times, bfloat16: " in text
    certified = "certificate passed on 900 items, 1.5 minutes for 2 of the ladder; oea 2 for 8-64 tokens: 1.50x [1.40, 1.60]"
    assert f"60 trials in 10 minutes, {certified if chosen else 'nothing was certified (Chosen)'}" in text


@pytest.mark.parametrize(("seconds", "words"), [(25, "0 minutes"), (80, "1 minute"), (100, "2 minutes")])
def test_processor_time_is_one_minute_or_some_minutes(seconds: float, words: str) -> None:
    result = json.loads((render.RESULTS / "policies-tiny_moe.json").read_text())
    text = policies_page.policies_run({**result, "batches": {"1": {"processorSeconds": seconds}}})
    assert f"; {words} of processor time." in text


@pytest.mark.parametrize("page", render.PAGES, ids=lambda page: page.name)
def test_no_table_drifts_from_its_run(page: Path) -> None:
    """Every measured table is what `benchmarks/render.py` makes of the committed results."""
    text = page.read_text()
    assert "<!-- bench:" in text
    assert render.rendered(text) == text, f"{page.name} is out of date; run `python -m benchmarks.render`"


@pytest.mark.parametrize("name", ["rows_moe", "tiny_moe"])
def test_committed_comparisons_do_not_contradict_themselves(name: str) -> None:
    """Plain top-k routes every token by itself, so its answers do not depend on the batch; exact routing keeps every slot."""
    found = json.loads((render.RESULTS / f"policies-{name}.json").read_text())
    right: dict[str, set[float]] = {}
    for row in (row for part in found["batches"].values() for row in part["rows"]):
        if row["kind"] == "topk":
            right.setdefault(row["policy"], set()).add(row["correctPercent"])
        if row["policy"] == "exact":
            assert row["slots"] == found["topK"]
    assert right and all(len(percents) == 1 for percents in right.values()), right
