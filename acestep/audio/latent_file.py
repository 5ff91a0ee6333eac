"""A song as latents in a file: safetensors with a tensor `latents` `[frames, channels]`, and in the metadata what they are.

`audio` may lie beside them: the bytes of the song's lossless file, so that what an edit keeps is kept to the sample.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load, save

from acestep.errors import InvalidRequest
from acestep.request import MAX_DURATION_S
from acestep.song import SAMPLE_RATE, SAMPLES_PER_FRAME
from acestep.source_fields import SongName, song_named

HEAD_BYTES = 65_536  # more than the header of such a file takes
MAX_CHANNELS = 1_024
MAX_GAIN = 1e4  # ±80 dB
_LATENTS, _AUDIO = "latents", "audio"
_MAX_TEXT = 256
_SIZE_BYTES = 8  # of the number in front of the header
_DTYPES = {"F16": np.float16, "F32": np.float32}


@dataclass(frozen=True)
class LatentFacts:
    """What a file says of its latents.

    Attributes:
        frames, channels: Their shape.
        samples: Length of the song that the VAE makes of them.
        vae: Name or folder of the VAE that they belong to.
        model, model_hash: The checkpoint that made them.
        gain: What its output is multiplied by to have the level of the song's files.
        song: Whose they are, in a copy that the server made.
    """

    frames: int
    channels: int
    samples: int
    vae: str = "official"
    model: str = ""
    model_hash: str = ""
    seed: str = ""
    gain: float = 1.0
    song: SongName | None = None

    @property
    def seconds(self) -> float:
        return self.samples / SAMPLE_RATE

    def check_fits(self, field: str, *, channels: int, vae: str, model: str) -> None:
        """Refuse latents of another VAE than that of the renderer `model`, which decodes them.

        Raises:
            InvalidRequest: it names both.
        """
        made = f"latents of {self.model or 'an unnamed model'}"
        if self.channels != channels:
            raise InvalidRequest(
                f"{field}: {made} have {self.channels} channels; those of {model} have {channels}.",
                field=field, asked=self.channels, limit=channels,
            )  # fmt: skip
        if self.vae != vae:
            raise InvalidRequest(
                f"{field}: {made} belong to the VAE {self.vae}; {model} has {vae}. Send the song as audio instead.",
                field=field, asked=self.vae, limit=vae,
            )  # fmt: skip


@dataclass(frozen=True, eq=False)
class LatentFile:
    """Latents `[frames, channels]`, float32 or float16, with what is said of them and maybe the song's own audio file."""

    facts: LatentFacts
    latents: npt.NDArray[Any]
    audio: bytes | None = None


def holds_latents(head: bytes) -> bool:
    """Whether the beginning of a file is that of safetensors; no kind of audio begins so."""
    return (
        len(head) > _SIZE_BYTES
        and head[_SIZE_BYTES : _SIZE_BYTES + 1] == b"{"
        and head[_SIZE_BYTES - 4 : 8] == bytes(4)
    )


def write_latent_file(file: LatentFile) -> bytes:
    """The file's bytes."""
    facts = file.facts
    metadata = {
        "format": "pt", "model": facts.model, "model_hash": facts.model_hash, "vae": facts.vae,
        "samples": str(facts.samples), "seed": facts.seed, "gain": repr(facts.gain),
    }  # fmt: skip
    if facts.song is not None:
        metadata["song"] = str(facts.song)
    tensors = {_LATENTS: np.ascontiguousarray(file.latents)}
    if file.audio is not None:
        tensors[_AUDIO] = np.frombuffer(file.audio, np.uint8)
    return save(tensors, metadata)


def read_latent_facts(head: bytes, field: str) -> LatentFacts:
    """What the beginning of a file (`HEAD_BYTES` of it) says.

    Raises:
        InvalidRequest: it is no file that `write_latent_file` wrote, or of no song that can be.
    """

    def refuse(why: str) -> InvalidRequest:
        return InvalidRequest(f"{field}: this is no latent file of a song: {why}.", field=field)

    size = int.from_bytes(head[:_SIZE_BYTES], "little")
    if not holds_latents(head) or size > len(head) - _SIZE_BYTES:
        raise refuse("its header cannot be read")
    try:
        header = json.loads(head[_SIZE_BYTES : _SIZE_BYTES + size])
        entry, said = header[_LATENTS], header.get("__metadata__", {})
        shape, dtype = tuple(map(int, entry["shape"])), entry["dtype"]
        samples, gain = int(said["samples"]), float(said.get("gain", 1.0))
        texts = {name: str(said.get(name, "")) for name in ("vae", "model", "model_hash", "seed")}
        song = song_named(str(said.get("song", "")))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise refuse("it does not say what it holds") from None
    if len(shape) != 2 or dtype not in _DTYPES or not 1 <= shape[1] <= MAX_CHANNELS:
        raise refuse(f"its latents are {dtype} {list(shape)}"[:_MAX_TEXT])
    if not 0 < samples <= MAX_DURATION_S * SAMPLE_RATE:
        limit = int(MAX_DURATION_S * SAMPLE_RATE)
        raise refuse(f"a song has 1 to {limit} samples, not {samples}"[:_MAX_TEXT])
    if shape[0] != -(-samples // SAMPLES_PER_FRAME):
        raise refuse(f"it has {shape[0]} frames for {samples} samples")
    if not 1 / MAX_GAIN <= gain <= MAX_GAIN:
        raise refuse("its gain is no number that a song's can be")
    if any(len(text) > _MAX_TEXT or not text.isprintable() for text in texts.values()):
        raise refuse("it has an unreadable name")
    texts["vae"] = texts["vae"] or LatentFacts.vae
    return LatentFacts(shape[0], shape[1], samples, gain=gain, song=song, **texts)


def read_latent_file(data: bytes, field: str) -> LatentFile:
    """All of a file.

    Raises:
        InvalidRequest: as `read_latent_facts` does, or the numbers are not finite.
    """
    facts = read_latent_facts(data[:HEAD_BYTES], field)
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise InvalidRequest(f"{field}: this is no latent file of a song: {error}.", field=field) from None
    latents, audio = tensors[_LATENTS], tensors.get(_AUDIO)
    if not math.isfinite(float(np.abs(latents.astype(np.float32)).max(initial=0.0))):
        raise InvalidRequest(f"{field}: its latents are not finite.", field=field)
    return LatentFile(facts, latents, None if audio is None else audio.tobytes())
