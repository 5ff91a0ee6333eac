"""Latents to PCM and back, tile by tile.

A decoded sample depends on at most 8.3 latent frames around it, so tiles that overlap by 9 give the same audio as one piece, and so
they do for encoding (6.9 frames). Memory then depends on the tile and not on the song.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from acestep.checkpoints.modules import AutoencoderOobleck
from acestep.dit.precision import in_float32
from acestep.dit.vae_layers import FoldedSnake, fold, snake
from acestep.errors import OutOfMemory
from acestep.hardware import host
from acestep.sizing.activations import SMALLEST_CORE_FRAMES, decode_bytes, encode_bytes

log = logging.getLogger(__name__)

BytesNeeded = Callable[[dict[str, Any], int, str], int]  # bytes by configuration, frames and dtype

FIRST_CORE_FRAMES = 64  # 2.56 s: soon there for a listener


class Vae:
    """Tiled decoding and encoding.

    Args:
        vae: Loaded; its layers are replaced in place by equal, cheaper ones.
        tile: Frames per tile, overlap included.
        overlap: Frames on each side that only give context.
        compile: Fuse the activations, which move most of the memory, with `torch.compile`; `warm_up` does it ahead of the first song.
    """

    def __init__(
        self, vae: AutoencoderOobleck, device: torch.device, tile: int = 256, overlap: int = 9, compile: bool = False
    ) -> None:
        self.vae = vae
        self.hop = int(vae.hop_length)
        self._config: dict[str, Any] = dict(vae.config)
        self._device = device
        self._tile = tile
        self._overlap = overlap
        fold(vae, device)
        self._activate_with(torch.compile(snake, dynamic=True) if compile else snake)
        self.tiles = 0

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = next(self.vae.decoder.parameters()).dtype
        return dtype

    def warm_up(self) -> None:
        """Compile now what songs would wait for later. Raises whatever the compiler does."""
        with torch.inference_mode():
            self.vae.decoder(
                torch.zeros(1, int(self._config["decoder_input_channels"]), 3, device=self._device, dtype=self.dtype)
            )

    def run_uncompiled(self) -> None:
        self._activate_with(snake)

    def _activate_with(self, function: Callable[..., Tensor]) -> None:
        for module in self.vae.modules():
            if isinstance(module, FoldedSnake):
                module.function = function

    def decode(self, latents: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Pieces of PCM (first frame, float32 `[2, n]` on the CPU) of latents `[L, C]`, in order."""
        frames = len(latents)
        begin, core = 0, min(FIRST_CORE_FRAMES, self._core(decode_bytes))
        while begin < frames:
            end = min(begin + core, frames)
            try:
                piece = self._decode_window(latents, begin, end)
            except torch.OutOfMemoryError as error:
                core = self._shrink(end - begin, decode_bytes, error)
                continue
            self.tiles += 1
            yield begin, piece
            begin, core = end, self._core(decode_bytes)

    @torch.inference_mode()
    def _decode_window(self, latents: Tensor, begin: int, end: int) -> Tensor:
        first, last = max(0, begin - self._overlap), min(len(latents), end + self._overlap)
        window = latents[first:last].T[None].to(self._device, self.dtype)
        decode = partial(self.vae.decoder, left=begin - first, right=last - end)
        return self._finite("decoding", decode, window, self.vae.decoder)[0].float().cpu()

    def _finite(self, what: str, compute: Callable[[Tensor], Tensor], window: Tensor, module: nn.Module) -> Tensor:
        """`compute(window)`, and once more with wider numbers where it overflowed in half precision."""
        result = compute(window)
        if self.dtype == torch.float32 or bool(torch.isfinite(result).all()):
            return result
        log.warning("a VAE tile is not finite in %s; %s it again in float32", self.dtype, what)
        with in_float32(module):
            return compute(window.float())

    def encode(self, audio: Tensor) -> Generator[None, None, Tensor]:
        """Latents `[frames, C]` of PCM `[2, n]`; yields after each tile. The mean of the posterior, so no seed is involved.

        PCM that ends within a frame is continued with silence.
        """
        frames = -(-audio.shape[1] // self.hop)
        audio = nn.functional.pad(audio, (0, frames * self.hop - audio.shape[1]))
        parts, begin, core = [], 0, self._core(encode_bytes)
        while begin < frames:
            end = min(begin + core, frames)
            try:
                parts.append(self._encode_window(audio, begin, end, frames))
            except torch.OutOfMemoryError as error:
                core = self._shrink(end - begin, encode_bytes, error)
                continue
            self.tiles += 1
            begin = end
            yield
        return torch.cat(parts)

    @torch.inference_mode()
    def _encode_window(self, audio: Tensor, begin: int, end: int, frames: int) -> Tensor:
        first, last = max(0, begin - self._overlap), min(frames, end + self._overlap)
        window = audio[None, :, first * self.hop : last * self.hop].to(self._device, self.dtype)
        mean = self._finite("encoding", self._mean, window, self.vae.encoder)[0].T
        return mean[begin - first : end - first].float()

    def _mean(self, window: Tensor) -> Tensor:
        mean: Tensor = self.vae.encode(window).latent_dist.mode()
        return mean

    def _core(self, need: BytesNeeded) -> int:
        """Frames of the next tile without its overlap."""
        return max(self._fitting_tile(need) - 2 * self._overlap, SMALLEST_CORE_FRAMES)

    def _fitting_tile(self, need: BytesNeeded) -> int:
        """The tile as set, or what of it fits into the memory that is free now."""
        if self._device.type != "cuda":
            return self._tile
        return min(self._tile, int(0.8 * self._free() / need(self._config, 1, self._dtype_name)))

    def _shrink(self, core: int, need: BytesNeeded, error: BaseException) -> int:
        """Half of a core that did not fit, for this tile and all that follow; gives up below the smallest."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if core <= SMALLEST_CORE_FRAMES:
            needed, free = need(self._config, core + 2 * self._overlap, self._dtype_name), self._free()
            raise OutOfMemory(
                f"a VAE tile of {core} frames does not fit: about {needed >> 20} MiB needed, {free >> 20} MiB free. Use a card "
                "with more memory or offload.",
                needed_bytes=needed, free_bytes=free,
            ) from error  # fmt: skip
        smaller = max(core // 2, SMALLEST_CORE_FRAMES)
        log.warning("a VAE tile of %d frames did not fit; from now on they have at most %d", core, smaller)
        self._tile = min(self._tile, smaller + 2 * self._overlap)
        return smaller

    def _free(self) -> int:
        if self._device.type != "cuda":
            return host.memory()[1]
        free, _ = torch.cuda.mem_get_info(self._device)
        return free + torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)

    @property
    def _dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")
