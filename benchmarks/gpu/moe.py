"""A Qwen3-MoE in plain torch that is trained here and then decoded by `lanes.py`, on a GPU or a CPU. Needs no vLLM.

Every expert computes every token (one product per layer over a stack of weights): wasteful, and fast enough on a GPU for a model
of this size, with no kernel of its own. Shapes: T tokens, E experts, H hidden, I an expert's inner width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.lanes import Lanes
from tests.assets.make import tokenizer, train
from tests.assets.make.short_tasks import SHORT

SEED = 20260217
BATCH, POOL = 192, 4  # items per step; batches that are sorted by length together
CHUNK_BYTES = 1 << 30  # of what all experts make of one chunk of tokens


def config(hidden: int, layers: int, experts: int, top_k: int, inner: int) -> dict[str, Any]:
    """As in a config.json, what `lanes.py` reads of it."""
    return {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_experts": experts, "num_experts_per_tok": top_k,
        "moe_intermediate_size": inner, "num_attention_heads": hidden // 32, "num_key_value_heads": hidden // 64, "head_dim": 32,
        "norm_topk_prob": True, "rms_norm_eps": 1e-6, "rope_parameters": {"rope_theta": 10000.0},
    }  # fmt: skip


class Moe(Lanes):
    """Random weights until `train_for`. Tensors live on `device`; `weights` and `stacks` hold parameters."""

    def __init__(self, config: dict[str, Any], device: str) -> None:
        self.config, self.device = config, device
        self.layers, self.experts, self.top_k = config["num_hidden_layers"], config["num_experts"], config["num_experts_per_tok"]
        self.heads, self.key_heads, self.head = config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]
        theta = config["rope_parameters"]["rope_theta"]
        self.frequencies = theta ** (-torch.arange(0, self.head, 2, device=device) / self.head)
        source = torch.Generator(device).manual_seed(SEED)
        self.weights: dict[str, Tensor] = {}
        for name, shape in self._shapes():
            if len(shape) == 1:
                made = torch.ones(shape, device=device)
            else:
                made = torch.randn(shape, device=device, generator=source) * 0.02
            self.weights[name] = nn.Parameter(made)

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        H, E, inner = self.config["hidden_size"], self.experts, self.config["moe_intermediate_size"]
        into, key = self.heads * self.head, self.key_heads * self.head
        yield "model.embed_tokens.weight", (tokenizer.VOCABULARY, H)
        for layer in range(self.layers):
            name = f"model.layers.{layer}."
            for letter, shape in (("q", (into, H)), ("k", (key, H)), ("v", (key, H)), ("o", (H, into))):
                yield f"{name}self_attn.{letter}_proj.weight", shape
            for norm, width in (("self_attn.q_norm", self.head), ("self_attn.k_norm", self.head), ("input_layernorm", H), ("post_attention_layernorm", H)):  # fmt: skip
                yield f"{name}{norm}.weight", (width,)
            yield f"{name}mlp.gate.weight", (E, H)
            yield f"{name}mlp.experts.gate_up_proj", (E, 2 * inner, H)
            yield f"{name}mlp.experts.down_proj", (E, H, inner)
        yield "model.norm.weight", (H,)
        yield "lm_head.weight", (tokenizer.VOCABULARY, H)

    def parameters(self) -> int:
        """How many numbers it has."""
        return sum(weight.numel() for weight in self.weights.values())

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """As `train.optimisers` asks for them."""
        return iter(self.weights.items())

    def every(self, layer: int, x: Tensor) -> Tensor:
        """What each expert makes of each token, [T, H] -> [E, T, H]."""
        name = f"model.layers.{layer}.mlp.experts."
        gate, up = torch.einsum("th,eih->eti", x, self.weights[name + "gate_up_proj"]).chunk(2, -1)
        return torch.einsum("eti,ehi->eth", functional.silu(gate) * up, self.weights[name + "down_proj"])

    def mixed(self, layer: int, x: Tensor, mix: Tensor) -> Tensor:
        """See `Reference.mixed`: all experts on all tokens, weighted, before the second product where that is smaller."""
        name = f"model.layers.{layer}.mlp.experts."
        gate_up, down = self.weights[name + "gate_up_proj"], self.weights[name + "down_proj"]
        rows = max(1, CHUNK_BYTES // (4 * self.experts * gate_up.shape[1]))
        parts = []
        for tokens, weights in zip(x.split(rows), mix.split(rows), strict=True):
            gate, up = torch.einsum("th,eih->tei", tokens, gate_up).chunk(2, -1)
            inner = functional.silu(gate) * up * weights[..., None].to(gate.dtype)
            parts.append(torch.einsum("tei,ehi->th", inner, down))
        return torch.cat(parts)

    def teach(self, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits [R, T, V] of right-padded sequences under a causal mask, and each layer's router logits [R * T, E]."""
        R, T = ids.shape
        positions = torch.arange(T, device=ids.device).expand(R, T)
        x, routers = functional.embedding(ids, self.weights["model.embed_tokens.weight"]), []
        for layer in range(self.layers):
            name = f"model.layers.{layer}."
            h = self.norm(x, name + "input_layernorm")

            def project(letter: str, heads: int, h: Tensor = h, name: str = name) -> Tensor:
                found = functional.linear(h, self.weights[f"{name}self_attn.{letter}_proj.weight"])
                return found.view(R, T, heads, self.head).transpose(1, 2)

            query = self.rotate(self.norm(project("q", self.heads).float(), name + "self_attn.q_norm"), positions)
            key = self.rotate(self.norm(project("k", self.key_heads).float(), name + "self_attn.k_norm"), positions)
            value = project("v", self.key_heads)
            seen = functional.scaled_dot_product_attention(
                query.to(value.dtype), key.to(value.dtype), value, is_causal=True, enable_gqa=self.heads != self.key_heads
            )
            x = x + functional.linear(seen.transpose(1, 2).reshape(R, T, -1), self.weights[name + "self_attn.o_proj.weight"])
            h = self.norm(x, name + "post_attention_layernorm").view(R * T, -1)
            with torch.autocast(self.device, enabled=False):  # which experts are chosen must not hang on bf16
                routers.append(functional.linear(h.float(), self.weights[name + "mlp.gate.weight"]))
            x = x + self.mixed(layer, h, self.exact(layer, routers[-1])).view(R, T, -1)
        return functional.linear(self.norm(x, "model.norm"), self.weights["lm_head.weight"]), routers

    def train_for(self, seconds: float, say: Callable[[str], None], least_steps: int = 1) -> dict[str, Any]:
        """Train until the time is up and so many steps are done; the learning rate falls on the way. On a GPU products are in bf16.

        Returns:
            steps, items seen, seconds, and the last loss.
        """
        import random

        source = train.batches(SHORT.stream("train", SEED), random.Random(SEED), BATCH, POOL)
        steppers = train.optimisers(self)
        began, step, total, loss = time.monotonic(), 0, 100_000, torch.zeros(())
        spent = done = 0.0
        while done < 1:
            train.scale_rates(steppers, min((step + 1) / 50, train.rate(max(50, int(done * total)), total)))
            ids, labels = (tensor.to(self.device) for tensor in train.encode(next(source)))
            with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
                logits, routers = self.teach(ids)
            wanted = labels[:, 1:].flatten()
            loss = functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), wanted, ignore_index=train.IGNORED)
            balance = train.balance_loss(tuple(routers), (ids != tokenizer.PAD_ID).flatten(), self.top_k)
            (loss + train.BALANCE * balance).backward()
            nn.utils.clip_grad_norm_(list(self.weights.values()), 1.0)
            for stepper in steppers:
                stepper.step()
                stepper.zero_grad(set_to_none=True)
            step += 1
            if step % 100 == 1:
                say(f"step {step}, loss {loss.item():.4f}, balance {balance.item():.3f}")
            spent = time.monotonic() - began
            done = min(spent / seconds, step / least_steps)
        self.weights = {name: weight.detach() for name, weight in self.weights.items()}
        return {"steps": step, "items": step * BATCH, "trainSeconds": spent, "loss": loss.item()}

    def similarity(self, prompts: list[str]) -> Tensor:
        """[layers, E, E] by the default metric, from what all experts make of these prompts' tokens."""
        from sere_ext.calibration.moments import make_moments

        sums = [make_moments("frobenius", self.experts, self.device) for _ in range(self.layers)]
        for number, prompt in enumerate(prompts):
            ids = torch.tensor([[tokenizer.IDS[c] for c in prompt]], device=self.device)

            def spy(layer: int, x: Tensor, half: int = number % 2) -> None:
                sums[layer].add(self.every(layer, x), half)

            positions = torch.arange(ids.shape[1], device=self.device)[None]
            rows = torch.zeros(1, dtype=torch.int64, device=self.device)
            self.forward(ids, positions, self.cache(1, ids.shape[1]), rows, self.exact, spy)
        return torch.stack([torch.from_numpy(sum_.matrix()) for sum_ in sums]).to(self.device)
