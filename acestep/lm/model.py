"""Qwen3's decoder over a flat list of tokens.

All rows of a step (a decoded token, a forced run, a prompt) lie one after another in one tensor: no padding, every matrix is read once
per step. Where a row's past lies is the business of the attention that is passed in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from acestep.lm.pointwise import Pointwise, compiled

log = logging.getLogger(__name__)
_TRIAL_TOKENS = 7  # no dimension of a model is as long, so that the compiler takes none for this one

# (layer, queries (T, heads, head_dim), keys (T, kv_heads, head_dim), values likewise) -> (T, heads * head_dim)
Attend = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
Product = Literal["qkv", "out", "gate_up", "down"]  # of a layer, as its matrices are called
# (layer, product, its inputs (T, in), its outputs (T, out), which it changes)
Adapt = Callable[[int, Product, torch.Tensor, torch.Tensor], None]


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
class DecoderLayer:
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
        layers: list[DecoderLayer],
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
        self._pointwise = Pointwise()
        self._cos, self._sin = _rotary_tables(config, max_len, self.device, self.dtype)

    def compile(self) -> None:
        """Fuse what lies between the products; leave it as it is, with a warning, where no compiler works. Takes seconds.

        The compiler sees the model's own tensors: it lays its kernels out for the first sizes, and would do all of it again for a song
        whose tensors are of another kind than those of the trial.
        """
        self._pointwise = compiled()
        tokens = torch.arange(_TRIAL_TOKENS, device=self.device)
        try:
            self.forward(tokens, tokens, lambda layer, q, k, v: q.flatten(1))
        except Exception:  # a compiler fails in any way it likes, and the planner works without
            log.warning(
                "the planner's small kernels are not fused: torch.compile failed on %s", self.device, exc_info=True
            )
            self._pointwise = Pointwise()

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
    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, attend: Attend, adapt: Adapt | None = None
    ) -> torch.Tensor:
        """Args: `ids` and `positions`, (T,) int64; `adapt` changes what the products gave. Returns (T, hidden) after the final norm."""

        def product(index: int, name: Product, x: torch.Tensor) -> torch.Tensor:
            out = F.linear(x, getattr(self.layers[index], name))
            if adapt is not None:
                adapt(index, name, x, out)
            return out

        c, p = self.config, self._pointwise
        qk_heads = c.heads + c.kv_heads
        cos, sin = self._cos[positions][:, None], self._sin[positions][:, None]
        x = F.embedding(ids, self.embedding)
        normed = F.rms_norm(x, (c.hidden_size,), self.layers[0].input_norm, c.rms_norm_eps)
        following = [layer.input_norm for layer in self.layers[1:]] + [self.norm]
        for i, (layer, next_norm) in enumerate(zip(self.layers, following, strict=True)):
            qkv = product(i, "qkv", normed).view(len(ids), qk_heads + c.kv_heads, c.head_dim)
            qk = p.rotate_heads(qkv, layer.qk_norm, cos, sin, c.rms_norm_eps)
            attended = attend(i, qk[:, : c.heads], qk[:, c.heads :], qkv[:, qk_heads:])
            x, normed = p.add_norm(x, product(i, "out", attended), layer.mlp_norm, c.rms_norm_eps)
            opened = p.gate(product(i, "gate_up", normed))
            x, normed = p.add_norm(x, product(i, "down", opened), next_norm, c.rms_norm_eps)
        return normed


def _rotary_tables(
    config: ModelConfig, max_len: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, (max_len, head_dim); the first half of sin is negated, so that a roll replaces the rotation."""
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    angles = torch.arange(max_len, dtype=torch.float32)[:, None] * (1.0 / config.rope_theta**half)
    cos, sin = angles.cos(), angles.sin()
    tables = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
    return tables[0].to(device, dtype), tables[1].to(device, dtype)
