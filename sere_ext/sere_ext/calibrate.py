"""`sere calibrate`: how alike the experts of each MoE layer answer, from the model in transformers.

Source: arXiv 2602.07616 section 3 and its repository's `calibration/utils.py`: all experts of a layer answer the same
tokens (those that reach the layer under exact routing), and similarity is 1 - ||Ei - Ej||_F / the largest such distance
of the layer. The outputs of all experts on all tokens would be tens of gigabytes; only their Gram matrix [E, E] is
needed (||Ei - Ej||^2 = Gii + Gjj - 2 Gij), so it is summed over chunks of tokens and memory does not grow with data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from sere_ext.artifact import Matrix, model_config_dict, write_similarity
from sere_ext.errors import UnsupportedError, UsageError
from sere_ext.similarity import SimilarityMeta, model_config_digest

_CHUNK_BYTES = 64 * 1024 * 1024  # of expert outputs held at once

Progress = Callable[[int, int], None]  # sequences done, sequences in all


def read_texts(path: Path) -> list[str]:
    """Calibration texts: JSONL with `text`, or `prompt` and `answer`; any other file is one text a line.

    Raises:
        UsageError: missing, empty, or a line that is no such object.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"cannot read the calibration data {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no UTF-8 text; give JSONL with a field text, or plain lines") from error
    texts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix not in (".jsonl", ".json"):
            texts.append(line)
            continue
        try:
            item = json.loads(line)
            texts.append(str(item["text"]) if "text" in item else f"{item['prompt']}{item.get('answer', '')}")
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path}:{number}: each line should be an object with text, or prompt and answer") from error
    if not texts:
        raise UsageError(f"{path} holds no calibration text")
    return texts


def calibrate(
    model: str,
    data: Path,
    out: Path,
    *,
    revision: str | None = None,
    sequences: int = 400,
    max_length: int = 128,
    progress: Progress = lambda done, total: None,
) -> SimilarityMeta:
    """Measure similarities on a model and write the artefact.

    Args:
        model: model directory or hub name; any transformers MoE whose experts are stacked or a ModuleList.
        data: texts, see `read_texts`; the first `sequences` of them, each cut to `max_length` tokens.
        out: file to write (atomically).

    Raises:
        UsageError: the data or the model cannot be read.
        UnsupportedError: a dense model, or experts of an unknown form.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = read_texts(data)[:sequences]
    try:
        config = model_config_dict(model, revision)
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
        network = AutoModelForCausalLM.from_pretrained(model, revision=revision, dtype="auto").eval()
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot load the model {model}: {error}") from error
    experts = find_experts(network)
    if not experts:
        raise UnsupportedError(f"{model} ({config.get('model_type')}) is a dense model: it has no experts to compare")
    sums = {layer: GramSum(experts_of) for layer, experts_of in experts.items()}
    hooks = [module.register_forward_pre_hook(_collector(sums[layer])) for layer, module in experts.items()]
    try:
        with torch.inference_mode():
            for done, text in enumerate(texts):
                progress(done, len(texts))
                tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=max_length)
                if tokens["input_ids"].shape[1]:
                    network(input_ids=tokens["input_ids"], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    progress(len(texts), len(texts))
    first = next(iter(sums.values()))
    meta = SimilarityMeta(
        metric="frobenius",
        model_type=str(config.get("model_type", "")),
        model_name=Path(model).name if Path(model).is_dir() else model,
        model_revision=revision or "",
        config_digest=model_config_digest(config),
        data_digest="sha256:" + hashlib.sha256(data.read_bytes()).hexdigest(),
        tokens=first.tokens,
        layers=tuple(sums),
        num_experts=first.num_experts,
    )
    return write_similarity(out, meta, {layer: frobenius(total.gram) for layer, total in sums.items()})


def frobenius(gram: np.ndarray[Any, Any]) -> Matrix:
    """1 - distance / largest distance, from the Gram matrix [E, E] of the experts' outputs.

    Returns:
        float32 [E, E], symmetric, diagonal 1; all 1 if every expert answers the same.
    """
    norms = np.diag(gram)
    distance = np.sqrt(np.maximum(norms[:, None] + norms[None, :] - gram - gram.T, 0.0))
    np.fill_diagonal(distance, 0.0)
    largest = distance.max()
    return (1.0 - (distance / largest if largest > 0 else distance)).astype(np.float32)


class GramSum:
    """Running sum over tokens of <Ei(x), Ej(x)> for one layer, in float64 since distances are small differences."""

    def __init__(self, experts: Any) -> None:
        self._answers = answers_of(experts)
        self.num_experts = int(getattr(experts, "num_experts", 0) or len(experts))
        self.gram = np.zeros((self.num_experts, self.num_experts), np.float64)
        self.tokens = 0

    def add(self, hidden: Any) -> None:
        """hidden: [N, H] inputs of the layer's experts, any float dtype."""
        step = max(1, _CHUNK_BYTES // (4 * self.num_experts * hidden.shape[-1]))
        for start in range(0, hidden.shape[0], step):
            chunk = hidden[start : start + step]
            flat = self._answers(chunk).double().reshape(self.num_experts, -1)  # [E, n * H]
            self.gram += (flat @ flat.T).numpy(force=True)
            self.tokens += chunk.shape[0]


def answers_of(experts: Any) -> Callable[[Any], Any]:
    """A function from inputs [n, H] to the outputs of all experts [E, n, H] (float32).

    Raises:
        UnsupportedError: neither stacked gate_up_proj [E, 2I, H] and down_proj [E, H, I] nor a list of modules.
    """
    import torch

    stacked = getattr(experts, "gate_up_proj", None)
    down = getattr(experts, "down_proj", None)
    if stacked is not None and down is not None and stacked.dim() == 3 and stacked.shape[1] == 2 * down.shape[2]:

        def stacked_answers(x: Any) -> Any:
            gate, up = torch.einsum("nh,eih->eni", x, stacked).chunk(2, dim=-1)
            return torch.einsum("eni,ehi->enh", experts.act_fn(gate) * up, down).float()

        return stacked_answers
    if isinstance(experts, torch.nn.ModuleList):
        return lambda x: torch.stack([expert(x) for expert in experts]).float()
    raise UnsupportedError(f"experts of the form {type(experts).__name__} are not known to this release; report the model")


def find_experts(network: Any) -> dict[int, Any]:
    """The experts module of each MoE layer by model layer number, in order."""
    found = {}
    for name, module in network.named_modules():
        path = name.split(".")
        numbers = [int(part) for part in path if part.isdigit()]
        if path[-1] == "experts" and len(numbers) == 1:
            found[numbers[0]] = module
    return found


def _collector(total: GramSum) -> Callable[[Any, tuple[Any, ...]], None]:
    def hook(_module: Any, inputs: tuple[Any, ...]) -> None:
        total.add(inputs[0].reshape(-1, inputs[0].shape[-1]))

    return hook


def describe(meta: SimilarityMeta, matrices: Iterable[Matrix]) -> str:
    """One line a layer: quantiles of each expert's nearest neighbour, which rho is compared with."""
    lines = []
    for layer, matrix in zip(meta.layers, matrices, strict=True):
        off = np.where(np.eye(meta.num_experts, dtype=bool), -np.inf, matrix).max(axis=1)
        low, mid, high = np.quantile(off, [0.1, 0.5, 0.9])
        lines.append(f"layer {layer}: nearest expert {low:.2f} / {mid:.2f} / {high:.2f} (10th, 50th, 90th percentile)")
    return "\n".join(lines)
