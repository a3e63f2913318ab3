"""Qwen3-MoE in plain torch with a key-value cache, whose expert choice can be replaced: the yardstick for the real engine.

``test_assets.py`` holds its logits against transformers. Shapes: R rows (sequences), T tokens per row, H hidden,
E experts, k experts per token.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

# (layer, ids int64 [tokens, k] best first, tokens in row order) -> ids of the same shape
Route = Callable[[int, Tensor], Tensor]


def exact(_layer: int, ids: Tensor) -> Tensor:
    """The routing the model was trained with."""
    return ids


@dataclass(slots=True)
class Cache:
    """Keys and values, [layers, R, key heads, capacity, head size]."""

    keys: Tensor
    values: Tensor


class Reference:
    """The model of one HF directory."""

    def __init__(self, directory: Path) -> None:
        self.config = json.loads((directory / "config.json").read_text())
        weights = load_file(directory / "model.safetensors")
        self.weights = weights
        self.layers: int = self.config["num_hidden_layers"]
        self.experts: int = self.config.get("num_experts") or self.config["num_local_experts"]
        self.top_k: int = self.config["num_experts_per_tok"]
        self.heads: int = self.config["num_attention_heads"]
        self.key_heads: int = self.config["num_key_value_heads"]
        self.head: int = self.config["head_dim"]
        theta = self.config["rope_parameters"]["rope_theta"]
        self.frequencies = theta ** (-torch.arange(0, self.head, 2) / self.head)
        # Per layer and expert: gate and up stacked [2I, H], and down [H, I].
        self.gate_up: list[list[Tensor]] = []
        self.down: list[list[Tensor]] = []
        for layer in range(self.layers):
            parts = [f"model.layers.{layer}.mlp.experts.{expert}." for expert in range(self.experts)]
            self.gate_up.append([torch.cat([weights[p + "gate_proj.weight"], weights[p + "up_proj.weight"]]) for p in parts])
            self.down.append([weights[p + "down_proj.weight"] for p in parts])

    def cache(self, rows: int, capacity: int) -> Cache:
        """An empty cache for ``rows`` sequences of at most ``capacity`` tokens."""
        shape = (self.layers, rows, self.key_heads, capacity, self.head)
        return Cache(torch.zeros(shape), torch.zeros(shape))

    def norm(self, x: Tensor, name: str) -> Tensor:
        """RMS norm over the last dimension."""
        return functional.rms_norm(x, x.shape[-1:], self.weights[name + ".weight"], self.config["rms_norm_eps"])

    def expert(self, layer: int, expert: int, x: Tensor) -> Tensor:
        """One expert's output, [tokens, H] -> [tokens, H]."""
        gate, up = functional.linear(x, self.gate_up[layer][expert]).chunk(2, -1)
        return functional.linear(functional.silu(gate) * up, self.down[layer][expert])

    def moe(self, layer: int, x: Tensor, route: Route) -> Tensor:
        """Mixture of experts over [tokens, H]. A re-routed token keeps its weights; equal ids simply add up."""
        scores = functional.linear(x, self.weights[f"model.layers.{layer}.mlp.gate.weight"]).softmax(-1)
        weights, ids = scores.topk(self.top_k, -1)
        if self.config["norm_topk_prob"]:
            weights = weights / weights.sum(-1, keepdim=True)
        mix = torch.zeros_like(scores).scatter_add_(1, route(layer, ids), weights)  # [tokens, E]
        return self.mixed(layer, x, mix)

    def mixed(self, layer: int, x: Tensor, mix: Tensor) -> Tensor:
        """Sum of the experts' outputs over [tokens, H], weighted by ``mix`` [tokens, E]; an expert runs on its own rows alone."""
        experts, tokens = mix.T.nonzero(as_tuple=True)  # sorted by expert
        rows = x[tokens].split(torch.bincount(experts, minlength=self.experts).tolist())
        made = torch.cat([self.expert(layer, expert, own) for expert, own in enumerate(rows) if len(own)])
        return torch.zeros_like(x).index_add(0, tokens, mix[tokens, experts, None] * made)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotary embedding of [R, heads, T, head] at ``positions`` [R, T]."""
        angles = (positions[..., None] * self.frequencies).repeat(1, 1, 2)[:, None]
        left, right = x.chunk(2, -1)
        return x * angles.cos() + torch.cat([-right, left], -1) * angles.sin()

    @torch.no_grad()
    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        cache: Cache,
        rows: Tensor,
        route: Route = exact,
        spy: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Logits [R, T, vocabulary] of ``ids`` [R, T], whose keys and values go to ``cache`` at ``rows`` and ``positions``.

        Args:
            positions: int64 [R, T], each token's place in its sequence; what lies beyond it is not seen.
            rows: int64 [R], the cache rows to use.
            spy: called with (layer, input of the experts [tokens, H]).
        """
        R, T = ids.shape
        x = self.weights["model.embed_tokens.weight"][ids]
        everything = R == cache.keys.shape[1] and bool(
            (rows == torch.arange(R, device=rows.device)).all()
        )  # saves copying the cache
        visible = torch.arange(cache.keys.shape[3]) <= positions[..., None]  # [R, T, capacity]
        for layer in range(self.layers):
            name = f"model.layers.{layer}."
            h = self.norm(x, name + "input_layernorm")

            def project(letter: str, heads: int, h: Tensor = h, name: str = name) -> Tensor:
                return functional.linear(h, self.weights[f"{name}self_attn.{letter}_proj.weight"]).view(R, T, heads, self.head)

            query = self.rotate(self.norm(project("q", self.heads), name + "self_attn.q_norm").transpose(1, 2), positions)
            key = self.rotate(self.norm(project("k", self.key_heads), name + "self_attn.k_norm").transpose(1, 2), positions)
            keys, values = cache.keys[layer], cache.values[layer]
            keys[rows[:, None], :, positions] = key.transpose(1, 2)
            values[rows[:, None], :, positions] = project("v", self.key_heads)
            own = (keys, values) if everything else (keys[rows], values[rows])
            mixed = functional.scaled_dot_product_attention(
                query, *own, attn_mask=visible[:, None], enable_gqa=self.heads != self.key_heads
            )
            x = x + functional.linear(mixed.transpose(1, 2).reshape(R, T, -1), self.weights[name + "self_attn.o_proj.weight"])
            h = self.norm(x, name + "post_attention_layernorm").view(R * T, -1)
            if spy is not None:
                spy(layer, h)
            x = x + self.moe(layer, h, route).view(R, T, -1)
        return functional.linear(self.norm(x, "model.norm"), self.weights["lm_head.weight"])
