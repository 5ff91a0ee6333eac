"""From rendered PCM to files: level, tags, encoding, manifest. The last step of every song, in process or in a replica."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from acestep.audio.loudness import PEAK_DBFS, Loudness, master
from acestep.audio.manifest import manifest
from acestep.audio.peaks import peaks_json
from acestep.audio.shaping import faded, resampled
from acestep.audio.tags import SongTags, lrc
from acestep.audio.writing import encode
from acestep.dit.latents import write_latents
from acestep.dit.lyrics import lyric_scores, timed_lyrics
from acestep.errors import InvalidOutput
from acestep.formats import AudioFormat, content_type, extension
from acestep.lineage import lineage_of
from acestep.plan import Plan
from acestep.request import SongRequest
from acestep.song import SAMPLE_RATE, SIDECARS, AudioFile, Sidecar, SidecarKind, Song, SongItem, TimedLine
from acestep.tasks import normalizes

if TYPE_CHECKING:
    from acestep.dit.work import Rendered, RenderedItem


@dataclass(frozen=True)
class Maker:
    """The renderer that made the audio: checkpoint name, content hash, device name, notice, and its VAE."""

    model: str
    model_hash: str | None
    device: str
    notice: str | None
    vae: str = "official"


def finish(
    request: SongRequest,
    plan: Plan,
    rendered: Rendered,
    maker: Maker,
    put: Callable[[str, bytes], None],
    prefix: str = "",
    *,
    keep_latents: bool = True,
) -> Song:
    """Encode all items in all asked formats, as many at once as this process has cores. Items that were only listened to get no audio.

    Args:
        put: Stores one file under a name such as `<prefix>0-wav.wav`; called for every file and manifest, from several threads.
        keep_latents: Store what each song was decoded from, too.

    Raises:
        InvalidOutput: the audio is not finite, or nothing but zeros.
    """
    began = time.monotonic()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def one(item: RenderedItem) -> SongItem:
        files = _Sidecars(put, f"{prefix}{item.index}-")
        return _finish_item(request, plan, rendered, item, maker, files, keep_latents, encoders)

    # Codecs let go of the interpreter while they work. Two pools, since who waits for encoders must not hold their places.
    with ThreadPoolExecutor(cores, "encode") as encoders, ThreadPoolExecutor(cores, "finish") as finishers:
        items = tuple(finishers.map(one, rendered.items))
    return Song(
        items=items,
        plan=plan,
        renderer=maker.model,
        renderer_hash=maker.model_hash,
        device=maker.device,
        notice=maker.notice or plan.notice,
        timings=rendered.timings.model_copy(update={"encode_s": time.monotonic() - began}),
        settings=rendered.settings,
        adjustments=rendered.adjustments,
    )


class _Sidecars:
    """Stores the files of one item, and lists those beside its audio."""

    def __init__(self, put: Callable[[str, bytes], None], prefix: str) -> None:
        self._put = put
        self._prefix = prefix
        self.listed: list[Sidecar] = []

    def put(self, name: str, data: bytes) -> str:
        """Returns the whole name."""
        self._put(self._prefix + name, data)
        return self._prefix + name

    def add(self, kind: SidecarKind, data: bytes) -> None:
        name, content_type = SIDECARS[kind]
        path = self.put(name, data)
        self.listed.append(
            Sidecar(
                kind=kind,
                content_type=content_type,
                path=path,
                bytes=len(data),
                sha256=hashlib.sha256(data).hexdigest(),
            )
        )


def _finish_item(
    request: SongRequest,
    plan: Plan,
    rendered: Rendered,
    item: RenderedItem,
    maker: Maker,
    store: _Sidecars,
    keep_latents: bool,
    encoders: Executor,
) -> SongItem:
    lines: tuple[TimedLine, ...] = ()
    if item.heard is not None and request.timestamps:
        timed = timed_lyrics(item.heard)
        lines = timed.sentences
        store.add("lrc", lrc(lines).encode())
        store.add("lyrics", timed.model_dump_json(indent=1).encode())
    scores = lyric_scores(item.heard) if item.heard is not None and request.score else None
    samples = int(item.audio.shape[-1])
    facts: dict[str, Any] = {}
    gain = item.source_gain
    if samples:
        facts, level = _finish_audio(request, plan, rendered, item, maker, store, lines, encoders)
        gain *= 10.0 ** (level.gain_db / 20.0)
    elif item.heard is not None:
        samples = round(item.heard.seconds * SAMPLE_RATE)
    if keep_latents and item.latents is not None:
        data = write_latents(
            item.latents, samples=samples, seed=item.seed, model=maker.model, model_hash=maker.model_hash,
            vae=maker.vae, gain=gain,
        )  # fmt: skip
        store.add("latent", data)
    return SongItem(
        index=item.index,
        seed=item.seed,
        lm_seed=request.lm_seeds[item.index] if plan.model else None,
        retake_seed=request.used_retake_seed(item.index),
        duration=samples / SAMPLE_RATE,
        sidecars=tuple(store.listed),
        scores=scores,
        **{"samples": samples, **facts},
    )


def _finish_audio(
    request: SongRequest,
    plan: Plan,
    rendered: Rendered,
    item: RenderedItem,
    maker: Maker,
    store: _Sidecars,
    lines: tuple[TimedLine, ...],
    encoders: Executor,
) -> tuple[dict[str, Any], Loudness]:
    """Audio files and manifest: those fields of a `SongItem` that tell of them, and its level."""
    if not bool(item.audio.any()):
        raise InvalidOutput(
            f"item {item.index}: every sample is zero. Try another seed; if it stays, the checkpoint or the precision is at fault.",
            item=item.index, seed=item.seed,
        )  # fmt: skip
    rate = request.sample_rate
    audio, level = master(
        resampled(item.audio.numpy(), SAMPLE_RATE, rate),
        rate,
        normalize=normalizes(request),
        dbfs=PEAK_DBFS if request.normalization_db is None else request.normalization_db,
        loudness_lufs=request.loudness_lufs,
    )
    audio = faded(audio, rate, request.fade_in_duration, request.fade_out_duration)
    metadata = plan.metadata_of(item.index)
    caption = (metadata.caption if request.use_cot_caption else None) or request.prompt
    notice = maker.notice or plan.notice
    tags = SongTags.titled(
        caption,
        seed=item.seed,
        model=maker.model,
        plan=metadata,
        notice=notice,
        lineage=lineage_of(request),
        lines=lines,
    )

    def file(fmt: AudioFormat) -> AudioFile:
        data = encode(audio, rate, fmt, bitrate_kbps=request.bitrate_kbps, tags=tags)
        name = store.put(f"{fmt}.{extension(fmt)}", data)
        digest = hashlib.sha256(data).hexdigest()
        return AudioFile(format=fmt, content_type=content_type(fmt), path=name, bytes=len(data), sha256=digest)

    files = tuple(encoders.map(file, request.formats))
    store.add("peaks", peaks_json(audio, rate))
    facts = manifest(
        request, plan, item=item.index, seed=item.seed, model=maker.model, model_hash=maker.model_hash, vae=maker.vae,
        device=maker.device, notice=notice, settings=rendered.settings, level=level, made_gain_db=item.made_gain_db,
    )  # fmt: skip
    told = {
        "samples": int(audio.shape[1]),
        "sample_rate": rate,
        "gain_db": round(level.gain_db, 3),
        "made_gain_db": None if item.made_gain_db is None else round(item.made_gain_db, 3),
        "files": files,
        "manifest": store.put("manifest.json", json.dumps(facts, indent=1, ensure_ascii=False).encode()),
    }
    return told, level
