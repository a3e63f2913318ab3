"""Train a small Qwen3-MoE from nothing, with fixed seeds, on a CPU: ``python -m tests.assets.make.train --model rows_moe``.

The optimiser is Muon (orthogonalised updates) for the matrices inside the layers, AdamW for embeddings, norms and routers.
A load-balancing loss per layer spreads routing over all experts: re-routing away from experts that nobody uses costs nothing.
Noise on the router's logits in the last steps (noisy top-k gating, Shazeer et al. 2017, arXiv 1701.06538) teaches experts to stand
in for one another, as the experts of large models do.

A run that was stopped goes on from its last checkpoint when it is started anew with the same arguments.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.assets.make import tokenizer
from tests.assets.make.models import RECIPES, Recipe
from tests.assets.make.tasks import Item

if TYPE_CHECKING:  # the GPU benchmark trains with this module's parts and without transformers
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

SEED = 20260217
MUON_RATE = 0.02
ADAM_RATE = 3e-3
BALANCE = 0.02  # weight of the load-balancing loss
NOISE = 0.6  # standard deviation of the noise on a layer's router logits, in standard deviations of those logits
MAX_POSITIONS = 256
IGNORED = -100  # label of prompt and padding positions
REPORT_STEPS = 50  # steps between two printed lines, and between two checkpoints


def config(recipe: Recipe) -> Qwen3MoeConfig:
    """The architecture: 1.8 million parameters, nine tenths of them in the experts."""
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=tokenizer.VOCABULARY,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=256,  # of dense layers; there are none
        num_experts=recipe.experts,
        num_experts_per_tok=recipe.top_k,
        moe_intermediate_size=recipe.expert_width,
        norm_topk_prob=True,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=False,
        pad_token_id=tokenizer.PAD_ID,
        bos_token_id=None,
        eos_token_id=tokenizer.EOS_ID,
        router_aux_loss_coef=BALANCE,
        torch_dtype="float32",
    )


def encode(batch: list[Item]) -> tuple[Tensor, Tensor]:
    """Right-padded ids and labels, both int64 [items, longest]; only the answer and its EOS carry a label."""
    rows = [[tokenizer.IDS[c] for c in item.prompt + item.answer] + [tokenizer.EOS_ID] for item in batch]
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), tokenizer.PAD_ID)
    labels = torch.full((len(rows), width), IGNORED)
    for index, (row, item) in enumerate(zip(rows, batch, strict=True)):
        ids[index, : len(row)] = torch.tensor(row)
        labels[index, len(item.prompt) : len(row)] = ids[index, len(item.prompt) : len(row)]
    return ids, labels


def batches(source: Iterator[Item], rng: random.Random, batch: int, pool: int) -> Iterator[list[Item]]:
    """Batches of ``batch`` items of about one length: ``pool`` batches' worth is sorted by length and served in random order."""
    while True:
        found = list(islice(source, pool * batch))
        if pool > 1:
            found.sort(key=lambda item: len(item.prompt) + len(item.answer))
        starts = [batch * index for index in range(pool)]
        rng.shuffle(starts)
        yield from (found[start : start + batch] for start in starts)


def balance_loss(router_logits: tuple[Tensor, ...], real: Tensor, top_k: int) -> Tensor:
    """Switch-style balance, the mean over layers of E * sum(load * probability); 1 when routing is even.

    Per layer, unlike the one in transformers, which pools the layers and lets each one collapse on its own.

    Args:
        router_logits: per layer, [tokens, experts].
        real: bool [tokens], false at padding.
    """
    losses = []
    for logits in router_logits:
        probabilities = logits[real].softmax(-1)
        experts = probabilities.shape[-1]
        chosen = probabilities.topk(top_k, -1).indices
        load = torch.bincount(chosen.flatten(), minlength=experts) / chosen.numel()
        losses.append(experts * (load * probabilities.mean(0)).sum())
    return torch.stack(losses).mean()


def orthogonalised(update: Tensor) -> Tensor:
    """Newton-Schulz iteration of Muon: the nearest semi-orthogonal matrices, roughly. [..., rows, columns]."""
    x = update / (update.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, then orthogonalised steps, each matrix by itself.

    A parameter is a matrix, a stack of matrices [E, rows, columns], or in a group with ``halves`` 2 a stack in which each entry is
    two matrices on top of each other (an expert's gate and up projections).
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "halves": 1})

    @torch.no_grad()
    def step(self) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                if "velocity" not in state:
                    state["velocity"] = torch.zeros_like(parameter)
                velocity = state["velocity"]
                velocity.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(velocity, group["momentum"])
                rows, columns = update.shape[-2] // group["halves"], update.shape[-1]
                matrices = update.view(-1, rows, columns)
                scale = max(1.0, rows / columns) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(orthogonalised(matrices).reshape(update.shape), alpha=-group["lr"] * scale)


def optimisers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for attention and expert matrices, AdamW for the rest."""
    named = list(model.named_parameters())
    muon: list[dict[str, Any]] = [
        {"params": [p for n, p in named if "_proj" in n and "gate_up_proj" not in n]},
        {"params": [p for n, p in named if "gate_up_proj" in n], "halves": 2},
    ]
    rest = [p for n, p in named if "_proj" not in n]
    return [Muon(muon, MUON_RATE), torch.optim.AdamW(rest, ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0)]


def rate(step: int, steps: int) -> float:
    """Share of the full learning rate: a short rise, a plateau, then a straight fall to zero over the last 60 %."""
    return min(1.0, (step + 1) / 50, (steps - step) / (0.6 * steps))


def sorted_experts(layer: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """What transformers' `Qwen3MoeExperts.forward` computes, for training on a CPU: rows are sorted by expert once.

    Unbinding the stacks gives each its gradient at once; picking an expert by index would fill a whole stack of zeros each time.

    Args:
        layer: the experts, with ``gate_up_proj`` [E, 2I, H] and ``down_proj`` [E, H, I].
        hidden: [tokens, H].
        ids, weights: [tokens, k], the experts of each token.

    Returns:
        [tokens, H].
    """
    top_k = ids.shape[1]
    order = ids.flatten().argsort(stable=True)
    counts = torch.bincount(ids.flatten(), minlength=layer.num_experts).tolist()
    rows = hidden.index_select(0, order // top_k).split(counts)
    gate_up = torch.cat([functional.linear(x, w) for x, w in zip(rows, layer.gate_up_proj.unbind(0), strict=True)])
    gate, up = gate_up.chunk(2, -1)
    inner = functional.silu(gate) * up * weights.flatten().index_select(0, order)[:, None]
    out = torch.cat([functional.linear(x, w) for x, w in zip(inner.split(counts), layer.down_proj.unbind(0), strict=True)])
    return out.index_select(0, order.argsort()).view(len(hidden), top_k, -1).sum(1)


def scale_rates(steppers: list[torch.optim.Optimizer], share: float) -> None:
    """Set every learning rate to this share of what it was when the optimiser was made."""
    for stepper in steppers:
        for group in stepper.param_groups:
            group["lr"] = share * group.setdefault("full_lr", group["lr"])


class Gates:
    """Watches the routers of a transformers model: adds noise to their logits where asked, and remembers the logits of a step."""

    def __init__(self, model: nn.Module) -> None:
        self.noise = 0.0  # in standard deviations of a layer's logits
        self.logits: list[Tensor] = []  # of the last forward pass, per layer, [tokens, experts]
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(self._gate)

    def _gate(self, module: nn.Module, _args: object, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """What the router returns: its logits, and the weights and ids [tokens, k] of the experts that each token uses."""
        logits, weights, ids = output
        if self.noise:
            logits = logits + self.noise * logits.detach().std() * torch.randn_like(logits)
            weights, ids = logits.softmax(-1).topk(module.top_k, -1)
            weights = weights / weights.sum(-1, keepdim=True)
        self.logits.append(logits)
        return logits, weights, ids


def train(recipe: Recipe, destination: Path, steps: int, threads: int, seed: int) -> None:
    """Train and save; prints one JSON line and writes a checkpoint beside the destination every ``REPORT_STEPS`` steps."""
    from transformers import Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    model = Qwen3MoeForCausalLM(config(recipe))
    for layer in model.model.layers:
        layer.mlp.experts.forward = functools.partial(sorted_experts, layer.mlp.experts)
    gates = Gates(model)
    print(json.dumps({"parameters": sum(p.numel() for p in model.parameters())}), flush=True)
    source = batches(recipe.tasks.stream("train", seed), random.Random(seed), recipe.batch, recipe.pool)
    steppers = optimisers(model)
    checkpoint = destination.with_name(destination.name + ".checkpoint")
    asked = {"recipe": recipe.name, "steps": steps, "seed": seed}
    first, before = resume(checkpoint, asked, model, steppers)
    for _ in range(first):
        next(source)
    started = time.monotonic() - before
    for step in range(first, steps):
        if step and step % REPORT_STEPS == 0:
            keep(checkpoint, asked, step, time.monotonic() - started, model, steppers)
        scale_rates(steppers, rate(step, steps))
        gates.noise = NOISE if step >= steps * (1 - recipe.noisy_share) else 0.0
        gates.logits.clear()
        ids, labels = encode(next(source))
        # Right padding under a causal mask needs no attention mask: no real token can see a padded one.
        hidden = model.model(input_ids=ids, use_cache=False)
        logits = model.lm_head(hidden.last_hidden_state)
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        balance = balance_loss(tuple(gates.logits), (ids != tokenizer.PAD_ID).flatten(), recipe.top_k)
        (loss + BALANCE * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
        model.zero_grad(set_to_none=True)
        if step % REPORT_STEPS == 0 or step == steps - 1:
            seconds = round(time.monotonic() - started, 1)
            line = {"step": step, "loss": round(loss.item(), 4), "balance": round(balance.item(), 4), "seconds": seconds}
            print(json.dumps(line), flush=True)
    save(model, destination, recipe)
    checkpoint.unlink(missing_ok=True)


def keep(
    path: Path, asked: dict[str, Any], step: int, seconds: float, model: nn.Module, steppers: list[torch.optim.Optimizer]
) -> None:
    """Write the state before ``step`` after ``seconds`` of training, all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "asked": asked, "step": step, "seconds": seconds, "random": torch.get_rng_state(), "model": model.state_dict(),
        "steppers": [stepper.state_dict() for stepper in steppers],
    }  # fmt: skip
    unfinished = path.with_name(path.name + ".part")
    torch.save(state, unfinished)
    os.replace(unfinished, path)


def resume(path: Path, asked: dict[str, Any], model: nn.Module, steppers: list[torch.optim.Optimizer]) -> tuple[int, float]:
    """Take up the state of a run with the same arguments; the step to begin with and the seconds already spent, 0 and 0 if none."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    if state["asked"] != asked:
        return 0, 0.0
    model.load_state_dict(state["model"])
    for stepper, kept in zip(steppers, state["steppers"], strict=True):
        stepper.load_state_dict(kept)
    torch.set_rng_state(state["random"])
    return state["step"], state["seconds"]


def save(model: Qwen3MoeForCausalLM, destination: Path, recipe: Recipe) -> None:
    """Write weights (one tensor per expert and projection, as published Qwen3-MoE checkpoints do), configs, tokenizer."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=recipe.longest_answer, eos_token_id=tokenizer.EOS_ID, pad_token_id=tokenizer.PAD_ID
    )
    model.save_pretrained(destination)
    (destination / "model.safetensors").chmod(0o644)  # safetensors writes for the owner only
    tokenizer.save(destination, MAX_POSITIONS)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(RECIPES), required=True)
    parser.add_argument("--out", type=Path, help="directory to write; the committed one when not given")
    parser.add_argument("--steps", type=int, help="optimiser steps; fewer only to try the script")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; two quiet cores gain little, busy ones lose much")
    parser.add_argument("--seed", type=int, default=SEED, help="of the weights at the start and of the items")
    given = parser.parse_args()
    recipe = RECIPES[given.model]
    train(recipe, given.out or recipe.directory, given.steps or recipe.steps, given.threads, given.seed)


if __name__ == "__main__":
    main()
