"""From rendered PCM to files: level, tags, encoding, manifest. The last step of every song, in process or in a replica."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from acestep.audio.loudness import PEAK_DBFS, master
from acestep.audio.manifest import manifest
from acestep.audio.tags import SongTags
from acestep.audio.writing import encode
from acestep.errors import InvalidOutput
from acestep.formats import content_type, extension
from acestep.plan import Plan
from acestep.request import SongRequest
from acestep.song import SAMPLE_RATE, AudioFile, Song, SongItem
from acestep.tasks import normalizes

if TYPE_CHECKING:
    from acestep.dit.work import Rendered, RenderedItem


@dataclass(frozen=True)
class Maker:
    """The renderer that made the audio: checkpoint name, content hash, device name and notice."""

    model: str
    model_hash: str | None
    device: str
    notice: str | None


def finish(
    request: SongRequest,
    plan: Plan,
    rendered: Rendered,
    maker: Maker,
    put: Callable[[str, bytes], None],
    prefix: str = "",
) -> Song:
    """Encode all items in all asked formats.

    Args:
        put: Stores one file under a name such as `<prefix>0-wav.wav`; called for every file and manifest.

    Raises:
        InvalidOutput: the audio is not finite, or nothing but zeros.
    """
    began = time.monotonic()
    items = tuple(_finish_item(request, plan, rendered, item, maker, put, prefix) for item in rendered.items)
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


def _finish_item(
    request: SongRequest,
    plan: Plan,
    rendered: Rendered,
    item: RenderedItem,
    maker: Maker,
    put: Callable[[str, bytes], None],
    prefix: str,
) -> SongItem:
    if not bool(item.audio.any()):
        raise InvalidOutput(
            f"item {item.index}: every sample is zero. Try another seed; if it stays, the checkpoint or the precision is at fault.",
            item=item.index, seed=item.seed,
        )  # fmt: skip
    audio, level = master(
        item.audio.numpy(),
        SAMPLE_RATE,
        normalize=normalizes(request),
        dbfs=PEAK_DBFS if request.normalization_db is None else request.normalization_db,
        loudness_lufs=request.loudness_lufs,
    )
    metadata = plan.metadata_of(item.index)
    caption = (metadata.caption if request.use_cot_caption else None) or request.prompt
    notice = maker.notice or plan.notice
    tags = SongTags.titled(caption, seed=item.seed, model=maker.model, plan=metadata, notice=notice)
    files = []
    for fmt in request.formats:
        data = encode(audio, SAMPLE_RATE, fmt, bitrate_kbps=request.bitrate_kbps, tags=tags)
        name = f"{prefix}{item.index}-{fmt}.{extension(fmt)}"
        put(name, data)
        files.append(
            AudioFile(
                format=fmt,
                content_type=content_type(fmt),
                path=name,
                bytes=len(data),
                sha256=hashlib.sha256(data).hexdigest(),
            )
        )
    facts = manifest(
        request, plan, item=item.index, seed=item.seed, model=maker.model, model_hash=maker.model_hash,
        device=maker.device, notice=notice, settings=rendered.settings, level=level, made_gain_db=item.made_gain_db,
    )  # fmt: skip
    name = f"{prefix}{item.index}-manifest.json"
    put(name, json.dumps(facts, indent=1, ensure_ascii=False).encode())
    samples = int(item.audio.shape[-1])
    return SongItem(
        index=item.index,
        seed=item.seed,
        lm_seed=request.lm_seeds[item.index] if plan.model else None,
        duration=samples / SAMPLE_RATE,
        samples=samples,
        gain_db=round(level.gain_db, 3),
        made_gain_db=None if item.made_gain_db is None else round(item.made_gain_db, 3),
        files=tuple(files),
        manifest=name,
    )
