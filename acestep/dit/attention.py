"""Attention of the DiT: key masks that make padding exact, and sliding windows that never hold S×S scores.

Shapes: queries `[B, H, S, D]`, keys and values `[B, H_kv, S_k, D]` with `H_kv` dividing `H`. Masks are additive, in the dtype of
the queries, and finite, because a row that may see nothing must not become NaN and leak into its neighbours' values.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from acestep.checkpoints.modules import AceStepAttnProcessor2_0, apply_rotary_emb
from acestep.hardware import onednn
from acestep.hardware.upload import upload
from acestep.stage_settings import AttentionBackend

log = logging.getLogger(__name__)

FLASH_REPOSITORY = "kernels-community/flash-attn2"
FLASH_VERSION = 4  # the line with builds for PyTorch 2.10 and newer; `kernels` loads nothing without being told one
_EAGER_QUERY_BLOCK = 512  # bounds the float32 scores of the eager kernel
_CPU_QUERY_BLOCK = 256  # likewise of the one of products: they stay in the caches
_FEW_SCORES = 1 << 17  # per head: below, its many small calls gain little


def masked_value(dtype: torch.dtype) -> float:
    # Half of the smallest number: adding a negative score to it must not overflow to -inf.
    return torch.finfo(dtype).min / 2


def key_mask(lengths: Sequence[int], width: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """Additive mask `[B, 1, 1, width]` that hides keys at and past each row's length; None where nothing is padded."""
    if all(length == width for length in lengths):
        return None
    valid = torch.arange(width, device=device) < upload(lengths, torch.long, device)[:, None]
    return additive(valid[:, None, None, :], dtype)


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, masked_value(dtype))


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths in one tensor, as sequences one after another: each row's tokens, then its padding, which sees itself alone.

    Attributes:
        starts: Of the sequences, and the end: int32 `[2 B + 1]`.
        width: Tokens of a row, padding included.
    """

    starts: Tensor
    width: int


def ragged(lengths: Sequence[int], width: int, device: torch.device) -> Ragged:
    starts = [at for row, length in enumerate(lengths) for at in (row * width, row * width + length)]
    return Ragged(upload([*starts, len(lengths) * width], torch.int32, device), width)


Hidden = Tensor | tuple[Ragged, Ragged] | None  # what keeps padding out: a mask, or where queries and keys lie


@dataclass(frozen=True)
class WindowLayout:
    """How the sliding layers of one batch are cut: queries in blocks of `block`, each seeing `window` more on both sides.

    `mask` is `[B or 1, 1, S, S]` where one block holds everything (`blocks` is 1), else `[B * blocks, 1, block, block + 2 *
    window]`; None where no key is hidden at all.
    """

    window: int
    block: int
    blocks: int
    mask: Tensor | None
    ragged: Ragged | None = None  # for a kernel that knows windows and lengths; then the rest is not needed


def window_layout(
    lengths: Sequence[int], width: int, window: int, device: torch.device, dtype: torch.dtype
) -> WindowLayout:
    """Layout for rows of `lengths` tokens padded to `width`, where token i sees tokens j with |i - j| <= window."""
    padded = any(length != width for length in lengths)
    block = 2 * window
    if width <= 2 * block:
        if width <= window + 1 and not padded:
            return WindowLayout(window, width, 1, None)
        at = torch.arange(width, device=device)
        allowed = ((at[:, None] - at[None, :]).abs() <= window)[None, None]
        if padded:
            allowed = allowed & (at < upload(lengths, torch.long, device)[:, None])[:, None, None, :]
        return WindowLayout(window, width, 1, additive(allowed, dtype))
    blocks = -(-width // block)
    query = torch.arange(block, device=device)
    key = torch.arange(block + 2 * window, device=device) - window
    band = (query[:, None] - key[None, :]).abs() <= window
    position = torch.arange(blocks, device=device)[:, None] * block + key[None, :]  # [blocks, keys]
    rows = upload(lengths if padded else [width], torch.long, device)
    inside = (position >= 0) & (position < rows[:, None, None])  # [B or 1, blocks, keys]
    allowed = band & inside[:, :, None, :]
    mask = additive(allowed, dtype).expand(len(lengths), -1, -1, -1)
    return WindowLayout(window, block, blocks, mask.reshape(-1, 1, *mask.shape[2:]))


class Attention:
    """The attention kernels of one replica.

    Args:
        backend: "flash" (flash-attn, half precision on CUDA), "sdpa" or "eager" (float32 softmax, for cards on which float16
            scores overflow). A backend that cannot run here falls back to "sdpa" with a warning.
        device, dtype: Where and in what the queries come.
    """

    def __init__(self, backend: AttentionBackend, device: torch.device, dtype: torch.dtype) -> None:
        self._flash = _load_flash(device, dtype) if backend == "flash" else None
        self.backend: AttentionBackend = "sdpa" if backend == "flash" and self._flash is None else backend
        self._kernel = eager_attention if backend == "eager" else _fused(device, dtype)
        self._varlen = None if backend == "eager" else _load_varlen(device, dtype)
        self._device, self._dtype = device, dtype

    def hidden(self, queries: tuple[Sequence[int], int], keys: tuple[Sequence[int], int]) -> Hidden:
        """What `full` needs for rows of such lengths and widths; None where no key is padding."""
        lengths, width = keys
        if self._varlen is None or all(length == width for length in lengths):
            return key_mask(lengths, width, self._device, self._dtype)
        return ragged(*queries, self._device), ragged(*keys, self._device)

    def windows(self, lengths: Sequence[int], width: int, window: int) -> WindowLayout:
        """What `sliding` needs; see `window_layout`."""
        padded = any(length != width for length in lengths)
        if self._varlen is None or (self._flash is not None and not padded):
            return window_layout(lengths, width, window, self._device, self._dtype)
        return WindowLayout(window, width, 1, None, ragged(lengths, width, self._device))

    def full(self, q: Tensor, k: Tensor, v: Tensor, hidden: Hidden) -> Tensor:
        """Every query sees every key of its row that is not `hidden`."""
        if isinstance(hidden, tuple):
            assert self._varlen is not None
            return run_varlen(self._varlen, q, k, v, *hidden)
        if self._flash is not None and hidden is None:
            return self._run_flash(q, k, v, (-1, -1))
        return self._kernel(q, k, v, hidden)

    def sliding(self, q: Tensor, k: Tensor, v: Tensor, layout: WindowLayout, padded: bool) -> Tensor:
        """Queries see keys within the layout's window. Memory grows with S, not with S²."""
        if layout.ragged is not None:
            assert self._varlen is not None
            return run_varlen(self._varlen, q, k, v, layout.ragged, layout.ragged, layout.window)
        if self._flash is not None and not padded:
            return self._run_flash(q, k, v, (layout.window, layout.window))
        if layout.blocks == 1:
            return self._kernel(q, k, v, layout.mask)
        batch, heads, width, dim = q.shape
        fill = layout.blocks * layout.block - width
        span = layout.block + 2 * layout.window
        sides = (0, 0, layout.window, layout.window + fill)
        blocks = F.pad(q, (0, 0, 0, fill)).view(batch, heads, layout.blocks, layout.block, dim)
        keys, values = (F.pad(x, sides).unfold(2, span, layout.block).transpose(-1, -2) for x in (k, v))
        rows = [x.transpose(1, 2).flatten(0, 1) for x in (blocks, keys, values)]
        out = self._kernel(rows[0], rows[1], rows[2], layout.mask)
        out = out.view(batch, layout.blocks, heads, layout.block, dim).transpose(1, 2)
        return out.reshape(batch, heads, -1, dim)[:, :, :width]

    def _run_flash(self, q: Tensor, k: Tensor, v: Tensor, window: tuple[int, int]) -> Tensor:
        assert self._flash is not None
        try:
            out = self._flash(*(x.transpose(1, 2) for x in (q, k, v)), window_size=window)
            return out.transpose(1, 2)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError) as error:
            log.warning("flash attention failed (%s); continuing with PyTorch's attention", error)
            self._flash, self.backend = None, "sdpa"
            if window == (-1, -1):
                return self._kernel(q, k, v, None)
            width = q.shape[2]
            layout = window_layout([width] * q.shape[0], width, window[0], q.device, q.dtype)
            return self.sliding(q, k, v, layout, padded=False)


def run_varlen(
    varlen: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, queries: Ragged, keys: Ragged, window: int = -1
) -> Tensor:
    """Attention within each of the sequences, by a function like `torch.nn.attention.varlen.varlen_attn`; nothing is packed or copied."""
    q_rows, k_rows, v_rows = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    out: Tensor = varlen(
        q_rows, k_rows, v_rows, queries.starts, keys.starts, queries.width, keys.width,
        window_size=(window, window), enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    return out.view(q.shape[0], q.shape[2], *q.shape[1::2]).transpose(1, 2)


@functools.cache
def _load_varlen(device: torch.device, dtype: torch.dtype) -> Callable[..., Any] | None:
    """PyTorch's flash attention over sequences of any lengths, where this very card gives with it what it gives with masks."""
    capability = _capability(device)
    if capability is None or capability < (8, 0) or dtype not in (torch.float16, torch.bfloat16):
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn

        agrees = varlen_agrees(varlen_attn, device, dtype)
    except Exception as error:  # a build without it, an unknown card: masks do the same, only slower
        log.warning(
            "flash attention of rows of different lengths does not run on %s (%s): masks are used", device, error
        )
        return None
    if not agrees:
        log.warning("flash attention of rows of different lengths gives other numbers on %s: masks are used", device)
        return None
    return varlen_attn


@torch.inference_mode()
def varlen_agrees(varlen: Callable[..., Any], device: torch.device, dtype: torch.dtype) -> bool:
    """Whether it gives what masks give, for whole rows, windows, and keys of other lengths."""
    lengths, width, condition, tokens, window = (70, 300, 1), 300, (9, 40, 17), 40, 100
    generator = torch.Generator().manual_seed(0)

    def random(heads: int, count: int) -> Tensor:
        return torch.randn((len(lengths), heads, count, 128), generator=generator).to(device, dtype)

    q, k, v = random(4, width), random(2, width), random(2, width)
    rows = ragged(lengths, width, device)
    for keys, values, there, reach, mask in (
        (k, v, rows, -1, key_mask(lengths, width, device, dtype)),
        (k, v, rows, window, window_layout(lengths, width, window, device, dtype)),
        (random(2, tokens), random(2, tokens), ragged(condition, tokens, device), -1, key_mask(condition, tokens, device, dtype)),
    ):  # fmt: skip
        mask = mask.mask if isinstance(mask, WindowLayout) else mask
        got, want = run_varlen(varlen, q, keys, values, rows, there, reach), sdpa_attention(q, keys, values, mask)
        for row, length in enumerate(lengths):
            if not torch.allclose(got[row, :, :length].float(), want[row, :, :length].float(), atol=2e-2):
                return False
    return True


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """PyTorch's fused attention. Keys and values are repeated for grouped heads where no fused kernel groups them itself."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and not (mask is None and groups_heads(q.device.type, q.dtype, _capability(q.device))):
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        groups = 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=groups > 1)


def groups_heads(device: str, dtype: torch.dtype, capability: tuple[int, int] | None) -> bool:
    """Whether a fused kernel of PyTorch takes fewer heads of keys than of queries; any other would fall back to the one that holds all
    scores in float32.

    On NVIDIA cards that is flash attention, for half precision from compute capability 8.0 on; the memory-efficient kernel of older
    ones groups none.

    Args:
        capability: Of an NVIDIA card; None for all else.
    """
    if device == "cpu":
        return True
    return capability is not None and capability >= (8, 0) and dtype in (torch.float16, torch.bfloat16)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int] | None:
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def _fused(device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """What is fastest on `device`, with scores in its own precision."""
    return product_attention if device.type == "cpu" and dtype == torch.float32 and onednn.faster() else sdpa_attention


def product_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of matrix products for float32 on CPUs whose instructions PyTorch's fused kernel leaves unused.

    The heads that share a key head are one product. Scores are held for one block of queries and one key head at a time.
    """
    if q.shape[2] * k.shape[2] < _FEW_SCORES:
        return sdpa_attention(q, k, v, mask)
    batch, heads, width, dim = q.shape
    groups = heads // k.shape[1]
    out = q.new_empty(batch, width, heads, dim)
    for b in range(batch):
        hidden = None if mask is None else mask[min(b, len(mask) - 1), 0]
        for head in range(k.shape[1]):
            own = slice(head * groups, (head + 1) * groups)
            keys, values = k[b, head].contiguous(), v[b, head].T.contiguous()
            for start in range(0, width, _CPU_QUERY_BLOCK):
                part = slice(start, start + _CPU_QUERY_BLOCK)
                queries = (q[b, own, part] * dim**-0.5).flatten(0, 1)
                scores = onednn.linear(queries, keys).view(groups, -1, len(keys))
                if hidden is not None:
                    scores += hidden if len(hidden) == 1 else hidden[part]
                seen = onednn.linear(scores.softmax(dim=-1).flatten(0, 1), values)
                out[b, part, own] = seen.view(groups, -1, dim).transpose(0, 1)
    return out.transpose(1, 2)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Plain attention with scores and softmax in float32, a block of queries at a time."""
    groups = q.shape[1] // k.shape[1]
    k = k.repeat_interleave(groups, dim=1).float()
    v = v.repeat_interleave(groups, dim=1).float()
    scale = q.shape[-1] ** -0.5
    out = []
    for start in range(0, q.shape[2], _EAGER_QUERY_BLOCK):
        part = slice(start, start + _EAGER_QUERY_BLOCK)
        scores = (q[:, :, part].float() * scale) @ k.transpose(-1, -2)
        if mask is not None:
            scores = scores + (mask if mask.shape[-2] == 1 else mask[..., part, :]).float()
        out.append((scores.softmax(dim=-1) @ v).to(q.dtype))
    return torch.cat(out, dim=2)


class EncoderProcessor(AceStepAttnProcessor2_0):
    """For diffusers' own attention modules (condition encoder, tokenizer, detokenizer), which here never see padding.

    The sliding layers get blocks in place of a mask over all pairs, so that scores are never held whole.
    """

    # What makes diffusers build no masks: windows are the kernel's business here, too.
    _attention_backend: Any = "flash"

    def __init__(self, attention: Attention) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._attention = attention

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        q = attn.norm_q(attn.to_q(hidden_states).unflatten(-1, (attn.heads, attn.head_dim)))
        k = attn.norm_k(attn.to_k(hidden_states).unflatten(-1, (attn.kv_heads, attn.head_dim)))
        v = attn.to_v(hidden_states).unflatten(-1, (attn.kv_heads, attn.head_dim))
        if image_rotary_emb is not None:
            q, k = (rotate(x, image_rotary_emb) for x in (q, k))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        rows, width, window = q.shape[0], q.shape[2], attn.sliding_window
        if window is None or width <= window + 1:
            out = self._attention.full(q, k, v, None)
        else:
            layout = window_layout([width] * rows, width, window, q.device, q.dtype)
            out = self._attention.sliding(q, k, v, layout, padded=False)
        projected: Tensor = attn.to_out[0](out.transpose(1, 2).flatten(2))
        return projected


def rotate(states: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotary embedding of `[B, S, H, D]` in Qwen3's layout, where the two halves of D pair up."""
    freqs: Any = rope
    rotated: Any = apply_rotary_emb(states, freqs, use_real=True, use_real_unbind_dim=-2, sequence_dim=1)
    return rotated


def _load_flash(device: torch.device, dtype: torch.dtype) -> Callable[..., Any] | None:
    """`flash_attn_func` of an installed flash-attn, or of the pre-fetched `kernels` build of it; None with a warning."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        log.warning(
            "flash attention needs CUDA and half precision, not %s in %s; using PyTorch's attention", device, dtype
        )
        return None
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < (8, 0):
        log.warning("flash attention needs compute capability 8.0, this card has %d.%d; using PyTorch's", *capability)
        return None
    try:
        from flash_attn import flash_attn_func

        return flash_attn_func
    except ImportError:
        pass
    try:
        from kernels import get_kernel

        return get_kernel(FLASH_REPOSITORY, version=FLASH_VERSION).flash_attn_func
    except Exception as error:  # absent package, no network, no build for this torch: all mean the same to the caller
        log.warning("flash attention is not installed (%s); using PyTorch's attention", error)
        return None
