"""What each task needs and does, as a table, and what follows from it for a request."""

from __future__ import annotations

from dataclasses import dataclass

from acestep.request import SongRequest, Task


@dataclass(frozen=True)
class TaskRule:
    """How a task uses its inputs.

    Attributes:
        instruction: What the text prompt begins with. `{}` takes the track or tracks.
        plain: The instruction without them.
        source: Whether source audio is needed. "or codes": audio codes may stand in for it.
        window: Only a part of the song is made; the rest stays the source.
        cover: The source is followed as a cover, for a part of the steps on request.
        stem: Makes or takes out single tracks.
        metadata: The planner fills in what the request leaves open; the other tasks take everything from their source audio.
        codes: The planner writes its codes.
    """

    instruction: str
    plain: str = ""
    source: str = "no"
    window: bool = False
    cover: bool = False
    stem: bool = False
    metadata: bool = False
    codes: bool = False


FLOW_EDIT_TASKS: tuple[Task, ...] = ("text2music", "cover", "cover-nofsq")
NO_CODES = "codes cannot stand in for it: make a song of them with task cover first, and send that as source audio"
_COVER = "Generate audio semantic tokens based on the given conditions:"
RULES: dict[Task, TaskRule] = {
    "text2music": TaskRule("Fill the audio semantic mask based on the given conditions:", metadata=True, codes=True),
    "cover": TaskRule(_COVER, source="or codes", cover=True),
    "cover-nofsq": TaskRule(_COVER, source="yes", cover=True),
    "repaint": TaskRule("Repaint the mask area based on the given conditions:", source="yes", window=True),
    "lego": TaskRule(
        "Generate the {} track based on the audio context:",
        "Generate the track based on the audio context:",
        source="yes",
        window=True,
        stem=True,
        metadata=True,
    ),
    "extract": TaskRule(
        "Extract the {} track from the audio:", "Extract the track from the audio:", source="yes", stem=True
    ),
    "complete": TaskRule(
        "Complete the input track with {}:", "Complete the input track:", source="yes", stem=True, metadata=True
    ),
}


def instruction(request: SongRequest, *, codes: bool) -> str:
    """The request's own instruction, or the task's. Songs that follow planner codes are covers of them."""
    if request.instruction and request.instruction.strip():
        return request.instruction.strip()
    rule = RULES["cover" if codes and request.task == "text2music" else request.task]
    tracks = request.track_classes if request.task == "complete" else (request.track_name,)
    named = " | ".join(t.upper() for t in tracks or () if t)
    return rule.instruction.format(named) if named or not rule.plain else rule.plain


def follows_source(request: SongRequest, *, codes: bool) -> bool:
    """Whether the context is something to cover, so that `audio_cover_strength` has a meaning."""
    return RULES[request.task].cover or codes


def normalizes(request: SongRequest) -> bool:
    """Whether the peak is normalised: as asked, else where a task makes a song of its own and not a part of its source."""
    if request.normalize is not None:
        return request.normalize
    rule = RULES[request.task]
    return request.normalization_db is not None or not (rule.window or rule.stem)


def source_song_s(request: SongRequest) -> float | None:
    """Seconds of the song where source audio decides its length, with what a window adds on both sides; None where none does."""
    if request.source_s is None:
        return None
    if not RULES[request.task].window:
        return request.source_s
    parts = made_parts(request)
    return max(0.0, -parts[0][0]) + max(request.source_s, *(end or 0.0 for _, end in parts))


def made_parts(request: SongRequest) -> tuple[tuple[float, float | None], ...]:
    """The parts of its source that a request with a window makes anew, in seconds of the source and in order; None is its end."""
    if request.regions:
        return tuple((region.start, region.end) for region in request.regions)
    return ((request.repainting_start, request.repainting_end),)
