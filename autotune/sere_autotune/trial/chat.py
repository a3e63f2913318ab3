"""Conversations as the model is asked them: by the chat template, as `/v1/chat/completions` of `vllm serve` renders them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sere_autotune.tuning.spec import flag_value
from sere_ext.contract.errors import UsageError
from sere_ext.contract.records import Message


@dataclass(frozen=True)
class ChatTemplate:
    """A template and what it is given beside the conversation.

    Attributes:
        text: the template (Jinja); None: the tokenizer's own.
        arguments: further variables of the template, such as {"enable_thinking": False}.
    """

    text: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, arguments: Sequence[str]) -> ChatTemplate:
        """The template that `--chat-template` and `--default-chat-template-kwargs` among the engine's arguments name.

        Raises:
            UsageError: the file cannot be read, or the further variables are no JSON.
        """
        given = flag_value(arguments, "--chat-template")
        if given is not None and not any(sign in given for sign in "{}\n"):  # else it is the template itself
            try:
                given = Path(given).read_text()
            except OSError as error:
                raise UsageError(
                    f"engine.extraArgs: cannot read the chat template {given}: {error.strerror}; check the path"
                ) from error
        try:
            variables = json.loads(flag_value(arguments, "--default-chat-template-kwargs") or "{}")
        except ValueError as error:
            raise UsageError(f"engine.extraArgs: --default-chat-template-kwargs cannot be read as JSON ({error})") from error
        return cls(given, dict(variables))

    def tokens(self, tokenizer: Any, messages: Sequence[Message], place: str = "") -> list[int]:
        """The token ids of a conversation, with the beginning of the answer that is wanted.

        Args:
            tokenizer: of transformers.
            place: file and line of the conversation, for messages.

        Raises:
            UsageError: the template refuses the conversation, such as a system message where it knows none.
        """
        try:
            text = tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self.text,
                tokenize=False,
                add_generation_prompt=True,
                **self.arguments,
            )
        except Exception as error:  # a template raises whatever its author liked
            raise UsageError(f"{place or 'messages'}: the chat template refuses the conversation ({error})") from error
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
