"""`sere calibrate`: how alike the experts of each MoE layer answer, from the model in transformers.

Source: arXiv 2602.07616 section 3 and its repository's `calibration`: all experts of a layer answer the same tokens (those
that reach the layer under exact routing), unweighted. The outputs of all experts on all tokens would be tens of gigabytes;
`moments` keeps running sums instead. Padding never enters them, and a killed run goes on from its `checkpoint`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sere_ext import __version__
from sere_ext.calibration.capture import collecting, run_batch
from sere_ext.calibration.checkpoint import Checkpoint, Origin
from sere_ext.calibration.experts import ExpertLayer, claims_experts, find_experts
from sere_ext.calibration.loading import load
from sere_ext.calibration.moments import HALVES, make_moments, moments_bytes
from sere_ext.contract.errors import UnsupportedError, UsageError
from sere_ext.contract.model_config import model_config_digest
from sere_ext.contract.records import Message, Row, conversation_of, lines_of, prompt_of, read_rows, read_text
from sere_ext.contract.similarity import Changes, Metric, SimilarityMeta
from sere_ext.similarity.file import Similarity, read_similarity, write_similarity
from sere_ext.similarity.hub import asked_model_config, commit_of
from sere_ext.similarity.packing import Matrix
from sere_ext.similarity.stability import changes

_GIB = 1024**3

Progress = Callable[[int, int], None]  # texts done, texts in all
Note = Callable[[str], None]  # a sentence for the user
Text = str | tuple[Message, ...]  # a text as it is, or a conversation that the chat template renders


@dataclass(frozen=True)
class Options:
    """How to calibrate; what changes the result is part of a checkpoint's origin."""

    metric: Metric = "frobenius"
    sequences: int = 400  # texts to use
    max_length: int = 128  # tokens of each
    batch: int = 8  # texts at a time: the most that a kill loses
    layers: tuple[int, int] | None = None  # first and last model layer, both inclusive; None: all
    device: str = "cpu"  # a torch device
    memory_gib: float = 8.0  # that running sums may take


def read_texts(path: Path) -> list[Text]:
    """Calibration texts: rows with `text`, with prompt and answer, or with a conversation; any other file is one text a line.

    Raises:
        UsageError: missing, empty, or a row that is no such object, with its line.
    """
    where = "the calibration data"
    if Path(path.name.removesuffix(".gz")).suffix in (".jsonl", ".json"):
        texts: list[Text] = [_text(row, where) for row in read_rows(path, where)]
    else:
        texts = [line for line in lines_of(read_text(path, where)) if line.strip()]
    if not texts:
        raise UsageError(f'{path} holds no calibration text; write lines of {{"text": "..."}}, or of {{"prompt": "..."}}')
    return texts


def _text(row: Row, where: str) -> Text:
    if isinstance(row.values.get("text"), str):
        return str(row.values["text"])
    if conversation := conversation_of(row, where):
        return conversation
    prompt = prompt_of(row, where)
    answer = row.values.get("answer", "")
    return prompt.messages or f"{prompt.text}{answer if isinstance(answer, str | int | float) else ''}"


def calibrate(
    model: str,
    data: Path,
    out: Path,
    options: Options = Options(),
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress = lambda done, total: None,
    note: Note = lambda sentence: None,
) -> SimilarityMeta:
    """Measure similarities on a model and write the artefact.

    Args:
        model: model directory or hub name; any transformers MoE that `find_experts` can take apart.
        data: texts, see `read_texts`; the first `sequences` of them, each cut to `max_length` tokens.
        trust_remote_code: run Python code that comes with the model.
        out: file to write (atomically). With `options.layers`, layers of the same origin that it holds stay in it.

    Raises:
        UsageError: the data, the model, the device or an option cannot be used; sums that would not fit into memory; `out`
            is of another origin.
        UnsupportedError: a dense model, or experts of an unknown form.
    """
    import torch

    texts = read_texts(data)[: options.sequences]
    config = asked_model_config(model, revision)
    meta = described(model, revision, config, data, options)
    before = _partial(out, meta) if options.layers else None
    tokenizer, network = load(model, revision, options.device, trust_remote_code)
    layers = _chosen(find_experts(network), config, options.layers, model)
    _check_memory(layers, network, options)
    sums = {n: make_moments(options.metric, layer.num_experts, network.device) for n, layer in layers.items()}
    checkpoint = Checkpoint(out.with_name(out.name + ".part"), made_from(meta, model, options))
    if sentence := checkpoint.restore(sums):
        note(sentence)
    with torch.inference_mode(), collecting(layers, sums) as batch:
        for start in range(checkpoint.done, len(texts), options.batch):
            progress(start, len(texts))
            run_batch(network, batch, _tokens(tokenizer, texts[start : start + options.batch], options), start)
            checkpoint.save(min(start + options.batch, len(texts)), sums)
    progress(len(texts), len(texts))
    first = next(iter(sums.values()))
    if not sum(first.tokens):
        raise UsageError(f"the texts of {data} hold no tokens for this model; give other data")
    meta = meta.model_copy(update={"tokens": sum(first.tokens), "num_experts": next(iter(layers.values())).num_experts})
    matrices = {n: total.matrix() for n, total in sums.items()}
    if all(first.tokens):
        halves = [{n: total.matrix((half,)) for n, total in sums.items()} for half in range(HALVES)]
        meta = meta.model_copy(update={"stability": changes(*halves)})
    if before is not None:
        meta, matrices = _joined(before, meta, matrices, out)
    written = write_similarity(out, meta, matrices)
    checkpoint.remove()
    return written


def _tokens(tokenizer: Any, texts: list[Text], options: Options) -> list[list[int]]:
    rendered = [text if isinstance(text, str) else _rendered(tokenizer, text) for text in texts]
    given = [
        tokenizer(text, add_special_tokens=isinstance(source, str), truncation=True, max_length=options.max_length)
        for text, source in zip(rendered, texts, strict=True)
    ]
    return [list(one["input_ids"]) for one in given]


def _rendered(tokenizer: Any, conversation: tuple[Message, ...]) -> str:
    """A conversation as the model's chat template writes it, which is what the experts see of it when it is served."""
    try:
        return str(tokenizer.apply_chat_template([dict(message) for message in conversation], tokenize=False))
    except Exception as error:  # a template raises whatever its author liked
        raise UsageError(
            f"the model's chat template refuses a conversation of the calibration data ({error}); give rows with text"
        ) from error


def _chosen(
    found: dict[int, ExpertLayer], config: dict[str, object], wanted: tuple[int, int] | None, model: str
) -> dict[int, ExpertLayer]:
    """The layers to calibrate, or the reason why there are none."""
    kind = config.get("model_type")
    if not found and (says := claims_experts(config)):
        raise UnsupportedError(
            f"{model} ({kind}) has experts ({says}), but not where this release looks for them; report the model"
        )
    if not found:
        raise UnsupportedError(f"{model} ({kind}) is a dense model: it has no experts to compare")
    if len(counts := {layer.num_experts for layer in found.values()}) > 1:
        raise UnsupportedError(f"{model} ({kind}) has layers of {sorted(counts)} experts; this release knows one number for all")
    if wanted is None:
        return found
    chosen = {n: layer for n, layer in found.items() if wanted[0] <= n <= wanted[1]}
    if not chosen:
        raise UsageError(f"--layers {wanted[0]}-{wanted[1]} names no MoE layer; {model} has them at {_ranges(list(found))}")
    return chosen


def _check_memory(layers: dict[int, ExpertLayer], network: Any, options: Options) -> None:
    """Refuse before the first token what cannot be held at the last."""
    hidden = int(network.config.get_text_config().hidden_size)
    each = [moments_bytes(options.metric, layer.num_experts, hidden) for layer in layers.values()]
    if sum(each) <= options.memory_gib * _GIB:
        return
    room = int(options.memory_gib * _GIB // max(each))
    way_out = f"calibrate {room} layers at a time with --layers" if room else "use --metric frobenius or cosine"
    raise UsageError(
        f"the running sums of {options.metric} take {sum(each) / _GIB:.3g} GiB for {len(layers)} layers of "
        f"{max(layer.num_experts for layer in layers.values())} experts and hidden size {hidden}, --memory-gib is "
        f"{options.memory_gib:g}; {way_out}"
    )


def described(model: str, revision: str | None, config: dict[str, object], data: Path, options: Options) -> SimilarityMeta:
    """What is known before anything is measured."""
    return SimilarityMeta(
        metric=options.metric,
        model_type=str(config.get("model_type", "")),
        model_name=Path(model).name if Path(model).is_dir() else model,
        model_revision=revision or "",
        config_digest=model_config_digest(config),
        data_digest="sha256:" + hashlib.sha256(data.read_bytes()).hexdigest(),
        tokens=0,
        layers=(),
        num_experts=1,
    )


def made_from(meta: SimilarityMeta, model: str, options: Options) -> Origin:
    """What a checkpoint's sums are made from. The device and the batch size change them by rounding only."""
    from importlib.metadata import version

    weights = [p for p in sorted(Path(model).glob("*")) if p.suffix in (".safetensors", ".bin")]
    return {
        "model": f"{meta.model_name} {meta.config_digest}",
        "model revision": f"{meta.model_revision} {commit_of(model, meta.model_revision or None)}",
        "set of weights": [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in weights],
        "data set": meta.data_digest,
        "metric": options.metric,
        "number of texts": options.sequences,
        "text length": options.max_length,
        "choice of layers": list(options.layers or ()),
        "release": [__version__, version("transformers")],
    }


_SAME = {"metric": "metric", "config_digest": "model", "model_revision": "model revision", "data_digest": "data set"}


def _partial(out: Path, meta: SimilarityMeta) -> Similarity | None:
    """The layers that `out` holds already.

    Raises:
        UsageError: it holds something else, which is not overwritten by a part.
    """
    if not out.exists():
        return None
    before = read_similarity(out)
    differs = next((label for name, label in _SAME.items() if getattr(before.meta, name) != getattr(meta, name)), None)
    if before.meta.packing is not None:
        differs = differs or "form: it is packed"
    if differs:
        raise UsageError(f"{out} is of another {differs}; --layers adds to a file of the same origin, so name another --out")
    return before


def _joined(
    before: Similarity, meta: SimilarityMeta, matrices: dict[int, Matrix], out: Path
) -> tuple[SimilarityMeta, dict[int, Matrix]]:
    """New layers beside those that the file holds; a layer in both is the new one."""
    old = before.meta
    if (old.tokens, old.num_experts) != (meta.tokens, meta.num_experts):
        raise UsageError(
            f"{out} was made from {old.tokens} tokens and {old.num_experts} experts, these layers from {meta.tokens} and "
            f"{meta.num_experts}; use the same --sequences and --max-length, or name another --out"
        )
    kept = {n: matrix for n, matrix in before.matrices.items() if n not in matrices}
    if kept and old.stability is not None and meta.stability is not None:
        meta = meta.model_copy(update={"stability": _mean(old.stability, len(kept), meta.stability, len(matrices))})
    return meta, {**kept, **matrices}


def _mean(first: Changes, m: int, second: Changes, n: int) -> Changes:
    worst = max((first, second), key=lambda found: found.worst_nearest)
    return worst.model_copy(
        update={
            name: round((getattr(first, name) * m + getattr(second, name) * n) / (m + n), 6) for name in ("nearest", "stand_in")
        }
    )


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> `0-2, 5`."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in found)
