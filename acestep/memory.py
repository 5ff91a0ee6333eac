"""The memory ledger."""

from __future__ import annotations

from acestep.weights import DTYPE_BYTES, Config

CONTEXT_BYTES = 512 << 20
TILES = (512, 256, 128, 64)


def decode_bytes(vae: Config, frames: int, dtype: str, *, batch: int = 1) -> int:
    """Peak activations of decoding `frames` latent frames of `batch` items at once."""
    hop = 1
    for ratio in vae["downsampling_ratios"]:
        hop *= ratio
    return int(4.6 * hop * vae["decoder_channels"] * DTYPE_BYTES[dtype] * frames * batch)
