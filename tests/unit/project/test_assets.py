"""The small model under tests/assets: its items, its weights, its widened form."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ASSETS = Path(__file__).resolve().parents[2] / "assets"
MODEL = ASSETS / "tiny_moe"
sys.path.insert(0, str(ASSETS / "make"))  # scripts, run by path; not a package

import tasks  # noqa: E402

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

LIMIT_BYTES = 8_000_000
LOGIT_TOLERANCE = 2e-4  # float32 rounding through four layers


@pytest.fixture(scope="module", autouse=True)
def _two_threads():
    """Small matrices: more threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    return transformers.Qwen3MoeForCausalLM.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(MODEL)


class TestItems:
    def test_same_arguments_same_items(self):
        assert tasks.items("eval", 300, 7) == tasks.items("eval", 300, 7)

    def test_longer_list_begins_with_the_shorter(self):
        assert tasks.items("eval", 300, 7)[:100] == tasks.items("eval", 100, 7)

    def test_pinned(self):
        """Figures in the README hold for these items: a change here is a change of the benchmark."""
        first = tasks.items("eval", 3, 1)
        assert [item.as_dict() for item in first] == PINNED

    def test_seed_matters(self):
        assert tasks.items("eval", 50, 1) != tasks.items("eval", 50, 2)

    @pytest.mark.parametrize("split", ["train", "eval", "calibration"])
    def test_split_owns_its_prompts(self, split):
        found = tasks.items(split, 500, 3)
        assert {tasks.split_of(item.prompt) for item in found} == {split}
        assert len({item.prompt for item in found}) == 500

    def test_every_family_in_every_split(self):
        measured = set(tasks.FAMILIES) - tasks.UNMASTERED
        assert {item.task for item in tasks.items("train", 300, 0)} == set(tasks.FAMILIES)
        assert {item.task for item in tasks.items("eval", 300, 0)} == measured
        assert {item.task for item in tasks.items("calibration", 300, 0)} == measured

    def test_enough_for_certification(self):
        assert len(tasks.items("eval", 20_000, 1)) == 20_000

    def test_answers_decode_in_several_steps(self):
        lengths = [len(item.answer) for item in tasks.items("eval", 1000, 1)]
        assert min(lengths) >= 4
        assert max(lengths) <= 10

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
    def test_family_rule(self, task, prompt, answer):
        """The rules by hand, held against what the generator makes: it must reproduce the example's answer."""
        assert solve(task, prompt) == answer
        for item in tasks.items("train", 1500, 11):
            if item.task == task:
                assert solve(task, item.prompt) == item.answer

    def test_command_line(self, tmp_path):
        out = tmp_path / "items.jsonl"
        command = [sys.executable, str(ASSETS / "make" / "items.py"), "--split", "calibration", "--count", "5", "--out", str(out)]
        subprocess.run(command, check=True, cwd=tmp_path)
        assert [json.loads(line) for line in out.read_text().splitlines()] == [
            item.as_dict() for item in tasks.items("calibration", 5, 0)
        ]


PINNED: list[dict[str, str]] = [
    {"prompt": "Rqxnfwxd=", "answer": "dxwfnxq", "task": "reverse"},
    {"prompt": "Iumyef,ehwxd=", "answer": "uemhywexfd", "task": "interleave"},
    {"prompt": "C3tjppflv=", "answer": "wmssioy", "task": "shift"},
]


def solve(task: str, prompt: str) -> str:
    """Answer a prompt from its text alone, written independently of the generator."""
    body = prompt[1:-1]
    if task == "reverse":
        return "".join(reversed(body))
    if task == "sort":
        return "".join(digit * body.count(digit) for digit in "0123456789")
    if task == "shift":
        return "".join(chr((ord(c) - 97 + int(body[0])) % 26 + 97) for c in body[1:])
    if task == "prefix_sums":
        return "".join(str(sum(map(int, body[: end + 1])) % 10) for end in range(len(body)))
    if task == "run_lengths":
        return "".join(f"{body.count(c)}{c}" for c in dict.fromkeys(body))
    half = len(body) // 2
    left, right = body[:half], body[half + 1 :]
    if task == "interleave":
        return "".join(map("".join, zip(left, right, strict=True)))
    if task == "carry":
        return f"{int(left) + int(right):0{half + 1}d}"[::-1]
    rule = {"add": lambda a, b: a + b, "subtract": lambda a, b: a - b, "multiply": lambda a, b: a * b, "maximum": max}[task]
    return "".join(str(rule(int(a), int(b)))[-1] if rule(int(a), int(b)) >= 0 else str(rule(int(a), int(b)) + 10)
                   for a, b in zip(left, right, strict=True))  # fmt: skip


class TestFiles:
    def test_small_enough_to_commit(self):
        assert sum(path.stat().st_size for path in MODEL.iterdir()) <= LIMIT_BYTES

    def test_weights_are_float32_one_tensor_per_expert(self):
        weights = safetensors_torch.load_file(MODEL / "model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {torch.float32}
        assert "model.layers.0.mlp.experts.15.gate_proj.weight" in weights

    def test_tokenizer_round_trip(self, tokenizer):
        for item in tasks.items("eval", 200, 5):
            ids = tokenizer(item.prompt + item.answer).input_ids
            assert len(ids) == len(item.prompt + item.answer)
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == item.prompt + item.answer

    def test_eos_agrees_everywhere(self, model, tokenizer):
        assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id


def generate(model, tokenizer, prompts: list[str]) -> list[str]:
    """Greedy answers by transformers' own generation, stopping at EOS."""
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    out = model.generate(**batch, max_new_tokens=16, do_sample=False)
    return tokenizer.batch_decode(out[:, batch.input_ids.shape[1] :], skip_special_tokens=True)


def first_ids(count: int, seed: int):
    """The first 8 ids of each item, prompt and answer; no item is shorter. int64 [count, 8]."""
    from tokenizer import IDS

    return torch.tensor([[IDS[c] for c in item.prompt + item.answer][:8] for item in tasks.items("eval", count, seed)])


class TestModel:
    def test_accuracy_in_transformers(self, model, tokenizer):
        asked = tasks.items("eval", 300, 1)
        texts = generate(model, tokenizer, [item.prompt for item in asked])
        right = sum(text == item.answer for text, item in zip(texts, asked, strict=True))
        assert right / len(asked) >= 0.97

    def test_routing_is_spread(self, model):
        """No layer leaves experts idle: each one gets at least a tenth of an even share."""
        ids = first_ids(300, 2)
        with torch.no_grad():
            logits = model.model(input_ids=ids, output_router_logits=True).router_logits
        for layer in logits:
            load = torch.bincount(layer.topk(4, -1).indices.flatten(), minlength=16) / (layer.shape[0] * 4)
            assert load.min() >= 0.1 / 16

    def test_reference_computes_what_transformers_does(self, model):
        from reference import Reference

        reference = Reference(MODEL)
        ids = first_ids(50, 3)
        positions = torch.arange(8).expand(50, -1)
        cache = reference.cache(50, 10)
        first = reference.forward(ids[:, :7], positions[:, :7], cache, torch.arange(50))
        last = reference.forward(ids[:, 7:], positions[:, 7:], cache, torch.arange(50))  # one cached decode step
        with torch.no_grad():
            expected = model(input_ids=ids).logits
        torch.testing.assert_close(torch.cat([first, last], 1), expected, atol=LOGIT_TOLERANCE, rtol=0)

    def test_widening_preserves_the_function(self, model, tmp_path):
        from widen import widen

        wide = transformers.Qwen3MoeForCausalLM.from_pretrained(widen(MODEL, tmp_path / "wide", 4))
        assert wide.config.moe_intermediate_size == 4 * model.config.moe_intermediate_size
        ids = first_ids(50, 4)
        with torch.no_grad():
            torch.testing.assert_close(wide(input_ids=ids).logits, model(input_ids=ids).logits, atol=LOGIT_TOLERANCE, rtol=0)
