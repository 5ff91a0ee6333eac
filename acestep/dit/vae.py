"""Latents to PCM and back, tile by tile.

A decoded sample depends on at most 8.3 latent frames around it, so tiles that overlap by 9 give the same audio as one piece, and so
they do for encoding (6.9 frames). Memory then depends on the tile and not on the song.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from acestep.checkpoints.modules import AutoencoderOobleck
from acestep.dit.precision import in_float32
from acestep.dit.vae_layers import FoldedSnake, fold, snake
from acestep.errors import OutOfMemory
from acestep.hardware import host
from acestep.hardware.upload import Arriving, send
from acestep.sizing.activations import SMALLEST_CORE_FRAMES, decode_bytes, encode_bytes

log = logging.getLogger(__name__)

BytesNeeded = Callable[[dict[str, Any], int, str], int]  # bytes by configuration, frames and dtype

FIRST_CORE_FRAMES = 64  # 2.56 s: soon there for a listener


@dataclass(frozen=True)
class _Way:
    """Decoding or encoding: `compute` makes something of frames from one place to another, in the dtype it is told."""

    what: str
    need: BytesNeeded
    compute: Callable[[int, int, torch.dtype], Tensor]
    module: nn.Module
    to_host: bool = False


@dataclass(frozen=True, eq=False)
class _Tile:
    """What was made of frames `begin` to `end`, and whether all of it is finite; None where nobody asks."""

    begin: int
    end: int
    made: Arriving | Tensor
    sound: Arriving | None


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
        self._ahead = 1 if device.type == "cuda" else 0  # tiles that a card has before anybody waits for them
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
        latents = latents.to(self._device)

        def compute(begin: int, end: int, dtype: torch.dtype) -> Tensor:
            first, last = max(0, begin - self._overlap), min(len(latents), end + self._overlap)
            window = latents[first:last].T[None].to(self.dtype).to(dtype)
            decoded: Tensor = self.vae.decoder(window, left=begin - first, right=last - end)
            return decoded[0].float()

        way = _Way("decoding", decode_bytes, compute, self.vae.decoder, to_host=True)
        yield from self._tiles(way, len(latents), FIRST_CORE_FRAMES)

    def encode(self, audio: Tensor) -> Generator[None, None, Tensor]:
        """Latents `[frames, C]` of PCM `[2, n]`; yields after each tile. The mean of the posterior, so no seed is involved.

        PCM that ends within a frame is continued with silence.
        """
        frames = -(-audio.shape[1] // self.hop)
        audio = nn.functional.pad(audio, (0, frames * self.hop - audio.shape[1]))

        def compute(begin: int, end: int, dtype: torch.dtype) -> Tensor:
            first, last = max(0, begin - self._overlap), min(frames, end + self._overlap)
            window = send(audio[None, :, first * self.hop : last * self.hop], self._device).to(self.dtype).to(dtype)
            mean: Tensor = self.vae.encode(window).latent_dist.mode()
            return mean[0].T[begin - first : end - first].float()

        parts = []
        for _, part in self._tiles(_Way("encoding", encode_bytes, compute, self.vae.encoder), frames, self._tile):
            parts.append(part)
            yield
        return torch.cat(parts)

    def _tiles(self, way: _Way, frames: int, core: int) -> Iterator[tuple[int, Tensor]]:
        """What `way` makes of all frames, by the first frame of each tile. A card has the next tile before anybody waits for the last."""
        waiting: deque[_Tile] = deque()
        for tile in self._begun(way, frames, core):
            waiting.append(tile)
            if len(waiting) > self._ahead:
                yield from self._checked(way, waiting.popleft())
        for tile in waiting:
            yield from self._checked(way, tile)

    def _begun(self, way: _Way, frames: int, core: int) -> Iterator[_Tile]:
        begin, core = 0, min(core, self._core(way.need))
        while begin < frames:
            end = min(begin + core, frames)
            try:
                with torch.inference_mode():
                    made = way.compute(begin, end, self.dtype)
                    sound = Arriving(torch.isfinite(made).all()) if self.dtype != torch.float32 else None
                    tile = _Tile(begin, end, Arriving(made) if way.to_host else made, sound)
            except torch.OutOfMemoryError as error:
                core = self._shrink(end - begin, way.need, error)
                continue
            self.tiles += 1
            yield tile
            begin, core = end, self._core(way.need)

    def _checked(self, way: _Way, tile: _Tile) -> Iterator[tuple[int, Tensor]]:
        """A tile, computed once more with wider numbers where it overflowed in half precision."""
        if tile.sound is None or bool(tile.sound.wait()):
            yield tile.begin, tile.made.wait() if isinstance(tile.made, Arriving) else tile.made
            return
        log.warning("a VAE tile is not finite in %s; %s it again in float32", self.dtype, way.what)
        begin, core = tile.begin, tile.end - tile.begin
        while begin < tile.end:
            end = min(begin + core, tile.end)
            try:
                with torch.inference_mode(), in_float32(way.module):
                    made = way.compute(begin, end, torch.float32)
            except torch.OutOfMemoryError as error:
                core = self._shrink(end - begin, way.need, error)
                continue
            yield begin, made.cpu() if way.to_host else made
            begin = end

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
