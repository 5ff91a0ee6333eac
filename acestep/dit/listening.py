"""What the DiT's cross-attention sees of the lyrics: one more evaluation of a finished song, of which only attention is kept.

A few heads of ACE-Step's DiT follow the lyrics while it renders them. Which ones is known by checkpoint
(`VariantDefaults.lyric_heads`). Formulas: Whisper's alignment, as ACE-Step 1.5 applies it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from acestep.dit.attention_maps import Listener
from acestep.dit.denoiser import Row
from acestep.dit.lyrics import Heard
from acestep.dit.sampler import Path
from acestep.hardware.upload import send


@dataclass(frozen=True, eq=False)
class Lyrics:
    """The lyric tokens of an item, and how to look for them.

    Attributes:
        ids, texts: The tokens, and what each adds to the text.
        listener: Where they are in the condition, and which heads follow them.
        scored: Listen to the noise, too, for a score.
    """

    ids: tuple[int, ...]
    texts: tuple[str, ...]
    listener: Listener
    scored: bool

    def heard(self, maps: Sequence[Tensor], seconds: float) -> Heard:
        """`maps` as `listen` returns them."""
        late, *early = maps
        return Heard(
            self.ids, self.texts, seconds,
            alignment=late[0].numpy(), energy=late[1].numpy(), first_energy=early[0][1].numpy() if early else None,
        )  # fmt: skip


def listen(
    path: Path, lyrics: Lyrics, latents: Tensor, device: torch.device
) -> Generator[list[Row], Sequence[Tensor], list[Tensor]]:
    """Yields rows to evaluate, is sent their maps, and returns them on the CPU: `[2, tokens, frames]` each.

    The first is of the song with the last step's share of its noise put back, the second, where a score is asked for, of the noise.
    """
    generator = torch.Generator("cpu").manual_seed(path.seed)  # as the song's own walk begins
    noise = send(torch.randn((1, path.frames, path.channels), generator=generator, dtype=torch.float32)[0], device)
    side = path.main
    at = 1.0 / path.sampling.steps
    maps = []
    for x, t in [(at * noise + (1.0 - at) * latents, at), *([(noise, 1.0)] if lyrics.scored else [])]:
        (seen,) = yield [Row(x, t, side.context, side.condition, side.lora, lyrics.listener)]
        maps.append(seen.cpu())
    return maps
