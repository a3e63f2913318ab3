"""The tuner asks and samples as `vllm serve` does: its token ids and parameters against those that vLLM's own server code makes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sere_autotune.trial.chat import ChatTemplate
from sere_autotune.trial.host import server_defaults

MESSAGES = [{"role": "system", "content": "be short"}, {"role": "user", "content": "12+30"}]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


@pytest.fixture(scope="module")
def config(qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """vLLM's configuration for a model with a chat template and sampling defaults; no engine is started."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    folder = tmp_path_factory.mktemp("defaults") / "model"
    shutil.copytree(qwen3, folder)
    defaults = {"repetition_penalty": 1.5, "temperature": 0.9, "top_p": 0.8, "max_new_tokens": 7, "eos_token_id": 1}
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return AsyncEngineArgs(model=str(folder), enforce_eager=True, max_model_len=128, dtype="float32").create_engine_config()


@pytest.mark.parametrize("given", [None, "{{ messages[1].content }}?{% if add_generation_prompt %}!{% endif %}"])
def test_a_conversation_has_the_servers_token_ids(config: Any, given: str | None) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.renderers import renderer_from_config

    renderer = renderer_from_config(config)
    request = ChatCompletionRequest(messages=MESSAGES, model="m", max_tokens=4)
    ((_, prompt),) = [
        (a, b)
        for a, b in zip(
            *renderer.render_chat(
                [request.messages], request.build_chat_params(given, "auto"), request.build_tok_params(config.model_config)
            ),
            strict=True,
        )
    ]
    ours = ChatTemplate.of([f"--chat-template={given}"] if given else []).tokens(renderer.get_tokenizer(), MESSAGES)
    assert ours == list(prompt["prompt_token_ids"])
    assert renderer.get_tokenizer().decode(ours).endswith("!" if given else "<a>")


def test_sampling_is_the_servers(config: Any) -> None:
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.sampling_params import SamplingParams

    request = CompletionRequest(model="m", prompt="12+30=", temperature=0, max_tokens=24)
    served = request.to_sampling_params(24, config.model_config.get_diff_sampling_param())
    ours = SamplingParams(temperature=0.0, max_tokens=24, **server_defaults(config.model_config))
    for name in (
        "temperature",
        "repetition_penalty",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "max_tokens",
    ):
        assert getattr(ours, name) == getattr(served, name), name
    assert ours.repetition_penalty == 1.5
