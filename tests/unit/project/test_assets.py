"""The small models under tests/assets: their items, weights, routing and widened form."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.assets.make import models
from tests.assets.make.models import ROWS_MOE, TINY, Recipe
from tests.assets.make.row_tasks import ROWS
from tests.assets.make.short_tasks import SHORT
from tests.assets.make.tasks import Split, TaskSet
from tests.kit import ROOT

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

LIMIT_BYTES = 8_000_000
LOGIT_TOLERANCE = 2e-4  # float32 rounding through four layers
RECIPES = [TINY, ROWS_MOE]
TASKS = {"short": SHORT, "rows": ROWS}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Small matrices: more threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=RECIPES, ids=lambda recipe: recipe.name)
def recipe(request) -> Recipe:
    return request.param


@pytest.fixture(scope="module")
def model(recipe):
    return transformers.Qwen3MoeForCausalLM.from_pretrained(recipe.directory)


@pytest.fixture(scope="module")
def tokenizer(recipe):
    return transformers.AutoTokenizer.from_pretrained(recipe.directory)


@pytest.fixture(params=TASKS.values(), ids=TASKS)
def tasks(request) -> TaskSet:
    return request.param


class TestItems:
    def test_same_arguments_same_items(self, tasks: TaskSet):
        assert tasks.items("eval", 300, 7) == tasks.items("eval", 300, 7)

    def test_longer_list_begins_with_the_shorter(self, tasks: TaskSet):
        assert tasks.items("eval", 300, 7)[:100] == tasks.items("eval", 100, 7)

    @pytest.mark.parametrize("name", TASKS)
    def test_pinned(self, name: str):
        """Figures in the documentation hold for these items: a change here is a change of the benchmark."""
        first = TASKS[name].items("eval", 3, 1)
        assert [item.as_dict() for item in first] == PINNED[name]

    def test_seed_matters(self, tasks: TaskSet):
        assert tasks.items("eval", 50, 1) != tasks.items("eval", 50, 2)

    @pytest.mark.parametrize("split", ["train", "eval", "calibration"])
    def test_split_owns_its_prompts(self, tasks: TaskSet, split: Split):
        found = tasks.items(split, 500, 3)
        assert {tasks.split_of(item.prompt) for item in found} == {split}
        assert len({item.prompt for item in found}) == 500

    def test_every_family_in_every_split(self, tasks: TaskSet):
        measured = set(tasks.families) - tasks.unmastered
        assert {item.task for item in tasks.items("train", 300, 0)} == set(tasks.families)
        assert {item.task for item in tasks.items("eval", 300, 0)} == measured
        assert {item.task for item in tasks.items("calibration", 300, 0)} == measured

    def test_enough_for_certification(self, tasks: TaskSet):
        assert len(tasks.items("eval", 20_000, 1)) == 20_000

    @pytest.mark.parametrize(("name", "least", "most"), [("short", 4, 10), ("rows", 40, 100)])
    def test_answers_decode_in_several_steps(self, name: str, least: int, most: int):
        lengths = [len(item.answer) for item in TASKS[name].items("eval", 1000, 1)]
        assert min(lengths) >= least
        assert max(lengths) <= most

    def test_items_fit_the_model(self, recipe: Recipe):
        for item in recipe.tasks.items("eval", 1000, 2):
            assert len(item.prompt + item.answer) <= recipe.longest_item
            assert len(item.answer) < recipe.longest_answer

    @pytest.mark.parametrize(
        ("task", "prompt", "answer"),
        [
            ("reverse", "Rabcd=", "dcba"),
            ("sort", "S52013=", "01235"),
            ("shift", "C3axyz=", "dabc"),
            ("add", "A1299+3405=", "4694"),
            ("subtract", "B1203-3405=", "8808"),
            ("multiply", "M1239*3456=", "3854"),
            ("maximum", "X1290^3405=", "3495"),
            ("prefix_sums", "P48213=", "42458"),
            ("run_lengths", "Eaabccc=", "2a1b3c"),
            ("interleave", "Iabc,xyz=", "axbycz"),
            ("carry", "L9999+0001=", "00001"),
        ],
    )
    def test_short_family_rule(self, task: str, prompt: str, answer: str):
        """The rules by hand, held against what the generator makes: it must reproduce the example's answer."""
        assert solve(task, prompt) == answer
        for item in SHORT.items("train", 1500, 11):
            if item.task == task:
                assert solve(task, item.prompt) == item.answer

    @pytest.mark.parametrize(
        ("task", "prompt", "begins"),
        [
            ("running_sums", "P439345=", "476938E417697S"),
            ("cipher", "C4uhnztd=", "ylrdxhEcpvhblS"),
            ("add", "A123456,900004=", "023450E923454S"),
            ("subtract", "B123456,900004=", "223452E787652S"),
            ("rotate", "L2abcdef=", "cdefabEefabcdS"),
            ("reverse_shift", "R1abcxyz=", "azydcbEcdezabS"),
            ("multiply", "M7123456=", "741852E987654S"),
        ],
    )
    def test_row_family_rule(self, task: str, prompt: str, begins: str):
        """The first two rows by hand; every later row of every item by the same rule."""
        assert solve_rows(task, prompt).startswith(begins)
        for item in ROWS.items("train", 700, 11):
            if item.task == task:
                assert solve_rows(task, item.prompt) == item.answer

    def test_command_line(self, recipe: Recipe, tmp_path: Path):
        out = tmp_path / "items.jsonl"
        options = ["--model", recipe.name, "--split", "calibration", "--count", "5", "--out", str(out)]
        subprocess.run([sys.executable, "-m", "tests.assets.make.items", *options], check=True, cwd=ROOT)
        assert [json.loads(line) for line in out.read_text().splitlines()] == [
            item.as_dict() for item in recipe.tasks.items("calibration", 5, 0)
        ]


PINNED: dict[str, list[dict[str, str]]] = {
    "short": [
        {"prompt": "Rqxnfwxd=", "answer": "dxwfnxq", "task": "reverse"},
        {"prompt": "Iumyef,ehwxd=", "answer": "uemhywexfd", "task": "interleave"},
        {"prompt": "C3tjppflv=", "answer": "wmssioy", "task": "shift"},
    ],
    "rows": [
        {"prompt": "M9881304=", "answer": "229706E881304S229706X881304+229706-881304*229706^881304", "task": "multiply"},
        {"prompt": "C9btphqd=", "answer": "kcyqzmEtlhzivScuqireXldzran+umiajw-dvrjsf*measbo^vnjbkx", "task": "cipher"},
        {"prompt": "L3bqjydi=", "answer": "ydibqjEbqjydiSydibqjXbqjydi+ydibqj-bqjydi*ydibqj^bqjydi", "task": "rotate"},
    ],
}


def solve(task: str, prompt: str) -> str:
    """Answer a prompt of the short families from its text alone, written independently of the generator."""
    body = prompt[1:-1]
    if task == "reverse":
        return "".join(reversed(body))
    if task == "sort":
        return "".join(digit * body.count(digit) for digit in "0123456789")
    if task == "shift":
        return moved(body[1:], int(body[0]))
    if task == "prefix_sums":
        return sums(body)
    if task == "run_lengths":
        return "".join(f"{body.count(c)}{c}" for c in dict.fromkeys(body))
    half = len(body) // 2
    left, right = body[:half], body[half + 1 :]
    if task == "interleave":
        return "".join(map("".join, zip(left, right, strict=True)))
    if task == "carry":
        return f"{int(left) + int(right):0{half + 1}d}"[::-1]
    rule = {"add": lambda a, b: a + b, "subtract": lambda a, b: a - b, "multiply": lambda a, b: a * b, "maximum": max}[task]
    return "".join(
        str(rule(int(a), int(b)))[-1] if rule(int(a), int(b)) >= 0 else str(rule(int(a), int(b)) + 10)
        for a, b in zip(left, right, strict=True)
    )


def solve_rows(task: str, prompt: str) -> str:
    """Answer a prompt of the row families from its text alone, written independently of the generator."""
    body = prompt[1:-1]
    rows = body.split(",") if "," in body else [body[-6:]]
    given, key = len(rows), int(body[0]) if len(body) == 7 else 0
    while len(rows) < given + 8:
        last = rows[-1]
        if task == "running_sums":
            rows.append(sums(last))
        elif task == "cipher":
            rows.append(moved(last, key))
        elif task == "rotate":
            rows.append("".join(last[(place + key) % 6] for place in range(6)))
        elif task == "reverse_shift":
            rows.append(moved("".join(reversed(last)), key))
        elif task == "multiply":
            rows.append("".join(str(int(digit) * key)[-1] for digit in last))
        else:
            sign = 1 if task == "add" else 9  # 9 is -1 modulo 10
            rows.append("".join(str(int(a) + sign * int(b))[-1] for a, b in zip(rows[-2], last, strict=True)))
    return "".join(f"{mark}{row}" for mark, row in zip(["", *"ESX+-*^"], rows[given:], strict=True))


def moved(letters: str, key: int) -> str:
    return "".join(chr((ord(c) - 97 + key) % 26 + 97) for c in letters)


def sums(digits: str) -> str:
    return "".join(str(sum(map(int, digits[: end + 1])) % 10) for end in range(len(digits)))


class TestFiles:
    def test_small_enough_to_commit(self, recipe: Recipe):
        assert sum(path.stat().st_size for path in recipe.directory.iterdir()) <= LIMIT_BYTES

    def test_weights_are_float32_one_tensor_per_expert(self, recipe: Recipe):
        weights = safetensors_torch.load_file(recipe.directory / "model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {torch.float32}
        last = weights[f"model.layers.3.mlp.experts.{recipe.experts - 1}.gate_proj.weight"]
        assert tuple(last.shape) == (recipe.expert_width, 128)

    def test_a_folder_is_known_by_its_name_or_its_experts(self, recipe: Recipe, tmp_path: Path):
        assert models.of(recipe.directory) is recipe
        (tmp_path / "config.json").write_text((recipe.directory / "config.json").read_text())
        assert models.of(tmp_path) is recipe

    def test_tokenizer_round_trip(self, recipe: Recipe, tokenizer):
        for item in recipe.tasks.items("eval", 200, 5):
            ids = tokenizer(item.prompt + item.answer).input_ids
            assert len(ids) == len(item.prompt + item.answer)
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == item.prompt + item.answer

    def test_eos_agrees_everywhere(self, model, tokenizer):
        assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id


def generate(model, tokenizer, recipe: Recipe, prompts: list[str]) -> list[str]:
    """Greedy answers by transformers' own generation, stopping at EOS."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    out = model.generate(**batch, max_new_tokens=recipe.longest_answer, do_sample=False)
    return tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :], skip_special_tokens=True)


def first_ids(recipe: Recipe, count: int, seed: int, length: int = 8):
    """The first so many ids of each item, prompt and answer; no item is shorter. int64 [count, length]."""
    from tests.assets.make.tokenizer import IDS

    found = recipe.tasks.items("eval", count, seed)
    return torch.tensor([[IDS[c] for c in item.prompt + item.answer][:length] for item in found])


class TestModel:
    def test_accuracy_in_transformers(self, model, tokenizer, recipe: Recipe):
        asked = recipe.tasks.items("eval", 5000 // recipe.longest_item, 1)
        texts = generate(model, tokenizer, recipe, [item.prompt for item in asked])
        right = sum(text == item.answer for text, item in zip(texts, asked, strict=True))
        assert right / len(asked) >= 0.97

    def test_routing_is_spread(self, model, recipe: Recipe):
        """No layer leaves experts idle: each one gets at least a tenth of an even share."""
        ids = first_ids(recipe, 300, 2, 60 if recipe is ROWS_MOE else 8)
        with torch.no_grad():
            logits = model.model(input_ids=ids, output_router_logits=True).router_logits
        for layer in logits:
            load = torch.bincount(layer.topk(recipe.top_k, -1).indices.flatten(), minlength=recipe.experts)
            assert load.min() / load.sum() >= 0.1 / recipe.experts

    def test_experts_are_neither_copies_nor_strangers(self, recipe: Recipe):
        """Half of all experts have another that is more alike than a random pair, and none has a double."""
        from tests.assets.make.reference import Reference

        reference = Reference(recipe.directory)
        inputs: dict[int, object] = {}
        ids = first_ids(recipe, 20, 6)
        positions = torch.arange(8).expand(20, -1)
        reference.forward(ids, positions, reference.cache(20, 8), torch.arange(20), spy=inputs.__setitem__)
        for layer, x in inputs.items():
            outputs = torch.stack([reference.expert(layer, expert, x).flatten() for expert in range(recipe.experts)])
            distance = torch.cdist(outputs, outputs)
            similarity = (1 - distance / distance.max()).fill_diagonal_(-1)
            nearest = similarity.max(1).values
            assert nearest.max() < 0.95
            assert nearest.median() > 0.3

    def test_reference_computes_what_transformers_does(self, model, recipe: Recipe):
        from tests.assets.make.reference import Reference

        reference = Reference(recipe.directory)
        ids = first_ids(recipe, 50, 3)
        positions = torch.arange(8).expand(50, -1)
        cache = reference.cache(50, 10)
        first = reference.forward(ids[:, :7], positions[:, :7], cache, torch.arange(50))
        last = reference.forward(ids[:, 7:], positions[:, 7:], cache, torch.arange(50))  # one cached decode step
        with torch.no_grad():
            expected = model(input_ids=ids).logits
        torch.testing.assert_close(torch.cat([first, last], 1), expected, atol=LOGIT_TOLERANCE, rtol=0)

    def test_widening_preserves_the_function(self, model, recipe: Recipe, tmp_path: Path):
        from tests.assets.make.widen import widen

        wide = transformers.Qwen3MoeForCausalLM.from_pretrained(widen(recipe.directory, tmp_path / "wide", 4, "float32"))
        assert wide.config.moe_intermediate_size == 4 * model.config.moe_intermediate_size
        ids = first_ids(recipe, 50, 4)
        with torch.no_grad():
            torch.testing.assert_close(wide(input_ids=ids).logits, model(input_ids=ids).logits, atol=LOGIT_TOLERANCE, rtol=0)

    def test_a_widened_models_similarity_is_the_small_ones_under_its_own_config(self, recipe: Recipe, tmp_path: Path):
        import numpy as np

        from sere_ext.contract.model_config import model_config_digest
        from sere_ext.contract.similarity import SimilarityMeta
        from sere_ext.similarity.file import read_similarity, write_similarity
        from sere_ext.similarity.hub import model_config_dict
        from tests.assets.make.widen import widen
        from tests.assets.make.widen_similarity import widen_similarity

        meta = SimilarityMeta(
            model_type="qwen3_moe", model_name="small", config_digest="sha256:0", data_digest="", tokens=1, layers=(0,), num_experts=2
        )  # fmt: skip
        write_similarity(tmp_path / "narrow", meta, {0: np.array([[1, 0.4], [0.4, 1]], np.float32)})
        model = widen(recipe.directory, tmp_path / "model", 2)
        found = read_similarity(widen_similarity(tmp_path / "narrow", model, tmp_path / "wide"))
        assert found.meta.config_digest == model_config_digest(model_config_dict(str(model)))
        assert found.matrices[0][0, 1] == np.float32(0.4)


class TestTraining:
    def test_sorted_experts_compute_what_transformers_does_gradients_too(self, model, recipe: Recipe):
        from tests.assets.make import train

        layer = model.model.layers[1].mlp
        x = torch.randn(40, 128, generator=torch.Generator().manual_seed(3))
        _, weights, ids = layer.gate(x)
        found = []
        for forward in (type(layer.experts).forward, train.sorted_experts):
            model.zero_grad()
            y = forward(layer.experts, x, ids, weights)
            y.square().mean().backward(retain_graph=True)
            found.append((y.detach(), layer.experts.gate_up_proj.grad.clone(), layer.experts.down_proj.grad.clone()))
        model.zero_grad()
        for theirs, ours in zip(*found, strict=True):
            torch.testing.assert_close(theirs, ours, atol=1e-6, rtol=1e-3)

    def test_gate_and_up_are_orthogonalised_apart_whatever_the_width(self):
        """At expert width 16 a down projection [128, 16] is as tall as a stack of gate and up: names tell them apart, not shapes."""
        from tests.assets.make import train

        moe = torch.nn.Module()
        moe.gate_up_proj = torch.nn.Parameter(torch.randn(3, 32, 128))
        moe.down_proj = torch.nn.Parameter(torch.randn(3, 128, 16))
        moe.norm = torch.nn.Parameter(torch.ones(128))
        stepper = train.optimisers(moe)[0]
        grads = {name: torch.randn_like(p) for name, p in moe.named_parameters()}
        before = {name: p.detach().clone() for name, p in moe.named_parameters()}
        for name, parameter in moe.named_parameters():
            parameter.grad = grads[name]
        stepper.step()
        decay = 1 - train.MUON_RATE * 0.01
        moved_by = {name: (before[name] * decay - p.detach()) / train.MUON_RATE for name, p in moe.named_parameters()}
        gate = train.orthogonalised(grads["gate_up_proj"][0, :16])  # a positive factor changes nothing
        torch.testing.assert_close(moved_by["gate_up_proj"][0, :16], gate, atol=1e-3, rtol=1e-3)
        down = train.orthogonalised(grads["down_proj"][1])
        torch.testing.assert_close(moved_by["down_proj"][1], down * (128 / 16) ** 0.5, atol=1e-3, rtol=1e-3)

    def test_a_stopped_run_goes_on_where_it_was(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        """Stopped after a checkpoint and started anew, it writes the weights of a run that was not stopped."""
        from tests.assets.make import train

        recipe = SimpleNamespace(**{name: getattr(ROWS_MOE, name) for name in ROWS_MOE.__slots__})
        recipe.experts, recipe.batch = 8, 4
        monkeypatch.setattr(train, "REPORT_STEPS", 2)
        train.train(recipe, tmp_path / "whole", 5, 1, 1)

        class StoppedError(Exception):
            pass

        def stop(*_: object) -> None:
            raise StoppedError

        monkeypatch.setattr(train, "save", stop)
        with pytest.raises(StoppedError):
            train.train(recipe, tmp_path / "stopped", 5, 1, 1)
        assert (tmp_path / "stopped.checkpoint").exists()
        monkeypatch.undo()
        monkeypatch.setattr(train, "REPORT_STEPS", 100)
        train.train(recipe, tmp_path / "stopped", 5, 1, 1)
        assert not (tmp_path / "stopped.checkpoint").exists()
        whole, again = (safetensors_torch.load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped"))
        assert all(torch.equal(whole[name], again[name]) for name in whole)

    def test_a_run_repeats_itself_and_writes_the_committed_architecture(self, recipe: Recipe, tmp_path: Path):
        """What `make retrain-model` rests on; on two steps of four items, so that the weights are worth nothing."""
        from tests.assets.make import train

        short = dataclasses.replace(recipe, batch=4)
        for name in ("one", "other"):
            train.train(short, tmp_path / name, steps=2, threads=1, seed=train.SEED)
        assert (tmp_path / "one" / "model.safetensors").read_bytes() == (tmp_path / "other" / "model.safetensors").read_bytes()
        committed = json.loads((recipe.directory / "config.json").read_text())
        written = json.loads((tmp_path / "one" / "config.json").read_text())
        assert written | {"transformers_version": ""} == committed | {"transformers_version": ""}
        assert (tmp_path / "one" / "tokenizer.json").read_text() == (recipe.directory / "tokenizer.json").read_text()
