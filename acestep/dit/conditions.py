"""Text, lyrics and timbre as one sequence for the DiT's cross-attention.

Encodes one song at a time, so nothing is padded, and keeps the last encodings: variants of one prompt are encoded once, and so is
the timbre of "no reference audio", which every such song shares.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from acestep.checkpoints.load import RendererComponents
from acestep.condition_texts import LYRICS_END, MAX_LYRIC_TOKENS, MAX_TEXT_TOKENS, lyrics_header
from acestep.dit.precision import in_float32
from acestep.errors import InvalidOutput
from acestep.hardware.upload import send, upload
from acestep.plan import CODES_PER_SECOND
from acestep.sizing.activations import CODED_FRAMES
from acestep.song import LATENT_FPS, SAMPLE_RATE

REFERENCE_SECONDS = 30
_KEPT = 8
_FRAMES_PER_CODE = LATENT_FPS // CODES_PER_SECOND


@dataclass(frozen=True, eq=False)
class Texts:
    """Token ids of the two texts, and which of them were cut."""

    caption: Tensor
    lyrics: Tensor
    caption_tokens: int  # before cutting
    lyric_tokens: int


@dataclass(frozen=True)
class LyricTokens:
    """Lyrics within a packed condition: the first one's place, their ids, and what each adds to the text."""

    first: int
    ids: tuple[int, ...]
    texts: tuple[str, ...]


class Conditions:
    """The condition side of the renderer. The modules must be on `device` when a method is called.

    Where `dtype` is float16 they compute in float32 all the same: the last layer of the lyric encoder goes far beyond 65,504, and what
    an encoder takes is little beside the DiT. What still is no number is never kept, and fails the song.
    """

    def __init__(self, components: RendererComponents, device: torch.device, dtype: torch.dtype) -> None:
        self._parts = components
        self._device = device
        self._dtype = dtype
        self._encoded: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()
        self._silent_timbre: Tensor | None = None
        if components.is_xl:
            restore_timbre_token(components)

    @property
    def silence(self) -> Tensor:
        """Latents of silence, `[15000, C]`."""
        silence: Tensor = self._parts.condition_encoder.silence_latent[0]
        return silence

    def silence_of(self, frames: int) -> Tensor:
        """Latents of `frames` frames of silence, on the device."""
        silence = self.silence
        repeats = -(-frames // len(silence))
        return silence.repeat(repeats, 1)[:frames].to(self._device, self._dtype)

    @torch.inference_mode()
    def null(self) -> Tensor:
        """The learned "no condition", as a sequence of one token: cross-attention to copies of one key gives its value."""
        return self._parts.condition_encoder.null_condition_emb[0].to(self._device, self._dtype)

    def tokenize(self, caption: str, lyrics: str) -> Texts:
        ids, counts = [], []
        for text, limit in ((caption, MAX_TEXT_TOKENS), (lyrics, MAX_LYRIC_TOKENS)):
            full = self._parts.tokenizer(text, return_tensors="pt").input_ids
            cut = self._parts.tokenizer(text, truncation=True, max_length=limit, return_tensors="pt").input_ids
            ids.append(cut)
            counts.append(int(full.shape[1]))
        return Texts(ids[0], ids[1], counts[0], counts[1])

    def lyric_tokens(self, lyrics: str) -> LyricTokens:
        """The tokens of `lyrics_text` that are lyrics: between its header and its end."""
        tokenizer = self._parts.tokenizer
        header = len(tokenizer(lyrics_header(lyrics), add_special_tokens=False).input_ids)
        ids = self.tokenize("", lyrics).lyrics[0].tolist()
        end = tokenizer.convert_tokens_to_ids(LYRICS_END)
        stop = ids.index(end, header) if end in ids[header:] else len(ids)
        own = ids[header:stop]
        return LyricTokens(header, tuple(own), tuple(_texts_of(tokenizer, own)))

    @torch.inference_mode()
    def encode(self, caption: str, lyrics: str, references: Sequence[Tensor] = (), key: object = None) -> Tensor:
        """The packed condition `[lyric tokens + timbre tokens + text tokens, width]`.

        Args:
            references: Latents `[750, C]` of each reference audio.
            key: Identifies `references` for the cache; must differ where they differ.
        """
        cache_key = (caption, lyrics, key)
        if cache_key in self._encoded:
            self._encoded.move_to_end(cache_key)
            return self._encoded[cache_key]
        parts = self._parts
        texts = self.tokenize(caption, lyrics)
        # Lyrics are only looked up here: the lyric encoder is what reads them.
        looked_up = parts.text_encoder.get_input_embeddings()(send(texts.lyrics, self._device))

        def lyric_tokens(dtype: torch.dtype) -> Tensor:
            read: Tensor = parts.condition_encoder.lyric_encoder(inputs_embeds=looked_up.to(dtype), attention_mask=None)
            return read[0]

        def text_tokens(dtype: torch.dtype) -> Tensor:
            states = parts.text_encoder(input_ids=send(texts.caption, self._device)).last_hidden_state
            projected: Tensor = parts.condition_encoder.text_projector(states)
            return projected[0]

        packed = torch.cat(
            [
                self._finite("lyrics", lyric_tokens),
                self._timbre(references),
                self._finite("caption", text_tokens),
            ]
        )
        self._encoded[cache_key] = packed
        if len(self._encoded) > _KEPT:
            self._encoded.popitem(last=False)
        return packed

    def _finite(self, what: str, compute: Callable[[torch.dtype], Tensor]) -> Tensor:
        """What `compute` makes of inputs in the dtype it is told, in the renderer's dtype.

        Raises:
            InvalidOutput: it is not finite.
        """
        parts = self._parts
        if self._dtype == torch.float16:
            with in_float32(
                parts.text_encoder, parts.condition_encoder, parts.audio_tokenizer, parts.audio_token_detokenizer
            ):
                result = compute(torch.float32).to(self._dtype)
        else:
            result = compute(self._dtype)
        if not bool(torch.isfinite(result).all()):
            raise InvalidOutput(
                f"the {what} cannot be encoded: what comes out is not finite. The checkpoint or the precision is at fault.",
                part=what,
            )
        return result

    def _timbre(self, references: Sequence[Tensor]) -> Tensor:
        if not references:
            if self._silent_timbre is None:
                frames = math.ceil(REFERENCE_SECONDS * LATENT_FPS)
                self._silent_timbre = self._encode_timbre(self.silence_of(frames)[None])
            return self._silent_timbre
        return self._encode_timbre(torch.stack([r.to(self._device) for r in references]))

    def _encode_timbre(self, latents: Tensor) -> Tensor:
        order = torch.zeros(len(latents), dtype=torch.long, device=self._device)

        def timbre_tokens(dtype: torch.dtype) -> Tensor:
            tokens: Tensor = self._parts.condition_encoder.timbre_encoder(latents.to(dtype), order)[0]
            return tokens[0]

        return self._finite("reference audio", timbre_tokens)

    @torch.inference_mode()
    def hints(self, codes: Sequence[int], frames: int) -> Tensor:
        """Latents `[frames, C]` that 5 Hz audio codes stand for, cut or continued with silence."""
        indices = upload(codes, torch.long, self._device)[None, :, None]
        quantized = self._parts.audio_tokenizer.quantizer.get_output_from_indices(indices)
        hints = self._detokenized("audio codes", quantized)[:frames]
        if len(hints) == frames:
            return hints
        return torch.cat([hints, self.silence_of(frames - len(hints))])

    def _detokenized(self, what: str, quantized: Tensor) -> Tensor:
        def latents(dtype: torch.dtype) -> Tensor:
            # Each code is read alone, so parts of a song give what the whole gives, and take less memory.
            parts = torch.split(quantized[0], CODED_FRAMES // _FRAMES_PER_CODE)
            return torch.cat([self._parts.audio_token_detokenizer(part[None].to(dtype))[0] for part in parts])

        return self._finite(what, latents)

    @torch.inference_mode()
    def through_codes(self, latents: Tensor) -> Tensor:
        """Latents reduced to what 5 Hz codes keep of them: what a cover follows. `[L, C]` in and out."""
        quantized, _ = self._tokenized(latents)
        return self._detokenized("source audio", quantized)[: len(latents)]

    @torch.inference_mode()
    def codes_of(self, latents: Tensor) -> tuple[int, ...]:
        """5 Hz codes of latents `[L, C]`; the last code covers what is left."""
        _, indices = self._tokenized(latents)
        return tuple(int(code) for code in indices[0, :, 0].tolist())

    def _tokenized(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Quantized states `[1, codes, width]` and their codes `[1, codes, 1]`."""
        indices: Tensor

        def quantized(dtype: torch.dtype) -> Tensor:
            nonlocal indices
            parts = [
                self._parts.audio_tokenizer.tokenize(part[None].to(dtype), self._silence_row())
                for part in torch.split(latents, CODED_FRAMES)
            ]
            indices = torch.cat([part[1] for part in parts], dim=1)
            return torch.cat([part[0] for part in parts], dim=1)

        states = self._finite("source audio", quantized)
        return states, indices

    def _silence_row(self) -> Tensor:
        return self.silence[None].to(self._device, self._dtype)


def _texts_of(tokenizer: Any, ids: Sequence[int]) -> Iterator[str]:
    """The text of each token. Characters that several tokens make show at the last of them."""
    pending: list[int] = []
    for token in ids:
        pending.append(token)
        text = tokenizer.decode(pending, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if text.endswith("\ufffd"):
            yield ""
        else:
            yield text
            pending = []


def restore_timbre_token(components: RendererComponents) -> None:
    """Put the learned first token of XL's timbre encoder in front of its input, which diffusers 0.42.1 leaves out.

    The encoder pools its first position; without the token that is the first frame of the audio. Done once per encoder.
    """
    encoder = components.condition_encoder.timbre_encoder
    if getattr(encoder, "_first_token_restored", False):
        return

    def prepend(module: torch.nn.Module, args: object, output: Tensor) -> Tensor:
        token = encoder.special_token.to(output.dtype).expand(output.shape[0], 1, -1)
        return torch.cat([token, output], dim=1)

    encoder.embed_tokens.register_forward_hook(prepend)
    encoder._first_token_restored = True


def reference_excerpt(audio: Tensor, rate: int = SAMPLE_RATE) -> Tensor:
    """30 s of reference audio `[2, n]`, or of latents `[C, frames]`, for the timbre encoder: ten seconds each from front, middle and back.

    Shorter audio is repeated first. The places are fixed, so that a request gives the same song again.
    """
    target, part = REFERENCE_SECONDS * rate, REFERENCE_SECONDS * rate // 3
    if audio.shape[1] < target:
        audio = audio.repeat(1, -(-target // audio.shape[1]))
    middle, back = audio.shape[1] // 3, audio.shape[1] - part
    return torch.cat([audio[:, :part], audio[:, middle : middle + part], audio[:, back:]], dim=1)
