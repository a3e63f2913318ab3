"""Where a transformers model keeps the experts of each MoE layer, what they are asked, and what each one answers.

An expert's answer comes from the model's own code: an experts module that takes (hidden states, expert ids, weights) is
called with every token sent to every expert at weight 1, so biases, clamps and special gates need no copy here. The module's
`forward` is called directly, past the hooks that ask for the answers.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sere_ext.contract.errors import UnsupportedError
from sere_ext.contract.model_config import language_config

Answers = Callable[[Any], Any]  # inputs [n, H] -> outputs of all experts [E, n, H'] float32

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class ExpertLayer:
    """The experts of one MoE layer.

    `asked` is the module whose first input every expert receives: the experts module where that takes the tokens, otherwise
    the block around it.
    """

    number: int  # model layer
    experts: Any
    num_experts: int
    asked: Any
    answers: Answers
    listed: bool = False  # a ModuleList, which is never called itself


def find_experts(network: Any) -> dict[int, ExpertLayer]:
    """The MoE layers by model layer number, in order; empty for a dense model.

    Raises:
        UnsupportedError: experts of a form that this release cannot ask one by one; the message names their class.
    """
    modules = dict(network.named_modules())
    found: dict[int, ExpertLayer] = {}
    for name, module in modules.items():
        path = name.split(".")
        numbers = [int(part) for part in path if part.isdigit()]
        if path[-1] != "experts" or len(numbers) != 1:
            continue
        if numbers[0] in found:
            raise UnsupportedError(f"layer {numbers[0]} has experts in two places ({name}); such models cannot be calibrated")
        found[numbers[0]] = _layer(numbers[0], module, modules[".".join(path[:-1])])
    return dict(sorted(found.items()))


def claims_experts(config: dict[str, object]) -> str | None:
    """Which setting of a decoded config.json says that the model has experts, None for a dense one."""
    source = language_config(config)
    for key in _EXPERT_COUNTS:
        count = source.get(key)
        if isinstance(count, int) and count > 1:
            return f"{key} = {count}"
    return None


def _layer(number: int, experts: Any, block: Any) -> ExpertLayer:
    import torch

    if isinstance(experts, torch.nn.ModuleList):
        _check_list(experts)

        def listed(x: Any) -> Any:
            return torch.stack([_rows(expert.forward(x)) for expert in experts]).float()

        return ExpertLayer(number, experts, len(experts), block, listed, listed=True)
    kind = type(experts).__name__
    count = getattr(experts, "num_experts", None)
    names = list(inspect.signature(experts.forward).parameters)
    if not isinstance(count, int) or count < 1:
        raise UnsupportedError(f"experts of the form {kind} cannot be calibrated: they do not say how many there are")
    if len(names) >= 3 and re.search("ind|selected", names[1]) and re.search("weight|score|prob", names[2]):

        def routed(x: Any) -> Any:
            n = x.shape[0]
            ids = torch.arange(count, device=x.device).repeat_interleave(n)[:, None]
            return experts.forward(x.repeat(count, 1), ids, torch.ones(count * n, 1, dtype=x.dtype, device=x.device))

        return ExpertLayer(number, experts, count, experts, lambda x: routed(x).reshape(count, x.shape[0], -1).float())
    # Llama 4: one group of rows per expert. The rows that it gets are scaled by the router, the block's are not.
    if len(names) == 1 and any(p.dim() == 3 and p.shape[0] == count for p in experts.parameters(recurse=False)):

        def grouped(x: Any) -> Any:
            return experts.forward(x.repeat(count, 1)).reshape(count, x.shape[0], -1).float()

        return ExpertLayer(number, experts, count, block, grouped)
    raise UnsupportedError(
        f"experts of the form {kind}({', '.join(names)}) cannot be asked one by one in this release; load an unquantised "
        "checkpoint, or report the model"
    )


def _check_list(experts: Any) -> None:
    """Only experts that need nothing but their tokens can be asked from outside."""
    for expert in experts:
        needed = [p for p in inspect.signature(expert.forward).parameters.values() if p.default is p.empty]
        if len([p for p in needed if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]) > 1:
            raise UnsupportedError(f"experts of the form {type(expert).__name__} need more than their tokens; report the model")


def _rows(answer: Any) -> Any:
    """Some experts return a tuple with their output first."""
    return answer[0] if isinstance(answer, tuple) else answer
