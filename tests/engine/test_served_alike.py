"""What the tuner measures is what clients get: the same prompts, plain and by chat template, on `sere serve` and in its engine."""

from __future__ import annotations

import json
import shutil
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from sere_autotune.trial.host import EngineHost
from sere_autotune.trial.load import Request
from sere_ext.contract.profile import GoldenPrompt
from sere_operator.runtime.golden import request_of, text_of

from tests.kit.serving import serving

TOKENS = 24
OPTIONS = ["--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "16", "--dtype", "float32"]
MESSAGES = [{"role": "system", "content": "be short"}, {"role": "user", "content": "12+30"}]
PROMPTS = [
    GoldenPrompt(prompt="12+30=", answer="42", max_tokens=TOKENS),
    GoldenPrompt.model_validate({"prompt": "12+30", "messages": MESSAGES, "answer": "42", "maxTokens": TOKENS}),
]


def penalised(model: Path, folder: Path) -> Path:
    """The model with a chat template, and with sampling defaults that change even greedy answers."""
    shutil.copytree(model, folder)
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 1.5, "temperature": 0.9, "eos_token_id": 1}))
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
    )
    return folder


async def tuned(model: Path, *options: str) -> list[str]:
    """The answers of the tuner's own engine."""
    host = EngineHost()
    try:
        await host.start(["--model", str(model), *OPTIONS, *options], None)
        texts = []
        for prompt in PROMPTS:
            messages = tuple(message.to_json_dict() for message in prompt.messages or ())
            request = Request(prompt.prompt, prompt.max_tokens, messages=messages)
            texts.append("".join([text async for text, _ in host.send(request)]))
        return texts
    finally:
        await host.stop()


def served(model: Path, log: Path) -> list[str]:
    """The answers of a server, asked as the operator asks golden prompts."""
    with serving(model, log) as server:
        return [text_of(post(server.url, *request_of(str(model), prompt))) for prompt in PROMPTS]


def post(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return dict(json.loads(urllib.request.urlopen(request, timeout=120).read()))


@pytest.mark.timeout(1200)
async def test_the_tuner_asks_and_samples_as_the_server_does(qwen3: Path, tmp_path: Path) -> None:
    model = penalised(qwen3, tmp_path / "model")
    answers = await tuned(model, "--enable-log-requests")  # a flag that only a server knows is no error
    assert answers == served(model, tmp_path / "log")
    assert answers[0] != answers[1], "the chat template is used"
    plain = await tuned(model, "--generation-config", "vllm")
    assert plain != answers, "the sampling defaults are used"
