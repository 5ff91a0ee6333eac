"""The refusal of requests that a checkpoint cannot do or that make no sense together, and notes on what may not be what was meant."""

from __future__ import annotations

from pathlib import Path

from acestep.checkpoints.published import LYRIC_HEADS, VariantDefaults
from acestep.errors import InvalidRequest
from acestep.request import TRACKS, Adjustment, SongRequest
from acestep.tasks import FLOW_EDIT_TASKS, NO_CODES, RULES, TaskRule, made_parts


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
    _check_lyric_heads(request, defaults, name)
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
    _check_flow_edit(request)
    uses_source = request.cover_noise_strength > 0.0 or request.flow_edit_morph
    if request.src_audio is not None and rule.source == "no" and not uses_source:
        raise InvalidRequest(
            f"src_audio: task {request.task} would not use it. Ask for task cover, or set cover_noise_strength above 0 or "
            "flow_edit_morph.",
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


def _check_flow_edit(request: SongRequest) -> None:
    if not request.flow_edit_morph:
        return
    if request.task not in FLOW_EDIT_TASKS:
        raise InvalidRequest(
            f"flow_edit_morph: is for the tasks {', '.join(FLOW_EDIT_TASKS)}, not {request.task}.",
            field="flow_edit_morph", asked=request.task, allowed=list(FLOW_EDIT_TASKS),
        )  # fmt: skip
    if request.src_audio is None:
        raise InvalidRequest("flow_edit_morph: needs src_audio, which it edits.", field="flow_edit_morph")
    unused = {
        "cover_noise_strength": request.cover_noise_strength > 0.0,
        "audio_cover_strength": request.audio_cover_strength < 1.0,
        "audio_codes": request.audio_codes is not None and request.task == "text2music",
        "plan": bool(request.plan and request.plan.codes) and request.task == "text2music",
    }
    for name in (name for name, is_set in unused.items() if is_set):
        raise InvalidRequest(f"{name}: flow edit has no use for it.", field=name)


def notes(request: SongRequest) -> list[Adjustment]:
    """What is done as asked, but may not be what was meant. Source audio has been measured."""
    told = []
    for field, names in (("track_name", (request.track_name,)), ("track_classes", request.track_classes or ())):
        for name in names:
            if name is not None and name not in TRACKS:
                reason = f"taken as it is; the models learned {', '.join(TRACKS)}"
                told.append(Adjustment(field=field, asked=name, given=name, reason=reason))
    if request.flow_edit_morph and not (request.flow_edit_source_caption + request.flow_edit_source_lyrics).strip():
        reason = "nothing is said of the source, so that little will change"
        told.append(Adjustment(field="flow_edit_source_caption", asked="", given="", reason=reason))
    parts = made_parts(request)
    start, end = parts[0]
    whole = (
        len(parts) == 1 and start <= 0.0 and (end is None or (request.source_s is not None and end >= request.source_s))
    )
    if request.task == "repaint" and whole:
        reason = "the window is the whole song: nothing of the source is kept"
        if not request.regions:
            reason += "; repainting_start and repainting_end set it"
        field = "regions" if request.regions else "repainting_start"
        told.append(Adjustment(field=field, asked=[start, end], given=[start, end], reason=reason))
    return told


def _check_unused(request: SongRequest, rule: TaskRule) -> None:
    """Fields that the task has no use for are refused, so that no wish is dropped in silence."""
    unused = {
        "repainting_start": not rule.window and request.repainting_start != 0.0,
        "repainting_end": not rule.window and request.repainting_end is not None,
        "regions": request.task != "repaint" and bool(request.regions),
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


def _check_lyric_heads(request: SongRequest, defaults: VariantDefaults, name: str) -> None:
    if request.listens and not defaults.lyric_heads:
        field = "timestamps" if request.timestamps else "score"
        raise InvalidRequest(
            f"{field}: it is not known which attention heads of {name} follow the lyrics; its config.json has no {LYRIC_HEADS}.",
            field=field,
        )


def check_files(request: SongRequest, src_audio: Path | None, reference_audio: tuple[Path, ...]) -> None:
    """The files that the request names must have been resolved. Missing audio is an error, never silence."""
    if request.src_audio is not None and src_audio is None:
        raise InvalidRequest("src_audio: the file was not found or not allowed.", field="src_audio")
    if len(reference_audio) != len(request.reference_audio):
        raise InvalidRequest("reference_audio: a file was not found or not allowed.", field="reference_audio")
