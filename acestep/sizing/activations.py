"""Peak bytes of the tensors that are alive while a stage works, from configurations alone: no torch.

The factors count the live tensors of acestep/dit and acestep/lm at their widest point and are checked against real allocations in
tests/sizing/test_ledger.py. They are upper bounds, not averages.
"""

from __future__ import annotations

import math

from acestep.sizing.weights import DTYPE_BYTES, Config

CONTEXT_BYTES = 512 << 20  # a CUDA context with its libraries
TILES = (512, 256, 128, 64)  # frames per VAE tile, largest first
SMALLEST_CORE_FRAMES = 16  # of a VAE tile without its overlap
SILENT_REFERENCE_FRAMES = 750
CODED_FRAMES = 2_500  # latent frames that are turned into codes, or made of them, at once
# Live copies of the widest activation, one of them the reordered input that convolution libraries make.
_DECODE_WIDTHS = 6.0
_ENCODE_WIDTHS = 6.5
_LEAST_CHANNELS = 8  # convolution libraries pad narrower activations
_EAGER_BLOCK = 512  # queries whose float32 scores the eager kernel holds at once
_CPU_BLOCK = 256  # likewise that of products


def _hop(vae: Config) -> int:
    return math.prod(vae["downsampling_ratios"])


def decode_bytes(vae: Config, frames: int, dtype: str) -> int:
    """Decoding one VAE tile of `frames` latent frames."""
    return int(_DECODE_WIDTHS * _hop(vae) * max(vae["decoder_channels"], _LEAST_CHANNELS) * DTYPE_BYTES[dtype] * frames)


def encode_bytes(vae: Config, frames: int, dtype: str) -> int:
    """Encoding one tile of audio that is `frames` latent frames long."""
    return int(
        _ENCODE_WIDTHS * _hop(vae) * max(vae["encoder_hidden_size"], _LEAST_CHANNELS) * DTYPE_BYTES[dtype] * frames
    )


def item_bytes(dit: Config, frames: int, dtype: str) -> int:
    """What an item keeps from step to step: latents, noise and guidance state in float32, and its context channels."""
    channels = dit["audio_acoustic_hidden_dim"]
    return int(frames * channels * (6 * 4 + 6 * DTYPE_BYTES[dtype]))


def denoise_bytes(dit: Config, frames: int, rows: int, condition_tokens: int, dtype: str, attention: str) -> int:
    """One evaluation of the DiT.

    Args:
        frames: Latent frames of the longest row.
        rows: Rows evaluated together; guidance makes two of an item.
        condition_tokens: Tokens of text, lyrics and timbre per row.
    """
    size, width = DTYPE_BYTES[dtype], dit["hidden_size"]
    heads = dit["num_attention_heads"] * dit["head_dim"]
    kv = dit["num_key_value_heads"] * dit["head_dim"]
    window = dit.get("sliding_window", 128)
    tokens = -(-frames // dit.get("patch_size", 2))
    # Widest points of a block, per token: the gated MLP, and attention with its inputs, their padded and unfolded copies, the
    # repeated heads and the output.
    mlp = 3 * width + 3 * dit["intermediate_size"]
    attended = 3 * width + (3 * heads + 2 * kv if attention == "flash" else 8 * heads + 8 * kv)
    masks = 0 if attention == "flash" else 4 * window * (size + 3)
    per_token = max(mlp, attended) * size + masks
    scores = 0
    if attention == "eager":
        scores = rows * dit["num_attention_heads"] * min(tokens, _EAGER_BLOCK) * tokens * 4 * 2
        per_token += 3 * heads * 4  # float32 copies of keys, values and output
    projected = 2 * dit["num_hidden_layers"] * kv * size * condition_tokens
    conditions = projected * (1 + rows)  # of the songs themselves, and stacked where rows differ
    return int(rows * tokens * per_token + scores + conditions)


def product_scores_bytes(config: Config, tokens: int) -> int:
    """What the CPU's attention of matrix products holds beyond the fused one: scores of one block and key head, before and after softmax."""
    groups = config["num_attention_heads"] // config["num_key_value_heads"]
    return 2 * groups * _CPU_BLOCK * tokens * 4


def conditions_bytes(encoder: Config, text: Config, frames: int, lyric_tokens: int, references: int, dtype: str) -> int:
    """Encoding lyrics, timbre and codes of one item.

    Args:
        frames: Latent frames whose 5 Hz codes are turned into latents; 0 where there are none.
        references: Reference recordings of 30 s; none still means one of silence.
        dtype: Of the activations, which is float32 for weights in float16.
    """
    size, width = DTYPE_BYTES[dtype], encoder["hidden_size"]
    heads = encoder["num_attention_heads"] * encoder["head_dim"]
    per_token = (6 * width + 3 * encoder["intermediate_size"] + 4 * heads) * size
    timbre = max(1, references) * (SILENT_REFERENCE_FRAMES + 1)
    caption = 256 * (6 * text["hidden_size"] + 3 * text["intermediate_size"]) * size
    # The windows of the sliding layers: keys and values three times over, and a mask per block.
    window = encoder.get("sliding_window", 128)
    windows = max(lyric_tokens, timbre) * (4 * heads * size + 2 * window * (size + 3))
    # One layer's weights in float32, where those in float16 are computed so.
    widened = width * encoder["intermediate_size"] * 4 if dtype == "float32" else 0
    kept = frames * encoder.get("timbre_hidden_dim", 64) * size * 3
    return int(max(min(frames, CODED_FRAMES), lyric_tokens, timbre) * per_token + windows + widened + kept + caption)
