"""`Renderer`: a checkpoint on a device, ready to make songs for many callers at once."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from acestep.adapters.cache import LoraCache, cache_bytes
from acestep.adapters.layout import Target
from acestep.checkpoints.checkpoint import Checkpoint
from acestep.checkpoints.load import RendererComponents, load_renderer
from acestep.checkpoints.modules import AceStepAttention
from acestep.checkpoints.published import VariantDefaults
from acestep.dit import checks
from acestep.dit.admission import Admission
from acestep.dit.attention import Attention, EncoderProcessor
from acestep.dit.budget import batch_frames
from acestep.dit.conditions import Conditions
from acestep.dit.denoiser import Denoiser
from acestep.dit.engine import RenderEngine, Result, Work
from acestep.dit.preparation import Preparation
from acestep.dit.residency import Residency
from acestep.dit.sources import Sources
from acestep.dit.vae import Vae
from acestep.dit.work import CodesWork, Rendered, RenderWork
from acestep.errors import DeviceUnavailable, InvalidRequest, ModelMissing
from acestep.hardware import onednn
from acestep.hardware.devices import make_current
from acestep.request import SongRequest
from acestep.song import Progress
from acestep.stage_settings import AttentionBackend, RendererSettings
from acestep.worker import EngineThread, Ticket

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RendererInfo:
    """What a renderer is, for health and manifests."""

    name: str
    hash: str
    notice: str | None
    device: str
    dtype: str
    attention: str
    defaults: VariantDefaults
    tasks: tuple[str, ...]
    channels: int  # of its latents
    vae: str = "official"


class Renderer:
    """Renders songs on one device, on one engine thread. Made by `load`; close it when done."""

    def __init__(
        self,
        components: RendererComponents,
        settings: RendererSettings,
        *,
        name: str,
        defaults: VariantDefaults,
        hash: str = "",
        notice: str | None = None,
        vae_name: str = "official",
    ) -> None:
        device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
        if settings.int8:
            quantize(components.transformer)
        admission = Admission(components, settings, device)
        groups = {
            "conditions": (
                components.text_encoder,
                components.condition_encoder,
                components.audio_tokenizer,
                components.audio_token_detokenizer,
            ),
            "dit": (components.transformer,),
            "vae": (components.vae,),
        }
        if device.type == "cpu":
            onednn.adopt(*(module for modules in groups.values() for module in modules))
        offloaded = {"conditions", "vae"} if settings.offload == "stage" else set()
        if settings.offload_dit:
            offloaded.add("dit")
        vae = Vae(
            components.vae, device, settings.vae_tile_frames, settings.vae_overlap_frames, compile=settings.compile
        )
        residency = Residency(groups, device, frozenset(offloaded))
        denoiser = Denoiser(components.transformer, device, dtype, settings.attention, compile=settings.compile)
        set_encoder_attention(components, denoiser.attention.backend, device, dtype)
        if settings.compile:
            warm_up(denoiser, vae, residency)
        loras = LoraCache(components.transformer, device, dtype, cache_bytes(admission.device_bytes))
        self.adapter_target: Target | None = Target(components.transformer)
        conditions = Conditions(components, device, dtype)
        budget = settings.max_batch_frames
        if budget is None:
            budget = batch_frames(device, name)
        channels = conditions.silence.shape[1]
        sources = Sources(vae, residency, conditions.silence_of, channels, name, vae_name)
        self._preparation = Preparation(conditions, sources, denoiser, residency, loras, admission, defaults, device)
        engine = RenderEngine(
            self._preparation,
            denoiser,
            vae,
            residency,
            defaults,
            name=name,
            device=device,
            budget=budget,
            retry_in_float32=not settings.int8,
        )
        self.info = RendererInfo(
            name=name,
            hash=hash,
            notice=notice,
            device=str(device),
            dtype=settings.dtype,
            attention=denoiser.attention.backend,
            defaults=defaults,
            tasks=tuple(defaults.tasks),
            channels=channels,
            vae=vae_name,
        )
        self._thread: EngineThread[Work, Result] = EngineThread(
            engine, name=f"render-{device}", begin=partial(make_current, settings.device)
        )

    @classmethod
    def load(cls, checkpoint: Checkpoint, settings: RendererSettings) -> Renderer:
        """Load a renderer checkpoint as `settings` say.

        Raises:
            ModelMissing: the checkpoint is no renderer, or is incomplete.
            DeviceUnavailable: the device is not there or int8 is asked for without torchao.
        """
        if checkpoint.kind != "renderer" or checkpoint.defaults is None:
            raise ModelMissing(
                f"{checkpoint.name} is a {checkpoint.kind}, not a renderer checkpoint.", path=str(checkpoint.path)
            )
        if settings.threads is not None and settings.device == "cpu":
            torch.set_num_threads(settings.threads)
        try:
            torch.empty(0, device=settings.device)
            make_current(settings.device)
        except (RuntimeError, AssertionError) as error:
            raise DeviceUnavailable(f"{settings.device} cannot be used: {error}", device=settings.device) from error
        # Parts that will be offloaded must not be on the card all at once, not even while loading.
        start_on = "cpu" if settings.offload != "none" or settings.offload_dit else settings.device
        components = load_renderer(checkpoint, device=start_on, dtype=getattr(torch, settings.dtype))
        return cls(
            components,
            settings,
            name=checkpoint.name,
            defaults=checkpoint.defaults,
            hash=checkpoint.hash,
            notice=checkpoint.notice,
            vae_name=checkpoint.vae,
        )

    def check(self, request: SongRequest) -> None:
        """Refuse what this checkpoint cannot do. Raises `InvalidRequest`, which names the field."""
        checks.check(request, self.info.defaults, self.info.name)

    def submit(
        self,
        work: RenderWork,
        *,
        id: str | None = None,
        priority: float = 0.0,
        deadline: float | None = None,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> Ticket[RenderWork, Rendered]:
        """Queue a work. The ticket's future gives `Rendered` or raises an `AceStepError`. A missing seed is drawn here.

        Raises:
            InvalidRequest: see `check`.
            Unavailable: closed, or too much waits already.
        """
        self.check(work.request)
        if not all(0 <= index < work.request.batch_size for index in work.indices):
            raise InvalidRequest(f"items: {work.items} of a batch of {work.request.batch_size}.", field="items")
        work = replace(work, request=work.request.with_seeds())
        ticket: Any = self._thread.submit(work, id=id, priority=priority, deadline=deadline, on_progress=on_progress)
        return ticket

    def submit_codes(self, path: Path, *, priority: float = 0.0) -> Ticket[CodesWork, tuple[int, ...]]:
        """Queue the reading of 5 Hz audio codes from a file."""
        ticket: Any = self._thread.submit(CodesWork(path), priority=priority)
        return ticket

    def cancel(self, ticket: Ticket[Any, Any]) -> None:
        """Drop a work before the engine's next step or VAE tile."""
        self._thread.cancel(ticket)

    @property
    def alive(self) -> bool:
        return self._thread.alive

    def stats(self) -> dict[str, Any]:
        return self._thread.stats()

    def close(self) -> None:
        """Stop after the step in progress; unfinished works fail as cancelled."""
        self._thread.close()
        self._preparation.close()


def warm_up(denoiser: Denoiser, vae: Vae, residency: Residency) -> None:
    """Compile ahead of the first song. What cannot be compiled here, for want of a C compiler for instance, runs as it is written."""
    began = time.monotonic()
    parts: dict[str, Denoiser | Vae] = {"dit": denoiser, "vae": vae}
    for group, part in parts.items():
        residency.need(group)
        try:
            part.warm_up()
        except Exception as error:  # a compiler fails in any way it likes
            lines = str(error).strip().splitlines() or [""]
            log.warning(
                "torch.compile fails for the %s (%s: %s): it runs uncompiled", group, type(error).__name__, lines[0]
            )
            log.info("the whole error", exc_info=True)
            part.run_uncompiled()
    residency.leave()
    log.info("compiled in %.1f s", time.monotonic() - began)


def set_encoder_attention(
    components: RendererComponents, backend: AttentionBackend, device: torch.device, dtype: torch.dtype
) -> None:
    """Give the encoders the attention that the renderer's card can do: the float32 softmax for "eager", else PyTorch's own."""
    if backend == "eager":
        components.text_encoder.set_attn_implementation("eager")
    processor: Any = EncoderProcessor(Attention("eager" if backend == "eager" else "sdpa", device, dtype))
    for part in (components.condition_encoder, components.audio_tokenizer, components.audio_token_detokenizer):
        for module in part.modules():
            if isinstance(module, AceStepAttention):
                module.set_processor(processor)


def quantize(module: torch.nn.Module) -> None:
    """int8 weights for all linear layers, in place: half the memory of bfloat16; compiled the same speed, else slower.

    Raises:
        DeviceUnavailable: torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise DeviceUnavailable(
            "int8 weights need torchao, which is not installed: pip install 'acestep-serve[gpu]', or switch int8 off."
        ) from error
    quantize_(module, Int8WeightOnlyConfig())
