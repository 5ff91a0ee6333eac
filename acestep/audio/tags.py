"""What a finished file says about itself, in the tag format of its container."""

# mypy: disable-error-code="no-untyped-call"
# (mutagen has no types)

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from mutagen.flac import FLAC
from mutagen.id3 import COMM, ID3, SYLT, TIT2, TSSE, TXXX, USLT, Encoding
from mutagen.mp4 import MP4, AtomDataType, MP4FreeForm
from mutagen.wave import WAVE

from acestep.formats import AudioFormat
from acestep.lineage import Lineage
from acestep.plan import Metadata
from acestep.song import TimedLine

SOFTWARE = "ACE-Step 1.5"
_MP4_NAMESPACE = "----:com.acestep"
_TITLE_CHARS = 80
_MILLISECONDS, _LYRICS = 2, 1  # of SYLT


@dataclass(frozen=True)
class SongTags:
    """Provenance of one song.

    Attributes:
        title: Shown by players.
        prompt: The caption that was rendered.
        seed: Of this item.
        model: Renderer checkpoint.
        plan: Metadata that the planner or the caller decided; codes are not in the tags but in the manifest's hash.
        notice: What every listener must be told, such as that a tiny checkpoint made it.
        lineage: The songs that it was made from, and how.
        lines: Of the lyrics.
    """

    title: str
    prompt: str
    seed: int
    model: str
    plan: Metadata | None = None
    notice: str | None = None
    lineage: Lineage | None = None
    lines: Sequence[TimedLine] = ()

    @classmethod
    def titled(cls, prompt: str, **rest: Any) -> SongTags:
        """Tags whose title is the beginning of the prompt."""
        line = " ".join(prompt.split())
        title = line if len(line) <= _TITLE_CHARS else line[: _TITLE_CHARS - 1].rstrip() + "…"
        return cls(title=title or "Untitled", prompt=prompt, **rest)

    def fields(self) -> dict[str, str]:
        """Everything but the title, by upper-case field name, as text."""
        plan = {} if self.plan is None else self.plan.model_dump(exclude_none=True)
        named = {
            "PROMPT": self.prompt,
            "SEED": str(self.seed),
            "MODEL": self.model,
            "PLAN": json.dumps(plan, ensure_ascii=False, sort_keys=True) if plan else "",
            "LINEAGE": self.lineage.model_dump_json() if self.lineage else "",
            "NOTICE": self.notice or "",
        }
        return {name: value for name, value in named.items() if value}

    def comment(self) -> str:
        """All fields in one text, for containers that know only a comment."""
        return "\n".join(f"{name.lower()}: {value}" for name, value in self.fields().items())


def lrc(lines: Iterable[TimedLine]) -> str:
    """Lines as LRC: `[mm:ss.xx]text`."""
    return "\n".join(f"[{_clock(line.start)}]{line.text}" for line in lines)


def _clock(seconds: float) -> str:
    minutes, hundredths = divmod(round(seconds * 100), 6_000)
    return f"{minutes:02d}:{hundredths // 100:02d}.{hundredths % 100:02d}"


def write_tags(data: bytes, fmt: AudioFormat, tags: SongTags) -> bytes:
    """`data`, an encoded file in format `fmt`, with `tags` added. The audio in it is not touched."""
    buffer = io.BytesIO(data)
    if fmt in ("wav", "wav24", "wav32"):
        wave = WAVE(buffer)
        wave.add_tags()
        _fill_id3(wave.tags, tags)
        wave.save(buffer)
    elif fmt == "flac":
        vorbis = FLAC(buffer)
        vorbis.update(vorbis_of(tags))
        buffer.seek(0)
        vorbis.save(buffer)
    elif fmt == "aac":
        mp4 = MP4(buffer)
        mp4["\xa9nam"] = tags.title
        mp4["\xa9cmt"] = tags.comment()
        mp4["\xa9too"] = SOFTWARE
        for name, value in tags.fields().items():
            mp4[f"{_MP4_NAMESPACE}:{name}"] = MP4FreeForm(value.encode(), dataformat=AtomDataType.UTF8)
        if tags.lines:
            mp4["\xa9lyr"] = lrc(tags.lines)
        buffer.seek(0)
        mp4.save(buffer)
    else:
        raise ValueError(f"{fmt} has its tags in front, where the encoder writes them")
    return buffer.getvalue()


def id3_of(tags: SongTags) -> bytes:
    """ID3 as it stands in front of an MP3."""
    id3, buffer, utf8 = ID3(), io.BytesIO(), Encoding.UTF8
    _fill_id3(id3, tags)
    if tags.lines:
        timed = [(line.text, round(line.start * 1000)) for line in tags.lines]
        id3.add(SYLT(encoding=utf8, lang="XXX", format=_MILLISECONDS, type=_LYRICS, desc="", text=timed))
        id3.add(USLT(encoding=utf8, lang="XXX", desc="", text="\n".join(line.text for line in tags.lines)))
    id3.save(buffer)
    return buffer.getvalue()


def vorbis_of(tags: SongTags) -> dict[str, str]:
    """Vorbis comments, of FLAC and Opus."""
    lyrics = {"LYRICS": lrc(tags.lines)} if tags.lines else {}
    return {"TITLE": tags.title, "COMMENT": tags.comment(), **tags.fields(), **lyrics}


def _fill_id3(id3: Any, tags: SongTags) -> None:
    utf8 = Encoding.UTF8
    id3.add(TIT2(encoding=utf8, text=[tags.title]))
    id3.add(TSSE(encoding=utf8, text=[SOFTWARE]))
    id3.add(COMM(encoding=utf8, lang="eng", desc="", text=[tags.comment()]))
    for name, value in tags.fields().items():
        id3.add(TXXX(encoding=utf8, desc=name, text=[value]))
