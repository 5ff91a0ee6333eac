"""One evaluation of the DiT for rows that share nothing but the weights.

Works on diffusers' `AceStepTransformer1DModel` as it is loaded, but calls its blocks itself: every row has its own length, time,
prompt and context, padding is hidden by key masks, keys and values of the conditions are projected once per song instead of
once per step, and no S×S mask is ever built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from acestep.adapters.cache import ActiveLora
from acestep.adapters.hooks import AdapterHooks
from acestep.checkpoints.modules import AceStepTransformer1DModel, rotary_freqs
from acestep.dit.attention import Attention, Hidden, WindowLayout
from acestep.dit.attention_maps import AttentionMaps, Listener
from acestep.dit.layer import Layer, compiled_layer
from acestep.hardware.upload import upload
from acestep.stage_settings import AttentionBackend

_KEPT_BATCHES = 2  # the one at work and the one it took over from
_WARM_FRAMES = 274  # 137 tokens: no other dimension of a model is as long, so that none is taken for this one


@dataclass(frozen=True, eq=False)
class Projected:
    """Cross-attention keys and values of one condition, per layer `[1, H_kv, E, D]`, and what they were made of, `[E, width]`."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    condition: Tensor

    @property
    def tokens(self) -> int:
        return int(self.keys[0].shape[2])


@dataclass(frozen=True, eq=False)
class Row:
    """One evaluation: latents `x` `[L, C]` in float32 at time `t`, with `context` `[L, 2C]` and a projected condition.

    `lora` changes this row alone; the condition must have been projected with the same. A `listener` asks for maps of attention
    instead of the velocity.
    """

    x: Tensor
    t: float
    context: Tensor
    condition: Projected
    lora: ActiveLora | None = None
    listener: Listener | None = None


@dataclass(frozen=True, eq=False)
class _Batch:
    """What stays the same from step to step for one composition of rows."""

    frames: tuple[int, ...]
    width: int  # tokens, padding included
    context: Tensor
    rope: tuple[Tensor, Tensor]
    hidden: Hidden
    window: WindowLayout
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    hidden_condition: Hidden
    held: tuple[object, ...]  # keeps the ids of the cache key from being reused


class Denoiser:
    """Velocities of the DiT.

    Args:
        transformer: Loaded and on `device`.
        device, dtype: Where and in what to compute. Latents come and go as float32.
        backend: Attention kernel.
        compile: Fuse the layer that the model repeats with `torch.compile`; `warm_up` does it ahead of the first song.
    """

    def __init__(
        self,
        transformer: AceStepTransformer1DModel,
        device: torch.device,
        dtype: torch.dtype,
        backend: AttentionBackend = "sdpa",
        compile: bool = False,
    ) -> None:
        self.transformer: Any = transformer  # its submodules are untyped
        self._adapters = AdapterHooks(transformer)
        self.device = device
        self.dtype = dtype
        self._backend = backend
        self.attention = Attention(backend, device, dtype)
        self.patch = int(self.transformer.patch_size)
        config: Any = transformer.config
        self._window = int(config.sliding_window)
        self._own_dtype = dtype
        self._layer = compiled_layer() if compile else Layer()
        self._batches: dict[tuple[Any, ...], _Batch] = {}

    def forget(self) -> None:
        """Drop what is kept between steps, to give its memory back."""
        self._batches.clear()
        self._adapters.forget()

    def warm_up(self) -> None:
        """Compile now what songs would wait for later. Raises whatever the compiler does."""
        channels = int(self.transformer.config.audio_acoustic_hidden_dim)
        with torch.inference_mode():
            x = torch.zeros((_WARM_FRAMES, channels), device=self.device)
            context = torch.zeros((_WARM_FRAMES, 2 * channels), device=self.device)
            tokens = torch.zeros((1, self.transformer.condition_embedder.in_features), device=self.device)
        row = Row(x, 1.0, context, self.project(tokens))
        for rows in (1, 2):
            self.velocity([row] * rows)
        self.forget()

    def run_uncompiled(self) -> None:
        self._layer = Layer()
        self.forget()

    def set_precision(self, dtype: torch.dtype) -> None:
        """Convert the weights. Half to float32 and back loses nothing. Where memory runs out, they are left as they were."""
        if dtype == self.dtype:
            return
        self.forget()
        try:
            nn.Module.to(self.transformer, dtype)  # diffusers' own `to` warns about every conversion
        except torch.OutOfMemoryError:
            nn.Module.to(self.transformer, self.dtype)
            raise
        self.dtype = dtype
        self.attention = Attention(self._backend, self.device, dtype)

    @torch.inference_mode()
    def project(self, tokens: Tensor, lora: ActiveLora | None = None) -> Projected:
        """Keys and values of a condition `[E, width of the condition encoder]`, for all layers."""
        with self._adapters.applied([lora]):
            return self._project(tokens)

    def _project(self, tokens: Tensor) -> Projected:
        states = self.transformer.condition_embedder(tokens[None].to(self.device, self.dtype))
        keys, values = [], []
        for block in self.transformer.layers:
            attn = block.cross_attn
            shape = (attn.kv_heads, attn.head_dim)
            keys.append(attn.norm_k(attn.to_k(states).unflatten(-1, shape)).transpose(1, 2))
            values.append(attn.to_v(states).unflatten(-1, shape).transpose(1, 2))
        return Projected(tuple(keys), tuple(values), tokens)

    @torch.inference_mode()
    def velocity(self, rows: Sequence[Row]) -> list[Tensor]:
        """Velocity `[L, C]` of each row, or its maps as `AttentionMaps` has them; float32, the same whatever other rows are there."""
        batch = self._batch_of(rows)
        latents = batch.context.new_zeros((len(rows), batch.context.shape[1], rows[0].x.shape[1]))
        for i, row in enumerate(rows):
            latents[i, : len(row.x)] = row.x
        times = upload([row.t for row in rows], torch.float32, self.device)
        loras = [row.lora for row in rows]
        # The hooks of an adapter, or another precision, would each compile all over again.
        layer = Layer() if any(loras) or self.dtype != self._own_dtype else self._layer
        maps = {
            i: AttentionMaps(row.listener, -(-len(row.x) // self.patch), row.condition.tokens)
            for i, row in enumerate(rows)
            if row.listener is not None
        }
        # Where all rows only listen, what comes after the last layer that they listen to is left out.
        asked = [row.listener.layers if row.listener else len(self.transformer.layers) for row in rows]
        with self._adapters.applied(loras):
            out = self._forward(latents, times, batch, layer, max(asked), maps)
        return [maps[i].result() if i in maps else out[i, :frames].float() for i, frames in enumerate(batch.frames)]

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
        context = torch.zeros(
            (len(rows), width * self.patch, rows[0].context.shape[1]), dtype=self.dtype, device=self.device
        )
        for i, row in enumerate(rows):
            context[i, : frames[i]] = row.context
        keys, values, condition = self._stack([row.condition for row in rows])
        theta = self.transformer.rope_theta
        return _Batch(
            frames=frames,
            width=width,
            context=context,
            rope=rotary_freqs(width, self.transformer.head_dim, theta, self.device, self.dtype),
            hidden=self.attention.hidden((tokens, width), (tokens, width)),
            window=self.attention.windows(tokens, width, self._window),
            keys=keys,
            values=values,
            hidden_condition=self.attention.hidden((tokens, width), (condition, max(condition))),
            held=tuple((row.context, row.condition) for row in rows),
        )

    def _stack(self, conditions: Sequence[Projected]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], list[int]]:
        """Keys and values by layer, as wide as the longest condition, and how many of each row's count."""
        first = conditions[0]
        if all(c is first for c in conditions):
            count = len(conditions)
            return (
                tuple(k.to(self.dtype).expand(count, -1, -1, -1) for k in first.keys),
                tuple(v.to(self.dtype).expand(count, -1, -1, -1) for v in first.values),
                [first.tokens] * count,
            )
        width = max(c.tokens for c in conditions)
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
            lengths,
        )

    def _forward(
        self,
        latents: Tensor,
        times: Tensor,
        batch: _Batch,
        layer: Layer,
        layers: int,
        maps: Mapping[int, AttentionMaps],
    ) -> Tensor:
        model = self.transformer
        # The model was trained with a second time input, (t - r), that is 0 in plain flow matching.
        temb_t, proj_t = self._embed_time(model.time_embed, times)
        temb_r, proj_r = self._embed_time(model.time_embed_r, torch.zeros_like(times))
        temb, proj = temb_t + temb_r, proj_t + proj_r

        states = model.proj_in_conv(torch.cat([batch.context, latents], dim=-1).transpose(1, 2)).transpose(1, 2)
        states = states.contiguous()
        for index, (block, kind) in enumerate(zip(model.layers[:layers], model.layer_types[:layers], strict=True)):
            states = self._block(layer, block, kind, states, proj, batch, index, maps)

        shift, scale = (model.scale_shift_table + temb.unsqueeze(1)).chunk(2, dim=1)
        states = (model.norm_out(states) * (1 + scale) + shift).type_as(states)
        velocity: Tensor = model.proj_out_conv(states.transpose(1, 2)).transpose(1, 2)
        return velocity

    def _block(
        self, layer: Layer, block: Any, kind: str, states: Tensor, proj: Tensor, batch: _Batch, index: int,
        maps: Mapping[int, AttentionMaps],
    ) -> Tensor:  # fmt: skip
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (block.scale_shift_table + proj).chunk(6, dim=1)
        attended = self._self_attention(kind, *layer.before(block, states, shift, scale, *batch.rope), batch)
        states, q = layer.between(block, states, gate, attended)
        attended = _joined(self.attention.full(q, batch.keys[index], batch.values[index], batch.hidden_condition))
        for row, seen in maps.items():
            seen.take(index, q[row], batch.keys[index][row])
        del q  # the feed-forward part is where memory peaks
        return layer.after(block, states, mlp_shift, mlp_scale, mlp_gate, attended)

    def _self_attention(self, kind: str, q: Tensor, k: Tensor, v: Tensor, batch: _Batch) -> Tensor:
        if kind == "sliding_attention":
            return _joined(self.attention.sliding(q, k, v, batch.window, padded=batch.hidden is not None))
        return _joined(self.attention.full(q, k, v, batch.hidden))

    def _embed_time(self, embed: Any, times: Tensor) -> tuple[Tensor, Tensor]:
        # As AceStepTimestepEmbedding.forward, with the time itself kept in float32.
        frequencies = embed.time_sinusoid(times * embed.scale).to(self.dtype)
        temb = embed.linear_2(embed.act1(embed.linear_1(frequencies)))
        return temb, embed.time_proj(embed.act2(temb)).unflatten(1, (6, -1))


def _joined(heads: Tensor) -> Tensor:
    """`[B, H, S, D]` as `[B, S, H * D]`, contiguous whatever the kernel returned."""
    return heads.transpose(1, 2).flatten(2).contiguous()
