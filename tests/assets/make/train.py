"""Train the small Qwen3-MoE from nothing, with fixed seeds, on a CPU: ``python tests/assets/make/train.py``.

The optimiser is Muon (orthogonalised updates) for the matrices inside the layers, AdamW for embeddings, norms and routers.
A load-balancing loss per layer spreads routing over all experts: re-routing away from experts that nobody uses costs nothing.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizer
import torch
from tasks import Item, stream
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:  # the GPU benchmark trains with this module's parts and without transformers
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

DESTINATION = Path(__file__).resolve().parent.parent / "tiny_moe"

SEED = 20260217
STEPS = 900
BATCH = 192  # items per step
POOL = 4  # batches that are sorted by length together
MUON_RATE = 0.02
ADAM_RATE = 3e-3
BALANCE = 0.02  # weight of the load-balancing loss
MAX_POSITIONS = 256
IGNORED = -100  # label of prompt and padding positions


def config() -> Qwen3MoeConfig:
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
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=64,
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


def batches(source: Iterator[Item], rng: random.Random) -> Iterator[list[Item]]:
    """Batches of items of about one length: a few batches' worth is sorted by length, which saves a quarter of padding."""
    while True:
        pool = sorted((next(source) for _ in range(POOL * BATCH)), key=lambda item: len(item.prompt) + len(item.answer))
        starts = [BATCH * index for index in range(POOL)]
        rng.shuffle(starts)
        yield from (pool[start : start + BATCH] for start in starts)


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
    """Momentum, then orthogonalised steps, each matrix of a stack by itself (gate and up of an expert are two)."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                velocity = state.setdefault("velocity", torch.zeros_like(parameter))
                velocity.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(velocity, group["momentum"])
                columns = update.shape[-1]
                # gate_up_proj [E, 2I, H] holds two matrices per expert; every other stack is one matrix per expert.
                matrices = update.view(-1, 2, update.shape[-2] // 2, columns) if _is_gate_up(update) else update
                scale = max(1.0, matrices.shape[-2] / columns) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(orthogonalised(matrices).reshape(update.shape), alpha=-group["lr"] * scale)


def _is_gate_up(update: Tensor) -> bool:
    return update.dim() == 3 and update.shape[-2] >= update.shape[-1]


def optimisers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for attention and expert matrices, AdamW for the rest."""
    inner = [p for n, p in model.named_parameters() if "_proj" in n]
    rest = [p for n, p in model.named_parameters() if "_proj" not in n]
    return [Muon(inner, MUON_RATE), torch.optim.AdamW(rest, ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0)]


def rate(step: int, steps: int) -> float:
    """Share of the full learning rate: a short rise, a plateau, then a straight fall to zero over the last 60 %."""
    return min(1.0, (step + 1) / 50, (steps - step) / (0.6 * steps))


def train(destination: Path, steps: int, threads: int) -> None:
    """Train and save; prints one JSON line every 50 steps."""
    from transformers import Qwen3MoeForCausalLM

    torch.manual_seed(SEED)
    torch.set_num_threads(threads)
    model = Qwen3MoeForCausalLM(config())
    model.set_experts_implementation("eager")
    print(json.dumps({"parameters": sum(p.numel() for p in model.parameters())}), flush=True)
    source = batches(stream("train", SEED), random.Random(SEED))
    steppers = optimisers(model)
    base = [group["lr"] for stepper in steppers for group in stepper.param_groups]
    started = time.monotonic()
    for step in range(steps):
        for stepper, full in zip(steppers, base, strict=True):
            stepper.param_groups[0]["lr"] = full * rate(step, steps)
        ids, labels = encode(next(source))
        # Right padding under a causal mask needs no attention mask: no real token can see a padded one.
        hidden = model.model(input_ids=ids, use_cache=False, output_router_logits=True)
        logits = model.lm_head(hidden.last_hidden_state)
        loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        balance = balance_loss(hidden.router_logits, (ids != tokenizer.PAD_ID).flatten(), model.config.num_experts_per_tok)
        (loss + BALANCE * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
        model.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps - 1:
            seconds = round(time.monotonic() - started, 1)
            line = {"step": step, "loss": round(loss.item(), 4), "balance": round(balance.item(), 4), "seconds": seconds}
            print(json.dumps(line), flush=True)
    save(model, destination)


def save(model: Qwen3MoeForCausalLM, destination: Path) -> None:
    """Write weights (one tensor per expert and projection, as published Qwen3-MoE checkpoints do), configs, tokenizer."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=16, eos_token_id=tokenizer.EOS_ID, pad_token_id=tokenizer.PAD_ID
    )
    model.save_pretrained(destination)
    (destination / "model.safetensors").chmod(0o644)  # safetensors writes for the owner only
    tokenizer.save(destination, MAX_POSITIONS)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DESTINATION, help="directory to write")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimiser steps; fewer only to try the script")
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    arguments = parser.parse_args()
    train(arguments.out, arguments.steps, arguments.threads)


if __name__ == "__main__":
    main()
