"""Calibration: the definitions met by running sums, padding kept out, a killed run continued, every family's own experts asked."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from sere_ext.calibration.capture import collecting, run_batch
from sere_ext.calibration.checkpoint import Checkpoint
from sere_ext.calibration.experts import claims_experts, find_experts
from sere_ext.calibration.moments import frobenius, make_moments, moments_bytes
from sere_ext.calibration.run import Options, calibrate, described, made_from, read_texts
from sere_ext.cli.commands import parse_layers, parse_metric
from sere_ext.contract.errors import UnsupportedError, UsageError
from sere_ext.similarity.file import read_similarity
from tests.kit import TINY_MOE as MODEL
from tests.kit import pairwise

pytestmark = pytest.mark.usefixtures("one_thread")

METRICS = list(pairwise.METRICS)

COMMON = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 24, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "num_experts_per_tok": 2,
}  # fmt: skip
DEEPSEEK = {
    "n_routed_experts": 4, "moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
    "num_key_value_heads": 4, "q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    "mixtral": {"num_local_experts": 4},
    "deepseek_v2": {**DEEPSEEK, "topk_method": "greedy"},
    "deepseek_v3": {**DEEPSEEK, "num_hidden_layers": 3},
    "olmoe": {"num_experts": 4, "num_key_value_heads": 4},
    "granitemoe": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4},
    "glm4_moe": {"n_routed_experts": 4, "moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "phimoe": {"num_local_experts": 4},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 0},
    "jamba": {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 0, "use_mamba_kernels": False, "mamba_d_state": 4},
}


def network(family: str, **changed: Any) -> Any:
    torch.manual_seed(0)
    built = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**COMMON, **FAMILIES.get(family, {}), **changed}))
    for parameter in built.parameters():  # zero biases and tiny weights would hide a forgotten one
        torch.nn.init.normal_(parameter, std=0.3)
    return built.eval()


def outputs(experts: int = 5, tokens: int = 40, hidden: int = 6) -> torch.Tensor:
    """Expert outputs with means far from 0, one near copy and one scaled copy; float32 [E, N, H]."""
    made = torch.randn(experts, tokens, hidden, generator=torch.Generator().manual_seed(1)) + 3 * torch.arange(hidden)
    made[1] = made[0] + 1e-3 * made[2]
    made[3] = 2 * made[2]
    return made


@pytest.mark.parametrize("metric", METRICS)
def test_running_sums_meet_the_definition(metric: str) -> None:
    """Chunks of any size, halves apart and together, against all pairs over all outputs at once in float64."""
    whole = outputs()
    total = make_moments(metric, 5, "cpu")
    for start in range(0, 40, 7):
        total.add(whole[:, start : start + 7], (start // 7) % 2)
    first = torch.cat([whole[:, s : s + 7] for s in range(0, 40, 14)], 1)
    for got, of in ((total.matrix(), whole), (total.matrix((0,)), first)):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, pairwise.METRICS[metric](of.double()).numpy(), atol=1e-5)
        np.testing.assert_array_equal(got, got.T)
        assert np.diag(got).tolist() == [1.0] * 5
    assert sum(total.tokens) == 40


def test_copies_are_exactly_alike_among_many_experts_of_very_different_size() -> None:
    """Float32 products alone would put copies a thousandth apart, and a near copy nowhere."""
    made = torch.randn(32, 300, 96, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.1, 20, 32)[:, None, None]
    made[5] = made[30]
    made[6] = made[30] + 1e-4 * made[7]
    total = make_moments("frobenius", 32, "cpu")
    total.add(made, 0)
    got = total.matrix()
    assert got[5, 30] == 1.0
    np.testing.assert_allclose(got, pairwise.frobenius(made.double()).numpy(), atol=1e-6)


@pytest.mark.parametrize("share", [0.06, 0.11, 1.0])
def test_distances_keep_their_digits_whether_or_not_the_mean_is_taken_off(share: float) -> None:
    """Experts around a common answer, their distances this share of their size: on both sides of where it is taken off."""
    generator = torch.Generator().manual_seed(5)
    common, own = torch.randn(1, 500, 64, generator=generator), torch.randn(16, 500, 64, generator=generator)
    made = (1 - share) ** 0.5 * common + share**0.5 * own
    total = make_moments("frobenius", 16, "cpu")
    total.add(made, 0)
    assert bool(total.state()["centred"]) == (share < 0.1)
    np.testing.assert_allclose(total.matrix(), pairwise.frobenius(made.double()).numpy(), atol=3e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_a_token_on_which_an_expert_overflows_is_left_out(metric: str) -> None:
    whole, total, clean = outputs(), make_moments(metric, 5, "cpu"), make_moments(metric, 5, "cpu")
    clean.add(whole[:, torch.arange(40) != 7], 0)
    whole[2, 7, 3] = float("inf")
    total.add(whole, 0)
    total.add(whole[:, 7:8], 1)
    assert total.tokens == [39, 0]
    np.testing.assert_array_equal(total.matrix(), clean.matrix())


def test_many_equal_experts_are_all_alike() -> None:
    """More close pairs than experts: summed at once."""
    made = torch.randn(1, 50, 16, generator=torch.Generator().manual_seed(3)).repeat(12, 1, 1)
    made[11] += torch.randn(50, 16, generator=torch.Generator().manual_seed(4))
    total = make_moments("frobenius", 12, "cpu")
    total.add(made, 0)
    np.testing.assert_allclose(total.matrix(), pairwise.frobenius(made.double()).numpy(), atol=1e-6)


@pytest.mark.parametrize("metric", METRICS)
def test_sums_survive_a_checkpoint_and_do_not_grow(metric: str) -> None:
    one, other = make_moments(metric, 5, "cpu"), make_moments(metric, 5, "cpu")
    one.add(outputs(), 0)
    before = sum(value.nbytes for value in one.state().values())
    other.restore(one.state())
    for total in (one, other):
        total.add(outputs() + 1, 1)
    np.testing.assert_array_equal(one.matrix(), other.matrix())
    assert sum(value.nbytes for value in one.state().values()) == before
    assert moments_bytes(metric, 5, 6) <= before <= moments_bytes(metric, 5, 6) + 1000


def test_experts_that_all_answer_the_same_are_all_alike() -> None:
    assert frobenius(np.ones((3, 3))).tolist() == np.ones((3, 3)).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_the_models_own(family: str) -> None:
    """What a layer really returned for its routed tokens is the weighted sum of the answers we take from its experts."""
    built = network(family)
    layers = find_experts(built)
    assert layers, family
    seen: dict[int, Any] = {}
    hooks = [
        layer.experts.register_forward_hook(lambda _m, given, out, n=n: seen.update({n: (given, out)}))
        for n, layer in layers.items()
    ]
    with torch.inference_mode():
        built(input_ids=torch.arange(1, 13)[None], use_cache=False)
        for hook in hooks:
            hook.remove()
        for n, layer in layers.items():
            (hidden, ids, weights), out = seen[n]
            assert layer.num_experts == 4
            answers = layer.answers(hidden.reshape(-1, hidden.shape[-1]))
            assert len({answers[e].sum().item() for e in range(4)}) == 4, "experts differ"
            picked = answers[ids.T, torch.arange(ids.shape[0])]  # [k, N, H]
            want = (weights.T[..., None] * picked).sum(0)
            torch.testing.assert_close(want, out.reshape(want.shape).float(), atol=1e-4, rtol=1e-4, msg=f"{family}, layer {n}")


def test_llama4_is_asked_what_its_block_is_asked() -> None:
    """Its experts get rows that the router has scaled already; similarity is of the experts, not of the router."""
    built = network(
        "llama4_text", num_local_experts=4, intermediate_size_mlp=24, num_experts_per_tok=1, interleave_moe_layer_step=1
    )
    layer = find_experts(built)[0]
    x = torch.randn(3, 32)
    with torch.inference_mode():
        gate, up = torch.einsum("nh,ehi->eni", x, layer.experts.gate_up_proj).chunk(2, -1)
        want = torch.einsum("eni,eih->enh", up * layer.experts.act_fn(gate), layer.experts.down_proj)
        torch.testing.assert_close(layer.answers(x), want, atol=1e-4, rtol=1e-4)
        assert layer.asked is built.model.layers[0].feed_forward


class Listed(torch.nn.Module):
    """A block of the older form: experts in a ModuleList, each called with the rows routed to it."""

    def __init__(self, before: Any) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))
        self.before = before

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        rows = self.before(hidden_states.reshape(-1, 8))
        ids = torch.arange(rows.shape[0]) % 3
        out = torch.stack([self.experts[e](row[None])[0] for e, row in zip(ids.tolist(), rows, strict=True)])
        return out.reshape(hidden_states.shape)


class Toy(torch.nn.Module):
    """Just enough of a transformers model."""

    device = torch.device("cpu")

    def __init__(self, before: Any = torch.nn.Identity()) -> None:  # noqa: B008 - it has no state
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(64, 8)
        self.layers = torch.nn.ModuleList([torch.nn.Module()])
        self.layers[0].mlp = Listed(before)

    @property
    def base_model(self) -> Toy:
        return self

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> torch.Tensor:
        return self.layers[0].mlp(self.embed(input_ids))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["list", "qwen3_moe", "gpt_oss"])
def test_batched_texts_equal_one_at_a_time(kind: str, metric: str) -> None:
    """Padding reaches no sum, whatever the lengths beside each other."""
    built = Toy() if kind == "list" else network(kind)
    layers = find_experts(built)
    texts = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [], [15, 16], [3, 3, 3, 9]]
    found = []
    for size in (1, 4):
        sums = {n: make_moments(metric, layer.num_experts, "cpu") for n, layer in layers.items()}
        with torch.inference_mode(), collecting(layers, sums) as batch:
            for start in range(0, len(texts), size):
                run_batch(built, batch, texts[start : start + size], start)
        found.append(sums)
    for n in layers:
        assert found[0][n].tokens == found[1][n].tokens == [11, 5]
        for halves in ((0, 1), (0,)):
            np.testing.assert_allclose(found[0][n].matrix(halves), found[1][n].matrix(halves), atol=1e-5)


def test_experts_that_get_something_else_than_their_block_are_refused() -> None:
    built = Toy(torch.nn.Linear(8, 8))
    layers = find_experts(built)
    sums = {0: make_moments("frobenius", 3, "cpu")}
    says = r"experts of layer 0 \(Listed\) are not asked what their block is asked"
    with torch.inference_mode(), collecting(layers, sums) as batch, pytest.raises(UnsupportedError, match=says):
        run_batch(built, batch, [[1, 2, 3]], 0)


@pytest.mark.parametrize(
    ("family", "changed", "says"),
    [
        ("jetmoe", {"num_local_experts": 4, "kv_channels": 8}, "JetMoeMoA"),
        ("longcat_flash", {"n_routed_experts": 4, "zero_expert_num": 2, "expert_ffn_hidden_size": 24}, "LongcatFlashExperts"),
    ],
)
def test_families_that_cannot_be_asked_are_refused_by_name(family: str, changed: dict[str, Any], says: str) -> None:
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**COMMON, "num_layers": 1, **changed}))
    with pytest.raises(UnsupportedError, match=says):
        find_experts(built)


class Quantised(torch.nn.Module):
    """The signature of transformers' MXFP4 experts: routing data of a kernel, no expert ids to choose."""

    num_experts = 4

    def forward(self, hidden_states: Any, routing_data: Any, gather_idx: Any, scatter_idx: Any = None) -> Any:
        raise AssertionError("never asked")


def test_quantised_experts_are_refused_by_name() -> None:
    built = Toy()
    built.layers[0].mlp.experts = Quantised()
    says = r"Quantised\(hidden_states, routing_data, gather_idx, scatter_idx\) .* load an unquantised checkpoint"
    with pytest.raises(UnsupportedError, match=says):
        find_experts(built)


def test_a_config_that_claims_experts_is_not_called_dense() -> None:
    assert claims_experts({"num_local_experts": 8}) == "num_local_experts = 8"
    assert claims_experts({"text_config": {"n_routed_experts": 64}}) == "n_routed_experts = 64"
    assert claims_experts({"hidden_size": 8, "num_experts": 0}) is None


def write_texts(path: Path, count: int) -> Path:
    path.write_text(
        "".join(json.dumps({"prompt": f"A{i:04d}+{7 * i:04d}=", "answer": "x" * (i % 9)}) + "\n" for i in range(count))
    )
    return path


KILLED = """
import sys, time
from pathlib import Path
from sere_ext.calibration.run import Options, calibrate

def progress(done, total):
    print(done, flush=True)
    time.sleep(0 if done < 16 else 600)  # until it is killed

calibrate(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), Options(batch=4, sequences=40), progress=progress)
"""


def test_a_killed_run_goes_on_and_loses_at_most_one_batch(tmp_path: Path) -> None:
    data, out, whole = write_texts(tmp_path / "d.jsonl", 40), tmp_path / "s.safetensors", tmp_path / "whole.safetensors"
    options = Options(batch=4, sequences=40)
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(MODEL), str(data), str(out)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) >= 16:
            os.kill(child.pid, signal.SIGKILL)
            break
    assert child.wait() == -signal.SIGKILL
    assert not out.exists()
    part = out.with_name("s.safetensors.part")
    kept = part.read_bytes()

    notes: list[str] = []
    calibrate(str(MODEL), data, out, Options(sequences=3), note=notes.append)
    assert notes == [f"{part} is of another number of texts, so it is not continued; starting anew"]
    assert not part.exists(), "a finished file removes its checkpoint"

    part.write_bytes(kept)
    notes.clear()
    seen: list[int] = []
    resumed = calibrate(str(MODEL), data, out, options, progress=lambda done, _: seen.append(done), note=notes.append)
    assert seen[0] >= 12, "everything but the batch in flight is kept"
    assert notes == [f"going on after {seen[0]} texts from {part}"]
    straight = calibrate(str(MODEL), data, whole, options)
    assert resumed.tokens == straight.tokens and resumed.stability == straight.stability is not None
    for n, matrix in read_similarity(out).matrices.items():
        np.testing.assert_allclose(matrix, read_similarity(whole).matrices[n], atol=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.jsonl", "s.safetensors", "whole.safetensors"]

    part.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(UsageError, match=r"s\.safetensors\.part is damaged .* remove it to start anew"):
        calibrate(str(MODEL), data, out, options)


ORIGIN = {"model": "a", "data set": "sha256:0", "metric": "cosine", "choice of layers": [0, 3]}


@pytest.mark.parametrize(
    ("now", "says"),
    [
        ({**ORIGIN, "model": "b"}, "another model"),
        ({**ORIGIN, "data set": "sha256:1"}, "another data set"),
        ({**ORIGIN, "metric": "cka"}, "another metric"),
        ({**ORIGIN, "choice of layers": []}, "another choice of layers"),
        ({**ORIGIN, "new": 1}, "another new"),
        ({"model": "a"}, "another release"),
    ],
)
def test_sums_of_something_else_are_never_continued(tmp_path: Path, now: dict[str, Any], says: str) -> None:
    total = make_moments("cosine", 5, "cpu")
    total.add(outputs(), 0)
    Checkpoint(tmp_path / "p", ORIGIN).save(8, {3: total})
    fresh = make_moments("cosine", 5, "cpu")
    other = Checkpoint(tmp_path / "p", now)
    sentence = other.restore({3: fresh})
    assert sentence is not None and says in sentence
    assert (other.done, fresh.tokens) == (0, [0, 0])
    same = Checkpoint(tmp_path / "p", dict(ORIGIN))
    assert "going on after 8 texts" in str(same.restore({3: fresh}))
    assert (same.done, fresh.tokens) == (8, [40, 0])
    assert Checkpoint(tmp_path / "none", ORIGIN).restore({3: fresh}) is None


def test_what_a_checkpoint_is_made_from_tells_models_and_data_apart(tmp_path: Path) -> None:
    data, copy = write_texts(tmp_path / "d.jsonl", 2), tmp_path / "model"
    shutil.copytree(MODEL, copy)

    def origin(model: Path, options: Options = Options(), revision: str | None = None) -> dict[str, Any]:  # noqa: B008
        config = json.loads((model / "config.json").read_text())
        return made_from(described(str(model), revision, config, data, options), str(model), options)

    first = origin(copy)
    assert origin(copy) == first == origin(copy, Options(batch=1, device="cuda")), "rounding only"
    for options in (Options(metric="cka"), Options(sequences=1), Options(max_length=7), Options(layers=(0, 1))):
        assert origin(copy, options) != first
    assert origin(copy, revision="0a1b") != first
    (copy / "model.safetensors").write_bytes(b"other weights, same configuration")
    assert origin(copy)["set of weights"] != first["set of weights"]
    write_texts(data, 3)
    assert origin(copy)["data set"] != first["data set"]


def test_layers_in_parts_make_the_whole_file(tmp_path: Path) -> None:
    data, out = write_texts(tmp_path / "d.jsonl", 8), tmp_path / "s.safetensors"
    whole = calibrate(str(MODEL), data, tmp_path / "whole.safetensors", Options(metric="cosine"))
    calibrate(str(MODEL), data, out, Options(metric="cosine", layers=(0, 1)))
    assert list(read_similarity(out).matrices) == [0, 1]
    joined = calibrate(str(MODEL), data, out, Options(metric="cosine", layers=(2, 9)))
    assert joined.layers == whole.layers == (0, 1, 2, 3)
    assert joined.stability is not None and whole.stability is not None
    assert joined.stability.stand_in == pytest.approx(whole.stability.stand_in, abs=1e-5)
    for n, matrix in read_similarity(out).matrices.items():
        np.testing.assert_array_equal(matrix, read_similarity(tmp_path / "whole.safetensors").matrices[n])
    for options, says in (
        (Options(layers=(0, 0)), "is of another metric; --layers adds to a file of the same origin"),
        (Options(metric="cosine", layers=(0, 0), sequences=7), "use the same --sequences"),
        (Options(metric="cosine", layers=(7, 9)), "names no MoE layer; .* has them at 0-3"),
    ):
        with pytest.raises(UsageError, match=says):
            calibrate(str(MODEL), data, out, options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (Options(metric="cka", memory_gib=0.01), r"take 0\.133 GiB for 4 layers of 16 experts and hidden size 128.*use --metric"),
        (Options(metric="cka", memory_gib=0.07), r"calibrate 2 layers at a time with --layers"),
        (Options(device="cuda:99"), r"--device cuda:99 cannot be used here: .*; use cpu"),
        (Options(device="abacus"), r"--device abacus cannot be used here"),
    ],
)
def test_what_cannot_run_is_refused_before_the_first_token(tmp_path: Path, options: Options, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        calibrate(str(MODEL), write_texts(tmp_path / "d.jsonl", 2), tmp_path / "s", options)
    assert [p.name for p in tmp_path.iterdir()] == ["d.jsonl"]


def test_option_words() -> None:
    assert (parse_layers(None), parse_layers("3"), parse_layers("0-11")) == (None, (3, 3), (0, 11))
    for text in ("", "3-1", "a-b", "-1", "1-2-3"):
        with pytest.raises(UsageError, match="give the first and the last layer"):
            parse_layers(text)
    assert parse_metric("cka") == "cka"
    with pytest.raises(UsageError, match="give one of frobenius, cosine, cka"):
        parse_metric("rbf")


def test_calibration_texts(tmp_path: Path) -> None:
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text(json.dumps({"prompt": "1+1=", "answer": "2"}) + "\n\n" + json.dumps({"text": "t"}) + "\n")
    assert read_texts(jsonl) == ["1+1=2", "t"]
    plain = tmp_path / "a.txt"
    plain.write_text("one\ntwo\n")
    assert read_texts(plain) == ["one", "two"]
    jsonl.write_text('{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n')
    assert [[m["content"] for m in text] for text in read_texts(jsonl)] == [["q", "a"]]
    jsonl.write_text('{"text": "a\u2028b\u0085c"}\n')
    assert read_texts(jsonl) == ["a\u2028b\u0085c"]
    for text, says in (
        ("", "holds no calibration text"),
        ('{"x": 1}', 'line 1 needs a "prompt"'),
        ("[1]", "line 1 is no object"),
        ("{", "line 1 cannot be read"),
        ('{"text": null}', 'line 1 needs a "prompt"'),
    ):
        jsonl.write_text(text)
        with pytest.raises(UsageError, match=says):
            read_texts(jsonl)
    with pytest.raises(UsageError, match="the calibration data: cannot read"):
        read_texts(tmp_path / "missing.jsonl")


def changed_weights(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The small model with other tensors in its file."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(MODEL, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["a scale that is not read", "a weight that is not there"])
def test_weights_that_were_not_loaded_are_an_error(tmp_path: Path, kind: str) -> None:
    def change(tensors: dict[str, Any]) -> None:
        if kind.startswith("a scale"):
            tensors[next(name for name in tensors if "expert" in name) + "_scale"] = torch.ones(1)
        else:
            del tensors[next(name for name in tensors if ".gate." in name)]

    model = changed_weights(tmp_path / "model", change)
    (tmp_path / "a.jsonl").write_text('{"text": "1+1=2"}\n')
    with pytest.raises(UsageError, match=r"weights of experts or routers are not those .* calibrate the unquantised model"):
        calibrate(str(model), tmp_path / "a.jsonl", tmp_path / "out.safetensors", Options(sequences=1))


def test_damaged_weights_are_one_sentence(tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "a.jsonl").write_text('{"text": "1+1=2"}\n')
    with pytest.raises(UsageError, match="cannot load the model") as refused:
        calibrate(str(tmp_path / "model"), tmp_path / "a.jsonl", tmp_path / "out.safetensors", Options(sequences=1))
    assert "\n" not in str(refused.value)
