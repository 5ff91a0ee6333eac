"""What a stage is told about the machine it runs on. `acestep.settings` chooses it, with reasons; both stages only read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

AttentionBackend = Literal["flash", "sdpa", "eager"]


@dataclass(frozen=True)
class PlannerSettings:
    """Settings of one planner (LM) replica. Sizes in bytes, lengths in tokens."""

    device: str = "cpu"
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: AttentionBackend = "sdpa"
    threads: int | None = None  # CPU threads; None keeps torch's own
    slots: int = 16  # rows in flight; a CFG pair takes two
    max_len: int = 8_192  # prompt + metadata + codes of one row
    memory_bytes: int | None = None  # what weights and KV may take; None: all that is free
    compile: bool = False  # CUDA graphs / torch.compile per bucket


@dataclass(frozen=True)
class RendererSettings:
    """Settings of one renderer (DiT + VAE) replica. Sizes in bytes, lengths in latent frames (25 per second)."""

    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: AttentionBackend = "sdpa"
    threads: int | None = None
    offload: Literal["none", "stage"] = "none"  # stage: text encoder, conditions and VAE wait in host memory
    offload_dit: bool = False  # the DiT too, outside its own stage
    int8: bool = False
    compile: bool = False
    vae_model: str = "official"
    vae_tile_frames: int = 256
    vae_overlap_frames: int = 9  # the decoder sees ±8.3 frames: 9 is exact
    max_batch_frames: int | None = None  # frames that may share a step; None: from the cost profile
    memory_bytes: int | None = None
