"""Whether a song fits on the device, known from the ledger before anything of it is allocated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from acestep.checkpoints.load import RendererComponents
from acestep.hardware import host
from acestep.sizing.ledger import RenderTask, admit_render, render_need
from acestep.song import LATENT_FPS
from acestep.stage_settings import RendererSettings

UNLIMITED = 1 << 62


class Admission:
    """Asks `acestep.sizing.ledger` for this renderer, its components and its device."""

    def __init__(self, components: RendererComponents, settings: RendererSettings, device: torch.device) -> None:
        self._settings = settings
        self._configs = {
            name: _config(getattr(components, name))
            for name in (
                "text_encoder", "condition_encoder", "audio_tokenizer", "audio_token_detokenizer", "transformer", "vae",
            )
        }  # fmt: skip
        on_card = device.type == "cuda"
        total = int(torch.cuda.get_device_properties(device).total_memory) if on_card else host.memory()[0]
        self.device_bytes = min(total, settings.memory_bytes or total)

    def pass_frames(
        self,
        *,
        frames: int,
        songs: int,
        guided: bool,
        condition_tokens: int,
        references: int,
        encodes_source: bool,
        adapter_bytes: int = 0,
    ) -> int:
        """Rows times frames of such songs that may share an evaluation of the DiT.

        Raises:
            OutOfMemory: not even one fits; says how much is needed and in which stage.
        """
        task = RenderTask(
            seconds=frames / LATENT_FPS,
            songs=songs,
            guided=guided,
            condition_tokens=condition_tokens,
            references=references,
            encodes_source=encodes_source,
            adapter_bytes=adapter_bytes,
        )
        admit_render(replace(task, songs=1), self._configs, self._settings, self.device_bytes)
        together = songs
        while together > 1 and self._denoise_bytes(task, together) > self.device_bytes:
            together //= 2
        return together * (2 if guided else 1) * frames if together < songs else UNLIMITED

    def _denoise_bytes(self, task: RenderTask, songs: int) -> int:
        return render_need(task, self._configs, self._settings, songs).stages["denoise"]


def _config(module: Any) -> dict[str, Any]:
    config = module.config
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)
