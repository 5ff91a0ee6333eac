"""From rendered PCM to files: level, tags, encoding, manifest. The last step of every song, in process or in a replica."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from acestep.audio.live import LiveItem
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
    """A rendered song as files; see `Finish`.

    Raises:
        InvalidOutput: the audio is not finite, or nothing but zeros.
    """
    with Finish(request, plan, maker, put, prefix, keep_latents=keep_latents) as finishing:
        return finishing.song(rendered)


class Finish:
    """Encodes the items of a song in all asked formats, each as soon as it comes, as many at once as this process has cores.

    Items that were only listened to get no audio. Leaving the context waits for what is under way.

    Args:
        put: Stores one file under a name such as `<prefix>0-wav.wav`; called for every file and manifest, from several threads.
        keep_latents: Store what each song was decoded from, too.
        live: Who listens to an item while it is encoded, by its index.
    """

    def __init__(
        self, request: SongRequest, plan: Plan, maker: Maker, put: Callable[[str, bytes], None], prefix: str = "",
        *, keep_latents: bool = True, live: Mapping[int, LiveItem] | None = None,
    ) -> None:  # fmt: skip
        self._request, self._plan, self._maker, self._live = request, plan, maker, live or {}
        self._put, self._prefix, self._keep_latents = put, prefix, keep_latents
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        # Codecs let go of the interpreter while they work. Two pools, since who waits for encoders must not hold their places.
        self._encoders = ThreadPoolExecutor(cores, "encode")
        self._finishers = ThreadPoolExecutor(cores, "finish")
        self._items: dict[int, Future[SongItem]] = {}
        self._left = False

    def __enter__(self) -> Finish:
        return self

    def __exit__(self, *_: object) -> None:
        self._left = True
        self._finishers.shutdown(cancel_futures=True)
        self._encoders.shutdown()

    def add(self, item: RenderedItem, settings: dict[str, Any]) -> None:
        """Begin with an item, while others are still rendered. Once the context is left, none is taken.

        Args:
            settings: As in `Rendered`.
        """
        if self._left:
            return
        self._items[item.index] = self._finishers.submit(self._finished, item, settings)

    def song(self, rendered: Rendered) -> Song:
        """Wait for all items; those that have not come yet begin now.

        Raises:
            InvalidOutput: the audio of one is not finite, or nothing but zeros.
        """
        began = time.monotonic()
        for item in rendered.items:
            if item.index not in self._items:
                self.add(item, rendered.settings)
        return Song(
            items=tuple(self._items[item.index].result() for item in rendered.items),
            plan=self._plan,
            renderer=self._maker.model,
            renderer_hash=self._maker.model_hash,
            device=self._maker.device,
            notice=self._maker.notice or self._plan.notice,
            timings=rendered.timings.model_copy(update={"encode_s": time.monotonic() - began}),
            settings=rendered.settings,
            adjustments=rendered.adjustments,
        )

    def _finished(self, item: RenderedItem, settings: dict[str, Any]) -> SongItem:
        files = _Sidecars(self._put, f"{self._prefix}{item.index}-")
        return _finish_item(
            self._request, self._plan, settings, item, self._maker, files, self._keep_latents, self._encoders,
            self._live.get(item.index),
        )  # fmt: skip


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
    settings: dict[str, Any],
    item: RenderedItem,
    maker: Maker,
    store: _Sidecars,
    keep_latents: bool,
    encoders: Executor,
    live: LiveItem | None,
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
        facts, level = _finish_audio(request, plan, settings, item, maker, store, lines, encoders, live)
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
    settings: dict[str, Any],
    item: RenderedItem,
    maker: Maker,
    store: _Sidecars,
    lines: tuple[TimedLine, ...],
    encoders: Executor,
    live: LiveItem | None,
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
    if live is not None:
        live.final(audio, rate, tags)

    def file(fmt: AudioFormat) -> AudioFile:
        ready = None if live is None else live.file(fmt)
        data = encode(audio, rate, fmt, bitrate_kbps=request.bitrate_kbps, tags=tags, ready=ready)
        name = store.put(f"{fmt}.{extension(fmt)}", data)
        if live is not None:
            live.stored(fmt, name)
        digest = hashlib.sha256(data).hexdigest()
        return AudioFile(format=fmt, content_type=content_type(fmt), path=name, bytes=len(data), sha256=digest)

    files = tuple(encoders.map(file, request.formats))
    store.add("peaks", peaks_json(audio, rate))
    facts = manifest(
        request, plan, item=item.index, seed=item.seed, model=maker.model, model_hash=maker.model_hash, vae=maker.vae,
        device=maker.device, notice=notice, settings=settings, level=level, made_gain_db=item.made_gain_db,
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
