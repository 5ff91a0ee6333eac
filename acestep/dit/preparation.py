"""From a request to what each of its items is denoised from: lengths, contexts, conditions, windows.

Written as generators that pause after each piece of work (a VAE tile, one encoding), so that the engine can interleave songs and
drop a cancelled one quickly. Where one waits for a file to be read, which another thread does, it yields the future to wait for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from acestep.adapters.cache import ActiveLora, LoraCache
from acestep.adapters.files import FIELD, listed
from acestep.adjust import fit_codes, refusal, unique
from acestep.checkpoints.published import VariantDefaults
from acestep.condition_texts import MAX_LYRIC_TOKENS, MAX_TEXT_TOKENS, caption_text, lyrics_text
from acestep.dit.admission import Admission
from acestep.dit.attention_maps import Listener
from acestep.dit.checks import check_files
from acestep.dit.conditions import Conditions
from acestep.dit.denoiser import Denoiser, Projected
from acestep.dit.latents import StoredLatents, read_latents
from acestep.dit.listening import Lyrics
from acestep.dit.residency import Residency
from acestep.dit.sampler import Path, Repaint
from acestep.dit.sampling import Sampling, resolve
from acestep.dit.sources import Source, Sources, Steps
from acestep.dit.splice import Splice
from acestep.dit.variants import retake
from acestep.dit.variants.side import Side
from acestep.dit.window import Span, keeps_source
from acestep.dit.work import RenderWork
from acestep.errors import OutOfMemory
from acestep.plan import CODES_PER_SECOND
from acestep.request import Adjustment
from acestep.song import SAMPLE_RATE, SAMPLES_PER_FRAME
from acestep.tasks import RULES, follows_source, instruction

DEFAULT_SECONDS = 60.0
# How much of the source is held: what balances between both is 1 - `repaint_strength`. From it follow, as in ACE-Step, the share of
# the steps and the crossfades, of which these are the longest.
_HELD = {"conservative": 1.0, "aggressive": 0.0}
_CROSSFADE_FRAMES = 25
_CROSSFADE_S = 0.05


@dataclass(frozen=True, eq=False)
class Item:
    """One song to be: its path to latents, its exact length, what is put back around it, and which lyrics to listen for.

    `latents` are there where the song is made already, and only listened to. `gain` is what its sound is multiplied by: latents that it is
    made from need not be as loud as their song.
    """

    index: int
    seed: int
    samples: int
    path: Path
    splice: Splice | None
    lyrics: Lyrics | None = None
    latents: Tensor | None = None
    gain: float = 1.0


@dataclass(frozen=True, eq=False)
class Prepared:
    items: tuple[Item, ...]
    pass_frames: int  # rows times frames of these items that may share an evaluation
    sampling: Sampling
    lora: ActiveLora | None
    adjustments: tuple[Adjustment, ...]


class Preparation:
    """Makes `Prepared` of works, on the engine thread."""

    def __init__(
        self,
        conditions: Conditions,
        sources: Sources,
        denoiser: Denoiser,
        residency: Residency,
        loras: LoraCache,
        admission: Admission,
        defaults: VariantDefaults,
        device: torch.device,
    ) -> None:
        self._conditions = conditions
        self.sources = sources
        self._denoiser = denoiser
        self._dtype = denoiser.dtype
        self._residency = residency
        self._loras = loras
        self._admission = admission
        self._defaults = defaults
        self._device = device

    def close(self) -> None:
        self.sources.close()

    def prepare(self, work: RenderWork) -> Steps[Prepared]:
        """Raises the errors of `check_files`, `LoraCache.get` and `Sources.source`, for what only the files can tell."""
        request = work.request
        check_files(request, work.src_audio, work.reference_audio)
        sampling, adjustments = resolve(request, self._defaults)
        retakes = retake.resolve(request, adjustments)
        if request.global_caption and not self._defaults.lego_sft:
            reason = "this checkpoint was not trained on captions of whole songs"
            adjustments.append(
                Adjustment(field="global_caption", asked=request.global_caption, given="", reason=reason)
            )
        lora = self._loras.get(request.lora)
        for adapter, _ in lora.parts if lora else ():
            if left_out := adapter.left_out:
                reason = f"this renderer applies adapters to its DiT only; left out: {listed(list(left_out))}"
                given = f"{len(adapter.layers)} of {len(adapter.layers) + len(left_out)} layers"
                adjustments.append(Adjustment(field=FIELD, asked=adapter.name, given=given, reason=reason))
        source = (yield from self.sources.source(request, work.src_audio)) if work.src_audio is not None else None
        references = []
        for path in work.reference_audio:
            reference = yield from self.sources.reference(path)
            references.append(reference)
        # A file may change under its name, so its encoding is shared within this work only.
        reference_key = object() if references else None

        channels = self._conditions.silence.shape[1]
        stored = {i: read_latents(work.latents[i], channels) for i in work.indices if i in work.latents}
        contexts: dict[object, Tensor] = {}
        encoded: dict[tuple[str, str], Tensor] = {}
        texts: dict[int, list[tuple[str, str]]] = {}
        origins: dict[int, tuple[str, str]] = {}
        regional: dict[int, dict[tuple[str, str], list[Span]]] = {}
        lengths: dict[int, int] = {}
        for index in work.indices:
            codes = work_codes(work, index)
            found = stored.get(index)
            samples = lengths[index] = found.samples if found else song_samples(work, codes, source)
            adjustments += _length_adjustments(work, samples, source, codes)
            frames = -(-samples // SAMPLES_PER_FRAME)
            texts[index] = self._texts(work, codes, samples / SAMPLE_RATE)
            if request.flow_edit_morph:
                texts[index] = texts[index][:1]
                (origins[index], *_) = self._texts(_of_source(work), codes, samples / SAMPLE_RATE)
            regional[index] = self._regional(work, source, samples / SAMPLE_RATE)
            self._residency.need("conditions")
            if (codes, frames) not in contexts:
                contexts[codes, frames] = self._context(work, codes, frames, source)
                yield None
            for caption, lyrics in (*texts[index], *([origins[index]] if index in origins else []), *regional[index]):
                if (caption, lyrics) not in encoded:
                    adjustments += self._cuts(caption, lyrics)
                    self._residency.need("conditions")
                    encoded[caption, lyrics] = self._conditions.encode(caption, lyrics, references, key=reference_key)
                    yield None
        pass_frames = self._pass_frames(
            frames=-(-max(lengths.values()) // SAMPLES_PER_FRAME),
            songs=len(lengths),
            guided=sampling.guided,
            condition_tokens=max(len(tokens) for tokens in encoded.values()),
            references=len(references),
            encodes_source=source is not None or bool(references),
        )
        projected: dict[tuple[str, str], Projected] = {}
        for pair, tokens in encoded.items():
            projected[pair] = self._project(tokens, lora)
            yield None
        null = self._project(self._conditions.null(), lora)
        items = []
        for index in work.indices:
            codes = work_codes(work, index)
            frames = -(-lengths[index] // SAMPLES_PER_FRAME)
            context = contexts[codes, frames]
            sides = [Side(context, projected[texts[index][0]], null, lora)]
            if len(texts[index]) > 1:
                silent = contexts.setdefault(("silence", frames), self._silence(frames))
                sides.append(Side(silent, projected[texts[index][1]], null, lora))
            item = self._item(work, index, lengths[index], sampling, sides, source)
            if index in origins:
                origin = replace(sides[0], condition=projected[origins[index]])
                item = replace(item, path=replace(item.path, origin=origin))
            own = tuple(
                (tuple(spans), replace(sides[0], condition=projected[pair])) for pair, spans in regional[index].items()
            )
            item = replace(item, path=replace(item.path, regional=own))
            item = replace(item, path=replace(item.path, retakes=retakes[index]))
            items.append(replace(item, lyrics=self._lyrics(work, texts[index][0][1]), latents=_latents(stored, index)))
        if not follows_source(request, codes=bool(work_codes(work, 0))) and request.audio_cover_strength != 1.0:
            adjustments.append(
                Adjustment(
                    field="audio_cover_strength", asked=request.audio_cover_strength, given=1.0,
                    reason="there are no audio codes to follow",
                )
            )  # fmt: skip
        if request.listens and request.instrumental:
            field = "timestamps" if request.timestamps else "score"
            adjustments.append(
                Adjustment(field=field, asked=True, given=False, reason="there are no lyrics to listen for")
            )
        if request.strict and adjustments:
            raise refusal(adjustments[0])
        return Prepared(tuple(items), pass_frames, sampling, lora, tuple(unique(adjustments)))

    def _lyrics(self, work: RenderWork, text: str) -> Lyrics | None:
        """How to listen for the lyrics in `text`, of `lyrics_text`; None where that is not asked for, or there are none."""
        request = work.request
        if not request.listens or request.instrumental:
            return None
        tokens = self._conditions.lyric_tokens(text)
        listener = Listener(self._defaults.lyric_heads, tokens.first, tokens.first + len(tokens.ids))
        return Lyrics(tokens.ids, tokens.texts, listener, scored=request.score)

    def _pass_frames(self, **task: Any) -> int:
        """As the ledger says; adapters that no song uses make room where there is none."""
        try:
            return self._admission.pass_frames(**task, adapter_bytes=self._loras.held_bytes)
        except OutOfMemory:
            self._loras.drop()
            self._denoiser.forget()
            return self._admission.pass_frames(**task, adapter_bytes=self._loras.held_bytes)

    def _project(self, tokens: Tensor, lora: ActiveLora | None) -> Projected:
        self._residency.need("dit")
        self._denoiser.set_precision(self._dtype)  # another song may be in float32 just now; this one must not notice
        return self._denoiser.project(tokens, lora)

    def codes_of(self, latents: Tensor) -> tuple[int, ...]:
        """5 Hz codes of latents."""
        self._residency.need("conditions")
        return self._conditions.codes_of(latents.to(self._device))

    def _context(self, work: RenderWork, codes: tuple[int, ...] | None, frames: int, source: Source | None) -> Tensor:
        """Context channels `[L, 2C]`: what to follow, and where to make something."""
        request = work.request
        if codes:
            return self._with_mask(self._conditions.hints(codes, frames))
        if source is None or RULES[request.task].source == "no":
            return self._silence(frames)
        latents = source.latents.to(self._device, self._dtype)
        if request.task == "cover":
            return self._with_mask(self._conditions.through_codes(latents))
        if source.window is None:
            return self._with_mask(latents)
        mask = torch.zeros_like(latents)
        for start, end in source.window.spans:
            mask[start:end] = 1.0
        if request.task == "repaint":
            latents = torch.where(mask == 0.0, latents, self._conditions.silence_of(frames))
        if request.chunk_mask_mode == "auto":
            return self._with_mask(latents)
        return torch.cat([latents, mask], dim=-1)

    def _silence(self, frames: int) -> Tensor:
        return self._with_mask(self._conditions.silence_of(frames))

    @staticmethod
    def _with_mask(latents: Tensor) -> Tensor:
        return torch.cat([latents, torch.ones_like(latents)], dim=-1)

    def _texts(self, work: RenderWork, codes: tuple[int, ...] | None, seconds: float) -> list[tuple[str, str]]:
        """The texts of the main conditioning and, where a cover lets go of its source on the way, of the rest."""
        request, metadata = work.request, work.plan.metadata
        lyrics = lyrics_text(request, metadata)
        own = instruction(request, codes=bool(codes))
        texts = [(caption_text(request, metadata, own, seconds, lego_sft=self._defaults.lego_sft), lyrics)]
        if follows_source(request, codes=bool(codes)) and request.audio_cover_strength < 1.0:
            texts.append((caption_text(request, metadata, RULES["text2music"].instruction, seconds), lyrics))
        return texts

    def _regional(self, work: RenderWork, source: Source | None, seconds: float) -> dict[tuple[str, str], list[Span]]:
        """The texts of regions that have words of their own, and where each of them holds."""
        found: dict[tuple[str, str], list[Span]] = {}
        if source is None or source.window is None:
            return found
        for region, span in zip(work.request.regions, source.window.parts, strict=False):
            words: dict[str, Any] = {}
            if region.prompt is not None:
                words |= {"prompt": region.prompt, "use_cot_caption": False}
            if region.lyrics is not None:
                words["lyrics"] = region.lyrics
            if words:
                own = replace(work, request=work.request.model_copy(update=words))
                found.setdefault(self._texts(own, None, seconds)[0], []).append(span)
        return found

    def _cuts(self, caption: str, lyrics: str) -> list[Adjustment]:
        texts = self._conditions.tokenize(caption, lyrics)
        cuts = []
        for field, tokens, limit in (
            ("prompt", texts.caption_tokens, MAX_TEXT_TOKENS),
            ("lyrics", texts.lyric_tokens, MAX_LYRIC_TOKENS),
        ):
            if tokens > limit:
                reason = f"the model reads at most {limit} tokens"
                cuts.append(Adjustment(field=field, asked=f"{tokens} tokens", given=f"{limit} tokens", reason=reason))
        return cuts

    def _item(
        self, work: RenderWork, index: int, samples: int, sampling: Sampling, sides: list[Side], source: Source | None
    ) -> Item:
        request = work.request
        window = source.window if source is not None else None
        repaint = splice = None
        if source is not None and window is not None and not window.is_everything:
            aggressive = request.repaint_mode == "aggressive"
            held = _HELD.get(request.repaint_mode, 1.0 - request.repaint_strength)
            frames, seconds = request.repaint_latent_crossfade_frames, request.repaint_wav_crossfade_sec
            frames = round(held * _CROSSFADE_FRAMES) if frames is None else frames
            seconds = held * _CROSSFADE_S if seconds is None else seconds
            repaint = Repaint(
                clean=source.latents.to(self._device),
                spans=window.spans,
                injection=held,
                crossfade=0 if aggressive else frames,
                known=window.known,
            )
            if keeps_source(request, window):
                assert source.audio is not None, "what is kept is there"
                splice = Splice(source.audio, window, round(seconds * SAMPLE_RATE))
        noisy = source is not None and (request.cover_noise_strength > 0.0 or request.flow_edit_morph)
        seed = request.seeds[index]
        if request.flow_edit_morph and (seeds := request.retake_seeds(request.batch_size)):
            seed = seeds[index]
        path = Path(
            frames=-(-samples // SAMPLES_PER_FRAME),
            channels=sides[0].context.shape[1] // 2,
            seed=seed,
            sampling=sampling,
            main=sides[0],
            after=sides[1] if len(sides) > 1 else None,
            cover_strength=request.audio_cover_strength,
            source=source.latents.to(self._device) if source is not None and noisy else None,
            source_strength=request.cover_noise_strength if noisy else 0.0,
            repaint=repaint,
        )
        return Item(index, request.seeds[index], samples, path, splice, gain=1.0 if source is None else source.gain)


def _latents(stored: Mapping[int, StoredLatents], index: int) -> Tensor | None:
    return stored[index].latents if index in stored else None


def work_codes(work: RenderWork, index: int) -> tuple[int, ...] | None:
    """Audio codes of an item: the request's own, else the plan's. Only covers and plain songs follow codes."""
    if RULES[work.request.task].source == "yes" or (work.request.flow_edit_morph and work.request.task == "text2music"):
        return None
    return work.request.audio_codes or work.plan.codes_of(index)


def _of_source(work: RenderWork) -> RenderWork:
    """Of flow edit: the same work with the words that say what its source is."""
    request = work.request
    words = {"prompt": request.flow_edit_source_caption, "lyrics": request.flow_edit_source_lyrics}
    return replace(work, request=request.model_copy(update={**words, "use_cot_caption": False}))


def song_samples(work: RenderWork, codes: tuple[int, ...] | None, source: Source | None) -> int:
    """Length of an item in samples: the source's, else as asked, as planned, as coded, or a minute."""
    if source is not None:
        return source.samples
    seconds = _asked_seconds(work)
    if seconds is None:
        seconds = len(codes) / CODES_PER_SECOND if codes else DEFAULT_SECONDS
    return round(seconds * SAMPLE_RATE)


def _asked_seconds(work: RenderWork) -> float | None:
    return work.request.duration if work.request.duration is not None else work.plan.metadata.duration


def _length_adjustments(
    work: RenderWork, samples: int, source: Source | None, codes: tuple[int, ...] | None
) -> list[Adjustment]:
    if source is None:
        told: list[Adjustment] = []
        field = "plan.codes" if work.request.audio_codes is None else "audio_codes"
        fit_codes(codes or (), _asked_seconds(work) if codes else None, field, told)
        return told
    asked = work.request.duration
    if asked is None or round(asked * SAMPLE_RATE) == samples:
        return []
    given = round(samples / SAMPLE_RATE, 3)
    return [Adjustment(field="duration", asked=asked, given=given, reason="the source audio decides the length")]
