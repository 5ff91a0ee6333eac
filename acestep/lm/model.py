"""Qwen3's decoder over a flat list of tokens.

All rows of a step (a decoded token, a forced run, a prompt) lie one after another in one tensor: no padding, every matrix is read once
per step. Where a row's past lies is the business of the attention that is passed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

# (layer, queries (T, heads, head_dim), keys (T, kv_heads, head_dim), values likewise) -> (T, heads * head_dim)
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a Qwen3 checkpoint."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    rope_theta: float
    rms_norm_eps: float
    tied: bool
    max_positions: int

    @property
    def kv_elements_per_token(self) -> int:
        """Keys and values of one token over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Layer:
    """Weights of one decoder layer; projections that read the same input are one matrix."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    qk_norm: torch.Tensor  # (heads + kv_heads, head_dim)
    out: torch.Tensor
    mlp_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor


class PlannerModel:
    """Weights on one device, and the forward.

    Args:
        head: (vocab, hidden); the embedding where the checkpoint ties them.
        max_len: Positions for which rotary tables are made.
    """

    def __init__(
        self,
        config: ModelConfig,
        embedding: torch.Tensor,
        layers: list[Layer],
        norm: torch.Tensor,
        head: torch.Tensor,
        max_len: int,
    ) -> None:
        self.config = config
        self.embedding = embedding
        self.layers = layers
        self.norm = norm
        self.head = head
        self.device, self.dtype = embedding.device, embedding.dtype
        self._cos, self._sin = _rotary_tables(config, max_len, self.device, self.dtype)

    @property
    def matrices(self) -> list[torch.Tensor]:
        """The four products of a layer."""
        layer = self.layers[0]
        return [layer.qkv, layer.out, layer.gate_up, layer.down]

    @property
    def weight_bytes(self) -> int:
        tensors = [self.embedding, self.norm, *(t for layer in self.layers for t in vars(layer).values())]
        if self.head.data_ptr() != self.embedding.data_ptr():
            tensors.append(self.head)
        return sum(t.numel() * t.element_size() for t in tensors)

    @torch.inference_mode()
    def forward(self, ids: torch.Tensor, positions: torch.Tensor, attend: Attend) -> torch.Tensor:
        """Args: `ids` and `positions`, (T,) int64. Returns (T, hidden) after the final norm."""
        c = self.config
        qk_heads = c.heads + c.kv_heads
        cos, sin = self._cos[positions][:, None], self._sin[positions][:, None]
        x = F.embedding(ids, self.embedding)
        for i, layer in enumerate(self.layers):
            qkv = F.linear(F.rms_norm(x, (c.hidden_size,), layer.input_norm, c.rms_norm_eps), layer.qkv)
            qkv = qkv.view(len(ids), qk_heads + c.kv_heads, c.head_dim)
            qk = F.rms_norm(qkv[:, :qk_heads], (c.head_dim,), None, c.rms_norm_eps) * layer.qk_norm
            qk = qk * cos + qk.roll(c.head_dim // 2, -1) * sin
            attended = attend(i, qk[:, : c.heads], qk[:, c.heads :], qkv[:, qk_heads:])
            x = x + F.linear(attended, layer.out)
            gate, up = F.linear(F.rms_norm(x, (c.hidden_size,), layer.mlp_norm, c.rms_norm_eps), layer.gate_up).chunk(
                2, -1
            )
            x = x + F.linear(F.silu(gate) * up, layer.down)
        return F.rms_norm(x, (c.hidden_size,), self.norm, c.rms_norm_eps)


def _rotary_tables(
    config: ModelConfig, max_len: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, (max_len, head_dim); the first half of sin is negated, so that a roll replaces the rotation."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.arange(max_len, dtype=torch.float32)[:, None] * (1.0 / config.rope_theta**half)
    cos, sin = angles.cos(), angles.sin()
    tables = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    return tables[0].to(device, dtype), tables[1].to(device, dtype)
