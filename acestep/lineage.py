"""What a song was made from, in the words that its job, its manifest and its tags have for it."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from acestep.request import SongRequest, Task
from acestep.source_fields import Parent
from acestep.tasks import RULES, made_parts, source_song_s

Verb = Literal["extend", "replace", "cover", "vary", "layer", "stem"]
_VERBS: dict[Task, Verb] = {
    "text2music": "cover", "cover": "cover", "cover-nofsq": "cover", "repaint": "replace", "lego": "layer",
    "complete": "layer", "extract": "stem",
}  # fmt: skip


class MadePart(BaseModel):
    """A part of the source that was made anew."""

    model_config = ConfigDict(frozen=True)
    start: float = Field(description="Seconds of the source; below 0 before it.")
    end: float = Field(description="Seconds of the source; beyond its length after it.")


class Lineage(BaseModel):
    """Where a song comes from."""

    model_config = ConfigDict(frozen=True)
    verb: Verb | None = Field(description="What was done; null where songs were examples of style only.")
    parents: tuple[Parent, ...] = Field(description="The songs that it was made from.")
    regions: tuple[MadePart, ...] = Field((), description="What was made anew, where the rest was kept.")


def lineage_of(request: SongRequest) -> Lineage | None:
    """Of a request whose sources were taken in; None where it has no songs to come from."""
    if not request.parents:
        return None
    fields = {parent.field for parent in request.parents}
    verb: Verb | None = None
    if "from" in fields:
        verb = "vary"
    elif "src_audio" in fields:
        verb = _VERBS[request.task]
    regions: tuple[MadePart, ...] = ()
    if request.source_s is not None and RULES[request.task].window:
        source_s = request.source_s
        parts = ((start, source_s if end is None else end) for start, end in made_parts(request))
        regions = tuple(MadePart(start=round(start, 3), end=round(end, 3)) for start, end in parts)
        if verb == "replace" and (source_song_s(request) or 0.0) > source_s:
            verb = "extend"
    return Lineage(verb=verb, parents=request.parents, regions=regions)
