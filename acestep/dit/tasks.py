"""What each task needs and forbids, as a table, and the refusal of requests that a checkpoint cannot do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from acestep.checkpoints.published import VariantDefaults
from acestep.errors import InvalidRequest
from acestep.request import TRACKS, Adjustment, SongRequest, Task
from acestep.song import LATENT_FPS


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
    """

    instruction: str
    plain: str = ""
    source: str = "no"
    window: bool = False
    cover: bool = False
    stem: bool = False


NO_CODES = "codes cannot stand in for it: make a song of them with task cover first, and send that as source audio"
_COVER = "Generate audio semantic tokens based on the given conditions:"
RULES: dict[Task, TaskRule] = {
    "text2music": TaskRule("Fill the audio semantic mask based on the given conditions:"),
    "cover": TaskRule(_COVER, source="or codes", cover=True),
    "cover-nofsq": TaskRule(_COVER, source="yes", cover=True),
    "repaint": TaskRule("Repaint the mask area based on the given conditions:", source="yes", window=True),
    "lego": TaskRule(
        "Generate the {} track based on the audio context:",
        "Generate the track based on the audio context:",
        source="yes",
        window=True,
        stem=True,
    ),
    "extract": TaskRule(
        "Extract the {} track from the audio:", "Extract the track from the audio:", source="yes", stem=True
    ),
    "complete": TaskRule("Complete the input track with {}:", "Complete the input track:", source="yes", stem=True),
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
    return max(0.0, -request.repainting_start) + max(request.source_s, request.repainting_end or 0.0)


def check(request: SongRequest, defaults: VariantDefaults, name: str) -> None:
    """Refuse what the checkpoint `name` cannot do or what makes no sense together.

    Raises:
        InvalidRequest: names the field, and where there is one, the limit.
    """
    rule = RULES[request.task]
    if request.task not in defaults.tasks:
        raise InvalidRequest(
            f"task: {name} cannot do {request.task}; it does {', '.join(defaults.tasks)}. Use a base or sft checkpoint.",
            field="task", asked=request.task, allowed=list(defaults.tasks),
        )  # fmt: skip
    for field, asked in (("steps", request.steps or 0), ("timesteps", len(request.timesteps or ()))):
        if asked > defaults.max_steps:
            raise InvalidRequest(
                f"{field}: {name} takes at most {defaults.max_steps} steps, not {asked}.",
                field=field, asked=asked, limit=defaults.max_steps,
            )  # fmt: skip
    if request.sampler == "heun" and request.infer_method == "sde":
        raise InvalidRequest("sampler: heun is a method for ode; use euler with sde.", field="sampler")
    has_codes = request.audio_codes is not None or bool(request.plan and request.plan.codes)
    if request.src_audio is None and (rule.source == "yes" or (rule.source == "or codes" and not has_codes)):
        instead = f"; {NO_CODES}" if has_codes else ""
        raise InvalidRequest(f"src_audio: task {request.task} needs source audio{instead}.", field="src_audio")
    if has_codes and rule.source == "yes":
        raise InvalidRequest(
            f"audio_codes: task {request.task} works on source audio, not on codes.", field="audio_codes"
        )
    if request.src_audio is not None and rule.source == "no" and request.cover_noise_strength == 0.0:
        raise InvalidRequest(
            f"src_audio: task {request.task} would not use it. Ask for task cover, or set cover_noise_strength above 0.",
            field="src_audio",
        )
    if request.cover_noise_strength > 0.0 and (request.src_audio is None or not (rule.cover or rule.source == "no")):
        raise InvalidRequest(
            "cover_noise_strength: needs src_audio, and one of the tasks cover, cover-nofsq and text2music.",
            field="cover_noise_strength",
        )
    if rule.window and request.repainting_end is not None and request.repainting_end <= request.repainting_start:
        raise InvalidRequest(
            f"repainting_end: {request.repainting_end:g} s is not after repainting_start, {request.repainting_start:g} s.",
            field="repainting_end", asked=request.repainting_end, limit=request.repainting_start,
        )  # fmt: skip
    _check_unused(request, rule)


def check_window(request: SongRequest, source_s: float) -> None:
    """Refuse a window that leaves a gap after a source of `source_s` seconds.

    A window that starts where the source ends (to within a frame: files are rarely as long as they say) goes on from there.

    Raises:
        InvalidRequest: with the source's length.
    """
    start_s, end_s = request.repainting_start, request.repainting_end
    continues = end_s is not None and end_s > source_s and start_s < source_s + 1 / LATENT_FPS
    if RULES[request.task].window and start_s >= source_s and start_s > 0 and not continues:
        raise InvalidRequest(
            f"repainting_start: {start_s:g} s is past the end of the source audio, {source_s:.3f} s.",
            field="repainting_start", asked=start_s, limit=source_s,
        )  # fmt: skip


def notes(request: SongRequest) -> list[Adjustment]:
    """What is done as asked, but may not be what was meant. Source audio has been measured."""
    told = []
    for field, names in (("track_name", (request.track_name,)), ("track_classes", request.track_classes or ())):
        for name in names:
            if name is not None and name not in TRACKS:
                reason = f"taken as it is; the models learned {', '.join(TRACKS)}"
                told.append(Adjustment(field=field, asked=name, given=name, reason=reason))
    start, end = request.repainting_start, request.repainting_end
    whole = start <= 0.0 and (end is None or (request.source_s is not None and end >= request.source_s))
    if request.task == "repaint" and whole:
        reason = (
            "the window is the whole song: nothing of the source is kept; repainting_start and repainting_end set it"
        )
        told.append(Adjustment(field="repainting_start", asked=[start, end], given=[start, end], reason=reason))
    return told


def _check_unused(request: SongRequest, rule: TaskRule) -> None:
    """Fields that the task has no use for are refused, so that no wish is dropped in silence."""
    unused = {
        "repainting_start": not rule.window and request.repainting_start != 0.0,
        "repainting_end": not rule.window and request.repainting_end is not None,
        "track_name": request.task not in ("extract", "lego") and request.track_name is not None,
        "track_classes": request.task != "complete" and bool(request.track_classes),
        "global_caption": not rule.stem and bool(request.global_caption),
        "audio_cover_strength": (
            not rule.cover and request.task != "text2music" and request.audio_cover_strength != 1.0
        ),
    }
    for field, is_set in unused.items():
        if is_set:
            raise InvalidRequest(f"{field}: task {request.task} has no use for it.", field=field)


def check_files(request: SongRequest, src_audio: Path | None, reference_audio: tuple[Path, ...]) -> None:
    """The files that the request names must have been resolved. Missing audio is an error, never silence."""
    if request.src_audio is not None and src_audio is None:
        raise InvalidRequest("src_audio: the file was not found or not allowed.", field="src_audio")
    if len(reference_audio) != len(request.reference_audio):
        raise InvalidRequest("reference_audio: a file was not found or not allowed.", field="reference_audio")
