"""The ledger: items that were opened before are remembered, whatever file, folder, flag or command opens them again."""

import json
from pathlib import Path

import numpy as np
import pytest

from sere_autotune.study.ledger import Ledger, spent_alpha, state_folder
from sere_autotune.study.weights import model_key
from sere_autotune.trial.duplicates import near_duplicates
from sere_autotune.trial.items import load_items, normalised
from sere_autotune.tuning.spec import AccuracySpec
from sere_ext.contract.policy import Policy
from tests.kit.planted import PlantedEngine, run, spec_for, write_items

GOOD = Policy.parse({"buckets": [{"minTokens": 8, "maxTokens": 64, "kind": "topk", "S": 3}]})


def test_all_studies_of_the_same_items_together_spend_the_level_that_is_claimed() -> None:
    assert sum(spent_alpha(0.05, j) for j in range(60)) == pytest.approx(0.05)
    assert spent_alpha(0.05, 0) == pytest.approx(0.0375)


def test_a_study_opens_items_once_however_often_it_is_resumed(tmp_path: Path) -> None:
    ledger = Ledger("sha256:m", tmp_path / "out")
    assert [ledger.open(["a", "b"], "one"), ledger.open(["a", "b"], "one"), ledger.open(["b", "c"], "two")] == [0, 0, 1]
    assert ledger.openings(["a"], None) == 1
    assert ledger.openings(["a", "b"], None) == 2, "the most opened item decides"
    assert ledger.openings(["d"], None) == 0
    assert ledger.openings(["a", "b"], "one") == 0
    assert Ledger("sha256:other", tmp_path / "out").openings(["a"], None) == 0


def test_every_way_to_open_the_same_items_again_counts(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.jsonl", 3000)
    alphas = []

    def alpha(out: str, only: Policy | None = None, fresh: bool = False, **changes: object) -> None:
        spec = spec_for(tmp_path / out, items, accuracy__maxDropPoints=5, search__rungs=1, search__trials=4, **changes)
        alphas.append(run(spec, PlantedEngine(), only=only, fresh=fresh).summary["accuracy"]["alpha"])

    alpha("a/out", GOOD)
    alpha("a/out", GOOD)  # the same again: it has ended, and opens nothing
    alpha("b/out", GOOD)  # below another folder
    alpha("b/out", GOOD, fresh=True)
    alpha("c/out")  # a search, after certificates of one policy
    alpha("d/out", GOOD, accuracy__searchItems=501)
    items.write_text(items.read_text() + json.dumps({"prompt": "one more", "answer": "1"}) + "\n")
    alpha("e/out", GOOD)
    assert alphas == pytest.approx([spent_alpha(0.05, j) for j in (0, 0, 1, 2, 3, 4, 5)])


def test_where_home_cannot_be_written_the_ledger_lies_beside_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file" / "state"))
    assert Ledger("sha256:m", tmp_path / "runs" / "out").path.parent == tmp_path / "runs"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert Ledger("sha256:m", tmp_path / "runs" / "out").path.parent == tmp_path / "state" / "sere" == state_folder()


def items_of(path: Path, *records: dict[str, object]) -> list[tuple[str, str]]:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return sorted((item.prompt, item.answer) for item in load_items(AccuracySpec.model_validate({"tasks": [str(path)]})))


def test_prompts_that_differ_in_form_alone_are_one_item(tmp_path: Path) -> None:
    alike = [{"prompt": text, "answer": "Paris"} for text in ("Capital of France?", "capital of  france", 'CAPITAL of "France"!')]
    assert len(items_of(tmp_path / "a.jsonl", *alike)) == 1
    sums = [{"prompt": f"What is {text}?", "answer": "1"} for text in ("3+2", "3-2", "3*2", "1.5", "15", "1,000", "1000")]
    assert len(items_of(tmp_path / "b.jsonl", *sums)) == 7, "signs and points within a number make another question"
    case = [{"prompt": "Is this upper case: a", "answer": "no"}, {"prompt": "Is this upper case: A", "answer": "yes"}]
    assert len(items_of(tmp_path / "c.jsonl", *case)) == 2, "alike in form, with different answers"
    assert normalised("Don't pay $1,000.50!") == "don't pay $1,000.50"


def test_a_group_counts_once(tmp_path: Path) -> None:
    records = [{"prompt": f"question {i} on text {i % 5}", "answer": str(i), "group": i % 5} for i in range(50)]
    assert len(items_of(tmp_path / "a.jsonl", *records)) == 5
    assert len(items_of(tmp_path / "b.jsonl", *records, {"prompt": "alone", "answer": "x"})) == 6


def test_many_items_that_share_thirteen_words_are_warned_of(tmp_path: Path) -> None:
    def warning(texts: list[str]) -> str | None:
        path = tmp_path / "items.jsonl"
        path.write_text("".join(json.dumps({"prompt": text, "answer": str(i)}) + "\n" for i, text in enumerate(texts)))
        return near_duplicates(load_items(AccuracySpec.model_validate({"tasks": [str(path)]})))

    def story(number: int) -> str:
        return " ".join(f"word{number}x{i}" for i in range(20))

    template = "Answer the question below in one word and write nothing else at all please now: "
    assert warning([template + story(i) for i in range(200)]) is None, "a template is no text of an item"
    found = warning([f"{story(i // 2)} variant {i}" for i in range(200)])
    assert found is not None and found.startswith("200 of 200 items share 13 words in a row") and '"group"' in found


def test_a_fine_tune_is_a_model_of_its_own_and_a_copy_is_not(tmp_path: Path) -> None:
    """Its configuration is the base's; its level on the same items is whole, since none of its answers was ever seen."""
    from safetensors.numpy import save_file

    base = {f"model.layers.{i}.w": np.arange(4096, dtype=np.float32).reshape(64, 64) + i for i in range(3)}

    def key(name: str, *files: dict[str, np.ndarray], config: str = "sha256:c") -> str:
        folder = tmp_path / name
        folder.mkdir()
        for number, tensors in enumerate(files):
            save_file(tensors, folder / f"model-{number}.safetensors", {"format": "pt"})
        return model_key(str(folder), config)

    first = key("base", base)
    assert key("copy", base) == first, "another folder"
    names = list(base)
    assert key("cut", {names[2]: base[names[2]]}, {name: base[name] for name in names[:2]}) == first, "cut into other files"
    assert key("tuned", {**base, names[1]: base[names[1]] + 1e-3}) != first, "one tensor differs"
    assert key("shaped", base, config="sha256:d") != first
    assert model_key("owner/name", "sha256:c") != model_key("owner/name-tuned", "sha256:c")

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.bin").write_bytes(bytes(200_000))
    plain = model_key(str(tmp_path / "other"), "sha256:c")
    (tmp_path / "other" / "model.bin").write_bytes(bytes(199_999) + b"1")
    assert model_key(str(tmp_path / "other"), "sha256:c") != plain


def test_a_fine_tune_on_the_items_of_its_base_has_the_whole_level(tmp_path: Path) -> None:
    items = write_items(tmp_path / "items.jsonl", 3000)
    found = []
    for out, weights in (("a", "{}"), ("b", "{}"), ("c", "{ }")):
        spec = spec_for(tmp_path / out, items, accuracy__maxDropPoints=5, search__rungs=1)
        (Path(spec.model) / "model.safetensors").write_text(weights)
        found.append(run(spec, PlantedEngine(), only=GOOD).summary["accuracy"]["alpha"])
    assert found == pytest.approx([spent_alpha(0.05, j) for j in (0, 1, 0)])
