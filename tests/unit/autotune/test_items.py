"""Labelled items and timed prompts as people have them, and what is found wrong with them before an engine starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sere_autotune import calibration, preflight
from sere_autotune.plan_text import describe, fitted
from sere_autotune.planner import make_plan
from sere_autotune.prepare import prepare
from sere_autotune.study.schema import Pace
from sere_autotune.trial.chat import ChatTemplate
from sere_autotune.trial.host import server_defaults
from sere_autotune.trial.items import Item, load_items
from sere_autotune.trial.load import Request
from sere_autotune.trial.traffic import Traffic, dataset_requests
from sere_autotune.tuning.spec import AccuracySpec, TaskSpec, WorkloadSpec
from sere_ext.contract.errors import UsageError
from tests.kit import TINY_MOE as TINY
from tests.kit.planted import spec_for, write_items

CHAT = [{"role": "system", "content": "short"}, {"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]


def rows(path: Path, *values: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return str(path)


def items(tmp_path: Path, *values: dict[str, Any], **task: Any) -> list[Item]:
    chat = task.pop("chat", False)
    return load_items(AccuracySpec(tasks=(TaskSpec(file=rows(tmp_path / "i.jsonl", *values), **task),), chat=chat))


def test_columns_are_found_or_named(tmp_path: Path) -> None:
    (gsm8k,) = items(tmp_path, {"question": "Half of 84?", "answer": "84 / 2 is 42.\n#### 42"})
    assert (gsm8k.prompt, gsm8k.answer, gsm8k.messages) == ("Half of 84?", "42", ())
    (named,) = items(tmp_path, {"Frage": "a", "Antwort": 3}, fields={"prompt": "Frage", "answer": "Antwort"})
    assert (named.prompt, named.answer) == ("a", "3")
    assert named.place == f"{tmp_path}/i.jsonl line 1"


def test_conversations_are_sent_as_such_and_prompts_where_chat_is_asked_for(tmp_path: Path) -> None:
    (talked,) = items(tmp_path, {"messages": CHAT})
    assert (talked.prompt, talked.answer, len(talked.messages)) == ("1+1=", "2", 2)
    (asked,) = items(tmp_path, {"prompt": "1+1=", "answer": 2}, chat=True)
    assert asked.messages == ({"role": "user", "content": "1+1="},)
    assert Request.of(asked).messages == asked.messages
    assert calibration._calibration_row(asked) == {"messages": [*asked.messages, {"role": "assistant", "content": "2"}]}


def test_a_prompt_repeated_with_another_answer_is_named(tmp_path: Path) -> None:
    same = {"prompt": "a", "answer": 1}
    assert len(items(tmp_path, same, same)) == 1
    with pytest.raises(
        UsageError, match=r"i.jsonl line 3 has the prompt of .*i.jsonl line 1 with another answer \('2', there '1'\)"
    ):
        items(tmp_path, same, {"prompt": "b", "answer": 1}, {"prompt": "a", "answer": 2})


def test_timed_prompts_may_be_sharegpt(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}, {"from": "human", "value": "r"}]
    workload = WorkloadSpec(dataset=rows(tmp_path / "d.jsonl", {"conversations": turns}, {"prompt": "p"}))
    first, second = dataset_requests(workload)
    assert (first.prompt, first.messages) == ("q", ({"role": "user", "content": "q"},))
    assert (second.prompt, second.messages) == ("p", ())
    assert len(Traffic(workload, []).others) == 2
    with pytest.raises(UsageError, match=r"workload.dataset: no prompts in"):
        dataset_requests(WorkloadSpec(dataset=rows(tmp_path / "d.jsonl")))


def tiny(tmp_path: Path, *values: dict[str, Any], **changes: Any) -> Any:
    """A tuning of the small real model on 60 items and what is given."""
    path = tmp_path / "items.jsonl"
    write_items(path, 60)
    with path.open("a") as file:
        file.writelines(json.dumps(value) + "\n" for value in values)
    spec = spec_for(tmp_path / "out", path, engine__maxModelLen=64, **changes)
    return spec.model_copy(update={"model": str(TINY)})


def test_a_prompt_that_does_not_fit_is_named_before_an_engine_starts(tmp_path: Path) -> None:
    prepare(tiny(tmp_path))
    with pytest.raises(UsageError, match=r"items.jsonl line 61 has a prompt of \d+ tokens, and a context of 64 leaves no room"):
        prepare(tiny(tmp_path, {"prompt": "12345+" * 40, "answer": 1}))
    with pytest.raises(UsageError, match=r"items.jsonl line 61 has an empty prompt; remove the line"):
        prepare(tiny(tmp_path, {"prompt": "", "answer": 1}))
    data = rows(tmp_path / "d.jsonl", {"prompt": "1"}, {"prompt": "12345+" * 40})
    with pytest.raises(UsageError, match=r"d.jsonl line 2 has a prompt of \d+ tokens"):
        prepare(tiny(tmp_path, workload__dataset=data))
    (tmp_path / "d.jsonl").write_text("{")
    with pytest.raises(UsageError, match=r"workload.dataset: .*d.jsonl line 1 cannot be read as JSON"):
        prepare(tiny(tmp_path, workload__dataset=data))
    with pytest.raises(UsageError, match=r"workload.synthetic: 60 and 5 tokens are more than the context of 64"):
        prepare(tiny(tmp_path, workload__synthetic={"inputTokens": 60, "outputTokens": 5}))


def test_values_of_s_that_the_model_cannot_have_are_refused_before_an_engine_is_started(tmp_path: Path) -> None:
    prepare(tiny(tmp_path, search__sValues=[1, 2.5]))
    with pytest.raises(UsageError, match=r"search.sValues: 4 cannot be tried on this model; take some of 1, 1.25"):
        prepare(tiny(tmp_path, search__sValues=[2, 4]))


def test_a_chat_needs_a_template_and_is_counted_with_it(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no chat template; name one by engine.extraArgs \[--chat-template=FILE\]"):
        prepare(tiny(tmp_path, accuracy__chat=True))
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}=")
    prepare(tiny(tmp_path, accuracy__chat=True, engine__extraArgs=[f"--chat-template={template}"]))
    template.write_text("{{ raise_exception('no system message') }}")
    with pytest.raises(
        UsageError, match=r"items.jsonl line \d+: the chat template refuses the conversation \(no system message\)"
    ):
        prepare(tiny(tmp_path, accuracy__chat=True, engine__extraArgs=["--chat-template", str(template)]))
    with pytest.raises(UsageError, match="cannot read the chat template"):
        ChatTemplate.of([f"--chat-template={tmp_path / 'none'}"])
    assert ChatTemplate.of(["--chat-template={{ x }}", "--default-chat-template-kwargs", '{"x": 1}']) == ChatTemplate(
        "{{ x }}", {"x": 1}
    )


@pytest.mark.parametrize(("lacking", "told"), [("tokenizer*.json", "has no tokenizer"), ("*.safetensors", "has no weights")])
def test_an_incomplete_model_folder_is_named(tmp_path: Path, lacking: str, told: str) -> None:
    model = tmp_path / "copy"
    shutil.copytree(TINY, model)
    for path in model.glob(lacking):
        path.unlink()
    with pytest.raises(UsageError, match=told):
        prepare(tiny(tmp_path).model_copy(update={"model": str(model)}))


def test_a_tokenizer_that_cannot_be_loaded_is_one_sentence(tmp_path: Path) -> None:
    model = tmp_path / "copy"
    shutil.copytree(TINY, model)
    (model / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match="cannot load the tokenizer of") as refused:
        preflight.load_tokenizer(tiny(tmp_path).model_copy(update={"model": str(model)}))
    assert "\n" not in str(refused.value)


def test_the_dry_run_says_what_is_hardly_meant(tmp_path: Path) -> None:
    spec = tiny(
        tmp_path,
        workload__load__concurrency=[64],
        engine__extraArgs=["--max-num-seqs=32"],
        search__trials=1,
        search__deviceHours=0.0001,
    )
    text = describe(prepare(spec).plan, spec)
    for told in (
        "concurrency 64 is above --max-num-seqs 32: requests queue",
        "itemsPerTrial 500 is above the 20 search items: every trial uses all of them",
        "trials 1 is exact routing alone",
        "it ends before an engine has started",
    ):
        assert told in text
    quiet = prepare(tiny(tmp_path, search__itemsPerTrial=16))
    assert "Note" not in describe(quiet.plan, spec)
    slow = make_plan(quiet.spec, 60, 40, None, 0, Pace(0.1, 10.0, 60.0), source=quiet.source)
    assert "at the last run's 0.1 answers per second a trial of 60 s judges 6 items, not 16" in slow.notes[0]


def test_the_plan_fits_the_screen(tmp_path: Path) -> None:
    spec = tiny(tmp_path)
    lines = fitted(describe(prepare(spec).plan, spec), 80).splitlines()
    assert max(map(len, lines)) <= 80
    assert {line[:11].strip() for line in lines} == {"Plan", "", "Accuracy", "Similarity", "Time", "Budget", "Note"}


class Config:
    """What of vLLM's ModelConfig says how a server samples."""

    def __init__(self, source: str, given: dict[str, Any], override: dict[str, Any]) -> None:
        self.generation_config, self.override_generation_config = source, override
        self.get_diff_sampling_param = lambda: given


def test_answers_are_sampled_as_the_server_samples_them() -> None:
    given = {"repetition_penalty": 1.3, "temperature": 0.7, "max_tokens": 16}
    assert server_defaults(Config("auto", given, {})) == {"repetition_penalty": 1.3}
    assert server_defaults(Config("auto", given, {"max_new_tokens": 9})) == {"repetition_penalty": 1.3, "max_tokens": 9}
    assert server_defaults(Config("/folder", given, {})) == {"repetition_penalty": 1.3, "max_tokens": 16}
    assert server_defaults(Config("vllm", {}, {})) == {}


@pytest.mark.parametrize(
    ("answer", "task", "told"),
    [
        ("", {}, r"has an empty answer; remove the line, or name the column"),
        ("  ", {"metric": "contains"}, r"has an empty answer"),
        ("#### ", {"metric": "numeric"}, r"has an empty answer"),
        (
            "yes",
            {"metric": "numeric"},
            r"wants 'yes', which holds no number for metric numeric; remove the line, or choose another",
        ),
        (
            "yes",
            {"metric": "regex", "pattern": r"answer is (\d+)"},
            r"wants 'yes', which the pattern 'answer is .*' can never find",
        ),
        ("42", {"metric": "regex", "pattern": r"is (\d)+"}, r".*can never find; correct the pattern or the line"),
        ("no way", {"metric": "regex", "pattern": r"yes|no"}, r".*can never find"),
        ("a\nb", {"stop": ["\n"]}, r"wants 'a\\nb', and the stop string '\\n' would end it before it is whole; correct stop"),
        ("St. Ives", {"metric": "contains", "stop": ["."]}, r".*the stop string '.' would end it"),
        ("1.50", {"metric": "numeric", "stop": ["."]}, r".*the stop string '.' would end it"),
        ("1234567", {"maxTokens": 3}, r"wants an answer of \d tokens, and maxTokens is 3; raise maxTokens, or remove the line"),
        ("it is 1,234,567", {"metric": "numeric", "maxTokens": 3}, r"wants an answer of \d tokens, and maxTokens is 3"),
    ],
)
def test_an_item_that_no_answer_can_satisfy_is_named_before_an_engine_starts(
    tmp_path: Path, answer: str, task: dict[str, Any], told: str
) -> None:
    """Nothing is right on such an item, so that it could show no loss; it is refused by file and line, whatever the cause."""
    spec = tiny(tmp_path)
    bad = rows(tmp_path / "bad.jsonl", {"prompt": "1+1=", "answer": answer})
    with pytest.raises(UsageError, match=rf"^accuracy.tasks: \S+bad.jsonl line 1 {told}") as refused:
        prepare(with_task(spec, {"file": bad, **task}))
    assert "\n" not in str(refused.value)


def test_of_many_items_that_no_answer_can_satisfy_the_one_nearest_the_top_of_the_file_is_named(tmp_path: Path) -> None:
    bad = rows(tmp_path / "bad.jsonl", *({"prompt": f"{i}+1=", "answer": "yes"} for i in range(30)))
    with pytest.raises(UsageError, match=r"bad.jsonl line 1 wants .* \(29 more lines are like it\)"):
        prepare(with_task(tiny(tmp_path), {"file": bad, "metric": "numeric"}))


@pytest.mark.parametrize(
    ("answer", "task", "text"),
    [
        ("42\n", {"stop": ["\n"]}, "42"),
        ("The sum is 3.0", {"metric": "numeric", "stop": ["."], "maxTokens": 1}, "3"),
        ("1,000", {"metric": "numeric", "stop": [","]}, "1000"),
        ("42", {"metric": "regex", "pattern": r"is (\d+)"}, "it is 42"),
        ("Yes", {"metric": "regex", "pattern": r"(?i)(?:so,? )(?P<what>yes|no)\b"}, "so, Yes!"),
        ("42", {"metric": "regex", "pattern": r"(\d+(?= apples))"}, "42 apples"),
        ("a]", {"metric": "regex", "pattern": r"[(]([])a]+)\)"}, "(a])"),
        ("f(x)", {"metric": "regex", "pattern": r"\((\w\((?:x|y)\))\)"}, "(f(x))"),
        ("b", {"metric": "regex", "pattern": r"= *(.*)"}, "=  b"),
    ],
)
def test_an_item_that_can_be_answered_is_taken(tmp_path: Path, answer: str, task: dict[str, Any], text: str) -> None:
    spec = with_task(tiny(tmp_path), {"file": rows(tmp_path / "good.jsonl", {"prompt": "1+1=", "answer": answer}), **task})
    (item,) = (item for item in prepare(spec).items if item.prompt == "1+1=")
    assert item.correct(text)


def test_answers_of_one_token_need_timed_requests_of_another_kind(tmp_path: Path) -> None:
    path = str(write_items(tmp_path / "items.jsonl", 60))
    single = {"accuracy__tasks": [{"file": path, "maxTokens": 1, "metric": "contains"}], "engine__maxModelLen": 64}
    spec = spec_for(tmp_path / "out", Path(path), **single)
    digits = [{"prompt": f"last digit of {i}: ", "answer": i % 10} for i in range(60)]
    rows(Path(path), *digits)
    with pytest.raises(UsageError, match=r"answers of maxTokens 1 have no time per output token \(TPOT\).* workload.dataset or"):
        prepare(spec.model_copy(update={"model": str(TINY)}))
    timed = spec_for(tmp_path / "out", Path(path), **single, workload__synthetic={"inputTokens": 8, "outputTokens": 4})
    prepare(timed.model_copy(update={"model": str(TINY)}))


def with_task(spec: Any, task: dict[str, Any]) -> Any:
    return spec.model_copy(
        update={"accuracy": spec.accuracy.model_copy(update={"tasks": (*spec.accuracy.tasks, TaskSpec(**task))})}
    )
