"""One evaluation of the DiT for rows that share nothing but the weights.

Works on diffusers' `AceStepTransformer1DModel` as it is loaded, but calls its blocks itself: every row has its own length, time,
prompt and context, padding is hidden by key masks, keys and values of the conditions are projected once per song instead of
once per step, and no S×S mask is ever built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from acestep.checkpoints.modules import AceStepTransformer1DModel, rotary_freqs
from acestep.dit.attention import Attention, WindowLayout, key_mask, rotate, window_layout
from acestep.dit.lora import ActiveLora, applied
from acestep.settings import Attention as Backend

_KEPT_BATCHES = 2  # the one at work and the one it took over from
_COMPILED_ROWS = 2  # a song, or a song with guidance; batches of short clips are not worth a compilation each
_CONDITION_BUCKET = 128  # tokens, where shapes must repeat for a compiled forward


@dataclass(frozen=True, eq=False)
class Projected:
    """Cross-attention keys and values of one condition, per layer `[1, H_kv, E, D]`."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def tokens(self) -> int:
        return int(self.keys[0].shape[2])


@dataclass(frozen=True, eq=False)
class Row:
    """One evaluation: latents `x` `[L, C]` in float32 at time `t`, with `context` `[L, 2C]` and a projected condition.

    `lora` changes this row alone; the condition must have been projected with the same one.
    """

    x: Tensor
    t: float
    context: Tensor
    condition: Projected
    lora: ActiveLora | None = None


@dataclass(frozen=True, eq=False)
class _Batch:
    """What stays the same from step to step for one composition of rows."""

    frames: tuple[int, ...]
    width: int  # tokens, padding included
    context: Tensor
    rope: tuple[Tensor, Tensor]
    full_mask: Tensor | None
    window: WindowLayout
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    cross_mask: Tensor | None
    held: tuple[object, ...]  # keeps the ids of the cache key from being reused


class Denoiser:
    """Velocities of the DiT.

    Args:
        transformer: Loaded and on `device`; may carry LoRA layers.
        device, dtype: Where and in what to compute. Latents come and go as float32.
        backend: Attention kernel.
        compile: Compile the layer that the model repeats, once per shape, and pad songs and conditions so that few shapes occur.
    """

    def __init__(
        self,
        transformer: AceStepTransformer1DModel,
        device: torch.device,
        dtype: torch.dtype,
        backend: Backend = "sdpa",
        compile: bool = False,
    ) -> None:
        self.transformer: Any = transformer  # its submodules are untyped
        self.device = device
        self.dtype = dtype
        self._backend = backend
        self.attention = Attention(backend, device, dtype)
        self.patch = int(self.transformer.patch_size)
        config: Any = transformer.config
        self._window = int(config.sliding_window)
        self._pad_to_buckets = compile
        self._compiled: Any = compiled(self._block) if compile else self._block
        self._batches: dict[tuple[Any, ...], _Batch] = {}

    def forget(self) -> None:
        """Drop what is kept between steps, to give its memory back."""
        self._batches.clear()

    def set_precision(self, dtype: torch.dtype) -> None:
        """Convert the weights. Half to float32 and back loses nothing."""
        self.forget()
        nn.Module.to(self.transformer, dtype)  # diffusers' own `to` warns about every conversion
        self.dtype = dtype
        self.attention = Attention(self._backend, self.device, dtype)

    @torch.inference_mode()
    def project(self, tokens: Tensor, lora: ActiveLora | None = None) -> Projected:
        """Keys and values of a condition `[E, width of the condition encoder]`, for all layers."""
        with applied(self.transformer, [lora]):
            return self._project(tokens)

    def _project(self, tokens: Tensor) -> Projected:
        states = self.transformer.condition_embedder(tokens[None].to(self.device, self.dtype))
        keys, values = [], []
        for block in self.transformer.layers:
            attn = block.cross_attn
            shape = (attn.kv_heads, attn.head_dim)
            keys.append(attn.norm_k(attn.to_k(states).unflatten(-1, shape)).transpose(1, 2))
            values.append(attn.to_v(states).unflatten(-1, shape).transpose(1, 2))
        return Projected(tuple(keys), tuple(values))

    @torch.inference_mode()
    def velocity(self, rows: Sequence[Row]) -> list[Tensor]:
        """Velocity `[L, C]` in float32 of each row, the same whatever other rows are there."""
        batch = self._batch_of(rows)
        latents = batch.context.new_zeros((len(rows), batch.context.shape[1], rows[0].x.shape[1]))
        for i, row in enumerate(rows):
            latents[i, : len(row.x)] = row.x
        times = torch.tensor([row.t for row in rows], dtype=torch.float32, device=self.device)
        loras = [row.lora for row in rows]
        # Hooks of an adapter, and a new number of rows, would each compile all over again.
        block = self._compiled if len(rows) <= _COMPILED_ROWS and not any(loras) else self._block
        with applied(self.transformer, loras):
            out = self._forward(latents, times, batch, block)
        return [out[i, :frames].float() for i, frames in enumerate(batch.frames)]

    def _batch_of(self, rows: Sequence[Row]) -> _Batch:
        key = tuple((id(row.context), id(row.condition)) for row in rows)
        batch = self._batches.get(key)
        if batch is None:
            while len(self._batches) >= _KEPT_BATCHES:
                del self._batches[next(iter(self._batches))]
            batch = self._batches[key] = self._build(rows)
        return batch

    def _build(self, rows: Sequence[Row]) -> _Batch:
        frames = tuple(len(row.x) for row in rows)
        tokens = [-(-f // self.patch) for f in frames]
        width = max(tokens)
        if self._pad_to_buckets:
            width = bucket(width, self.patch)
        context = torch.zeros(
            (len(rows), width * self.patch, rows[0].context.shape[1]), dtype=self.dtype, device=self.device
        )
        for i, row in enumerate(rows):
            context[i, : frames[i]] = row.context
        keys, values, cross_mask = self._stack([row.condition for row in rows])
        theta = self.transformer.rope_theta
        return _Batch(
            frames=frames,
            width=width,
            context=context,
            rope=rotary_freqs(width, self.transformer.head_dim, theta, self.device, self.dtype),
            full_mask=key_mask(tokens, width, self.device, self.dtype),
            window=window_layout(tokens, width, self._window, self.device, self.dtype),
            keys=keys,
            values=values,
            cross_mask=cross_mask,
            held=tuple((row.context, row.condition) for row in rows),
        )

    def _stack(self, conditions: Sequence[Projected]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor | None]:
        first = conditions[0]
        if not self._pad_to_buckets and all(c is first for c in conditions):
            count = len(conditions)
            return (
                tuple(k.to(self.dtype).expand(count, -1, -1, -1) for k in first.keys),
                tuple(v.to(self.dtype).expand(count, -1, -1, -1) for v in first.values),
                None,
            )
        width = max(c.tokens for c in conditions)
        if self._pad_to_buckets:
            width = -(-width // _CONDITION_BUCKET) * _CONDITION_BUCKET
        # One token ("no condition") is repeated instead of padded: equal keys give its value, and need no mask.
        lengths = [width if c.tokens == 1 else c.tokens for c in conditions]

        def stacked(parts: list[Tensor]) -> Tensor:
            shape = (len(parts), parts[0].shape[1], width, parts[0].shape[3])
            out = parts[0].new_zeros(shape, dtype=self.dtype)
            for i, part in enumerate(parts):
                out[i, :, : width if part.shape[2] == 1 else part.shape[2]] = part[0]
            return out

        layers = range(len(first.keys))
        return (
            tuple(stacked([c.keys[n] for c in conditions]) for n in layers),
            tuple(stacked([c.values[n] for c in conditions]) for n in layers),
            key_mask(lengths, width, self.device, self.dtype),
        )

    def _forward(self, latents: Tensor, times: Tensor, batch: _Batch, run_block: Any) -> Tensor:
        model = self.transformer
        # The model was trained with a second time input, (t - r), that is 0 in plain flow matching.
        temb_t, proj_t = self._embed_time(model.time_embed, times)
        temb_r, proj_r = self._embed_time(model.time_embed_r, torch.zeros_like(times))
        temb, proj = temb_t + temb_r, proj_t + proj_r

        states = model.proj_in_conv(torch.cat([batch.context, latents], dim=-1).transpose(1, 2)).transpose(1, 2)
        for block, kind, key, value in zip(model.layers, model.layer_types, batch.keys, batch.values, strict=True):
            window = batch.window if kind == "sliding_attention" else None
            states = run_block(block, states, proj, batch.rope, window, batch.full_mask, key, value, batch.cross_mask)

        shift, scale = (model.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
        states = (model.norm_out(states) * (1 + scale) + shift).type_as(states)
        velocity: Tensor = model.proj_out_conv(states.transpose(1, 2)).transpose(1, 2)
        return velocity

    def _block(
        self,
        block: Any,
        states: Tensor,
        proj: Tensor,
        rope: tuple[Tensor, Tensor],
        window: WindowLayout | None,
        full_mask: Tensor | None,
        key: Tensor,
        value: Tensor,
        cross_mask: Tensor | None,
    ) -> Tensor:
        """One layer; `window` makes it a sliding one."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (block.scale_shift_table + proj).chunk(6, dim=1)
        inner = (block.self_attn_norm(states) * (1 + scale) + shift).type_as(states)
        states = (states + self._self_attention(block.self_attn, inner, rope, window, full_mask) * gate).type_as(states)

        inner = block.cross_attn_norm(states).type_as(states)
        states = states + self._cross_attention(block.cross_attn, inner, key, value, cross_mask)

        inner = (block.mlp_norm(states) * (1 + mlp_scale) + mlp_shift).type_as(states)
        return (states + block.mlp(inner) * mlp_gate).type_as(states)

    def _embed_time(self, embed: Any, times: Tensor) -> tuple[Tensor, Tensor]:
        # As AceStepTimestepEmbedding.forward, with the time itself kept in float32.
        frequencies = embed.time_sinusoid(times * embed.scale).to(self.dtype)
        temb = embed.linear_2(embed.act1(embed.linear_1(frequencies)))
        return temb, embed.time_proj(embed.act2(temb)).unflatten(1, (6, -1))

    def _self_attention(
        self,
        attn: Any,
        states: Tensor,
        rope: tuple[Tensor, Tensor],
        window: WindowLayout | None,
        full_mask: Tensor | None,
    ) -> Tensor:
        q = attn.norm_q(attn.to_q(states).unflatten(-1, (attn.heads, attn.head_dim)))
        k = attn.norm_k(attn.to_k(states).unflatten(-1, (attn.kv_heads, attn.head_dim)))
        v = attn.to_v(states).unflatten(-1, (attn.kv_heads, attn.head_dim))
        q, k = (rotate(x, rope) for x in (q, k))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if window is not None:
            out = self.attention.sliding(q, k, v, window, padded=full_mask is not None)
        else:
            out = self.attention.full(q, k, v, full_mask)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))

    def _cross_attention(self, attn: Any, states: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        q = attn.norm_q(attn.to_q(states).unflatten(-1, (attn.heads, attn.head_dim))).transpose(1, 2)
        out = self.attention.full(q, key, value, mask)
        return attn.to_out[0](out.transpose(1, 2).flatten(2))


def compiled(function: Any) -> Any:
    """`function` compiled for each shape it meets: Dynamo would give up after 8."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 256)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, 1024)
    return torch.compile(function, dynamic=False)


def bucket(tokens: int, patch: int) -> int:
    """`tokens` rounded up to whole 10 s up to a minute, then to whole 30 s: 24 shapes for songs of up to 10 minutes."""
    second = 25 / patch
    step = 10 * second if tokens <= 60 * second else 30 * second
    return int(-(-tokens // step) * step)
