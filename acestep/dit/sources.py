"""Source and reference audio on the engine thread: files as PCM and latents.

Latents that a file holds are taken as they are; nothing of them passes through the VAE's encoder. Written as generators, as
`preparation` tells.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from acestep.audio.latent_file import LatentFacts, LatentFile, holds_latents, read_latent_file
from acestep.audio.reading import read_audio
from acestep.dit.conditions import reference_excerpt
from acestep.dit.residency import Residency
from acestep.dit.vae import Vae
from acestep.dit.window import Window, keeps_source, window_of
from acestep.errors import InvalidOutput, InvalidRequest
from acestep.request import SongRequest
from acestep.song import LATENT_FPS, SAMPLE_RATE, SAMPLES_PER_FRAME
from acestep.tasks import RULES

T = TypeVar("T")
Steps = Generator["Future[Any] | None", None, T]

_READERS = 2


@dataclass(frozen=True, eq=False)
class SourceFile:
    """What a file holds: PCM `[2, n]` at 48 kHz, latents `[frames, channels]`, or both, of a song of `samples` samples."""

    samples: int
    audio: Tensor | None = None
    latents: Tensor | None = None
    gain: float = 1.0
    facts: LatentFacts | None = None


@dataclass(frozen=True, eq=False)
class Source:
    """What a task works on.

    Attributes:
        samples: Of the song, with what a window adds.
        latents: `[L, C]`, float32, on the CPU.
        gain: What is made from them is multiplied by, so as to be as loud as the source's file.
        window: The part that is made anew, where a task has one.
        audio: PCM `[2, samples]`, where something is put back around a window.
    """

    samples: int
    latents: Tensor
    gain: float = 1.0
    window: Window | None = None
    audio: Tensor | None = None


class Sources:
    """Reads, encodes and decodes source audio.

    Args:
        silence: Latents of so many frames of silence.
        model: Name of the renderer, for errors.
        vae_name: Of its VAE: other latents are refused.
    """

    def __init__(
        self, vae: Vae, residency: Residency, silence: Callable[[int], Tensor], channels: int, model: str, vae_name: str
    ) -> None:
        self._vae = vae
        self._residency = residency
        self._silence = silence
        self._channels = channels
        self._model = model
        self._vae_name = vae_name
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="read-audio")

    def close(self) -> None:
        self._readers.shutdown(wait=False, cancel_futures=True)

    def source(self, request: SongRequest, path: Path) -> Steps[Source]:
        """What `request` works on. Raises as `read` and `window_of` do."""
        file = yield from self.read(path, "src_audio")
        file = _cut(file, request.source_s)
        window = window_of(request, file.samples) if RULES[request.task].window else None
        audio, left, right = file.audio, window.left if window else 0, window.right if window else 0
        if file.latents is None:
            assert audio is not None, "a file without latents is audio"
            audio = nn.functional.pad(audio, (left, right))
            return Source(audio.shape[1], (yield from self.encode(audio, "src_audio")), 1.0, window, audio)
        if window is None:
            return Source(file.samples, file.latents, file.gain)
        if left % SAMPLES_PER_FRAME:
            raise InvalidRequest(
                f"src_audio: latents are continued by whole frames, not by {left} samples.", field="src_audio"
            )
        if audio is None and keeps_source(request, window):
            audio = (yield from self._decode(file.latents))[:, : file.samples] * file.gain
        if audio is not None:
            audio = nn.functional.pad(audio, (left, right))
        latents = self._silence(window.frames).cpu().float()
        first = left // SAMPLES_PER_FRAME
        latents[first : first + len(file.latents)] = file.latents
        return Source(window.samples, latents, file.gain, window, audio)

    def reference(self, path: Path) -> Steps[Tensor]:
        """Latents of an example of style, as the timbre encoder wants them."""
        file = yield from self.read(path, "reference_audio")
        if file.latents is not None:
            return reference_excerpt(file.latents.T, LATENT_FPS).T
        assert file.audio is not None, "a file without latents is audio"
        return (yield from self.encode(reference_excerpt(file.audio), "reference_audio"))

    def latents(self, path: Path, field: str) -> Steps[Tensor]:
        """Latents of a whole file."""
        file = yield from self.read(path, field)
        if file.latents is not None:
            return file.latents
        assert file.audio is not None, "a file without latents is audio"
        return (yield from self.encode(file.audio, field))

    def read(self, path: Path, field: str) -> Steps[SourceFile]:
        """A file of audio or latents. Raises `InvalidRequest` as `read_audio` and `read_latent_file` do, and for another VAE's latents."""
        reading = self._readers.submit(read_source, path, field)
        yield reading
        file: SourceFile = reading.result()
        if file.facts is not None:
            file.facts.check_fits(field, channels=self._channels, vae=self._vae_name, model=self._model)
        return file

    def encode(self, audio: Tensor, field: str) -> Steps[Tensor]:
        """Latents of PCM, tile by tile. Raises `InvalidOutput` where they are no numbers; `field` names the audio."""
        self._residency.need("vae")
        steps = self._vae.encode(audio)
        while True:
            try:
                next(steps)
            except StopIteration as done:
                latents: Tensor = done.value
                if not bool(torch.isfinite(latents).all()):
                    raise InvalidOutput(
                        f"{field}: the VAE gave latents that are not finite. The checkpoint or the precision is at fault.",
                        field=field,
                    ) from None
                return latents
            yield None
            self._residency.need("vae")

    def _decode(self, latents: Tensor) -> Steps[Tensor]:
        """PCM of latents, tile by tile."""
        self._residency.need("vae")
        pieces = []
        for _, piece in self._vae.decode(latents):
            pieces.append(piece)
            yield None
            self._residency.need("vae")
        audio = torch.cat(pieces, dim=1)
        if not bool(torch.isfinite(audio).all()):
            raise InvalidOutput("src_audio: the VAE gave samples that are not finite.", field="src_audio")
        return audio


def read_source(path: Path, field: str) -> SourceFile:
    """A file of audio, or of latents with or without the song's audio beside them. Raises as `Sources.read` does."""
    beginning = field == "reference_audio"
    try:
        with path.open("rb") as opened:
            head = opened.read(16)
            data = head + opened.read() if holds_latents(head) else None
    except OSError as error:
        raise InvalidRequest(f"{field}: the file cannot be read: {error.strerror or error}.", field=field) from error
    if data is None:
        audio = torch.from_numpy(read_audio(path, field=field, beginning=beginning))
        return SourceFile(int(audio.shape[1]), audio)
    file: LatentFile = read_latent_file(data, field)
    facts, kept = file.facts, None
    if file.audio is not None:
        kept = torch.from_numpy(read_audio(file.audio, field=field, beginning=beginning))
        if kept.shape[1] != facts.samples:
            raise InvalidRequest(f"{field}: its latents and its audio are not equally long.", field=field)
    latents = torch.from_numpy(file.latents).float()
    return SourceFile(facts.samples, kept, latents, facts.gain, facts)


def _cut(file: SourceFile, seconds: float | None) -> SourceFile:
    """The beginning of a file that is cut to a limit; what was measured may differ by a little."""
    if seconds is None or file.samples - seconds * SAMPLE_RATE <= SAMPLES_PER_FRAME:
        return file
    samples = round(seconds * SAMPLE_RATE)
    return SourceFile(
        samples,
        None if file.audio is None else file.audio[:, :samples],
        None if file.latents is None else file.latents[: -(-samples // SAMPLES_PER_FRAME)],
        file.gain,
        file.facts,
    )
