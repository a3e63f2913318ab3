"""What would fail once an engine runs, found before one is started: the model's files, prompts that do not fit, and items on
which no answer could be right."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from sere_autotune.trial.answerable import check_answers
from sere_autotune.trial.chat import ChatTemplate
from sere_autotune.trial.items import Item
from sere_autotune.trial.load import Request
from sere_autotune.trial.traffic import dataset_requests
from sere_autotune.tuning.spec import TuningSpec, flag_value
from sere_ext.contract.errors import UsageError
from sere_ext.contract.model_config import WEIGHT_FILES, language_config

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json", "*.tiktoken")
_SPECIAL_TOKENS = 16  # that a tokenizer may add to a text

Count = Callable[[Request], int]  # tokens of what is sent for a request


def check(spec: TuningSpec, config: dict[str, object], items: Sequence[Item]) -> None:
    """Check the model's folder, every prompt of the items and of the workload's dataset, the lengths of synthetic prompts, and
    whether each item can be answered.

    Args:
        config: the model's config.json, decoded.

    Raises:
        UsageError: naming file, line and what to do, or the files that the model's folder lacks.
    """
    check_folder(Path(spec.model))
    limit = context_length(spec, config)
    synthetic = spec.workload.synthetic
    if synthetic and limit and synthetic.input_tokens + synthetic.output_tokens > limit:
        raise UsageError(
            f"workload.synthetic: {synthetic.input_tokens:,} and {synthetic.output_tokens:,} tokens are more than the context of "
            f"{limit:,}; give fewer, or raise engine.maxModelLen"
        )
    if not synthetic and not spec.workload.dataset and all(task.max_tokens == 1 for task in spec.accuracy.tasks):
        raise UsageError(
            "accuracy.tasks: answers of maxTokens 1 have no time per output token (TPOT), by which policies are compared; raise "
            "maxTokens, or give the timed requests by workload.dataset or workload.synthetic"
        )
    requests = [*map(Request.of, items), *dataset_requests(spec.workload)]
    tokenizer = functools.cache(lambda: load_tokenizer(spec))
    check_lengths(requests, limit, _counter(spec, requests, limit, tokenizer))
    check_answers(items, lambda text: len(tokenizer()(text, add_special_tokens=False)["input_ids"]))


def check_folder(model: Path) -> None:
    """Raise UsageError if a model's folder lacks a tokenizer or weights. What is no folder is a name on the hub."""
    if not model.is_dir():
        return
    for what, patterns in (("tokenizer", _TOKENIZER_FILES), ("weights", WEIGHT_FILES)):
        if not any(path.stat().st_size for pattern in patterns for path in model.glob(pattern)):
            raise UsageError(f"model: {model} has no {what} (none of {', '.join(patterns)}); copy the whole folder")


def context_length(spec: TuningSpec, config: dict[str, object]) -> int | None:
    """The longest prompt and answer together in tokens, None where the engine alone can tell."""
    if spec.engine.max_model_len is not None:
        return spec.engine.max_model_len
    merged = language_config(config)
    longest = merged.get("max_position_embeddings")
    scaled = merged.get("rope_scaling") or merged.get("rope_parameters")
    return longest if isinstance(longest, int) and not scaled else None


def check_lengths(requests: Iterable[Request], limit: int | None, count: Count | None) -> None:
    """Raise UsageError for prompts that leave no room for an answer.

    Args:
        limit: context length in tokens; None: not known.
        count: tokens of a request; None: every prompt is so short that it surely fits.
    """
    if count is None:
        return
    lengths = ((request, count(request)) for request in requests if request.cut_tokens is None)
    wrong = [(request, tokens) for request, tokens in lengths if not tokens or (limit is not None and tokens >= limit)]
    if not wrong:
        return
    request, tokens = wrong[0]
    others = f" (and {len(wrong) - 1:,} more)" if len(wrong) > 1 else ""
    if not tokens:
        raise UsageError(f"{request.place} has a prompt without a token{others}; remove the line")
    raise UsageError(
        f"{request.place} has a prompt of {tokens:,} tokens{others}, and a context of {limit:,} leaves no room for an answer; "
        "raise engine.maxModelLen, or remove the line"
    )


def _counter(spec: TuningSpec, requests: Sequence[Request], limit: int | None, load: Callable[[], Any]) -> Count | None:
    """How to count the tokens of a request, or None where no count is needed: no tokenizer makes more tokens of a text than it
    has bytes, beside special ones, so short prompts fit without loading one.
    """
    chat = any(request.messages for request in requests)
    longest = max((len(request.prompt.encode()) for request in requests), default=0)
    if not chat and (limit is None or longest + _SPECIAL_TOKENS < limit):
        return None
    tokenizer = load()
    template = ChatTemplate.of(spec.engine.extra_args)
    if chat and template.text is None and not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            f"model: {spec.model} has no chat template; name one by engine.extraArgs [--chat-template=FILE], or give plain prompts "
            "without accuracy.chat"
        )

    def count(request: Request) -> int:
        if not request.messages:
            return len(tokenizer(request.prompt)["input_ids"])
        return len(template.tokens(tokenizer, request.messages, request.place))

    return count


def load_tokenizer(spec: TuningSpec) -> Any:
    """The model's tokenizer, from transformers. Raises UsageError with the first line of what is wrong."""
    from transformers import AutoTokenizer

    name = flag_value(spec.engine.extra_args, "--tokenizer") or spec.model
    try:
        # Said explicitly, since transformers asks on standard input where it is left open.
        return AutoTokenizer.from_pretrained(name, revision=spec.revision or None, trust_remote_code=spec.trust_remote_code)
    except Exception as error:  # damaged files raise whatever their reader does
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        trust = "" if spec.trust_remote_code or "trust_remote_code" not in str(error) else "; add --trust-remote-code if you do"
        raise UsageError(f"model: cannot load the tokenizer of {name} ({first[:300]}){trust}") from error
