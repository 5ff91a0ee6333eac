"""From the fields of `/release_task` to the task and the audio that it works on: sources, windows, codes, tracks."""

from __future__ import annotations

import re
from typing import Any

from acestep.errors import InvalidRequest
from acestep.plan import NUM_CODES
from acestep.tasks import NO_CODES, RULES, TaskRule
from acestep.words import WINDOW_END, WINDOW_START, looks_like_window, split_names
from deployments.ingress.acestep.controls import settle_flow_edit
from deployments.ingress.acestep.fields import FIELDS
from deployments.ingress.acestep.values import Values

_CODE = re.compile(r"<\|audio_code_(\d+)\|>|(?<![\w.])(\d+)(?![\w.])")
REPAINTING: tuple[str, ...] = (
    "repaint_mode", "repaint_strength", "repaint_latent_crossfade_frames", "repaint_wav_crossfade_sec", "chunk_mask_mode"
)  # fmt: skip
REPAINTING_BALANCED: tuple[str, ...] = ("repaint_strength",)


def source_fields(v: Values, kind: str) -> dict[str, Any]:
    """What a `SongRequest` says of its task and of the audio that it works on. What the task has no use for becomes a warning.

    Raises:
        InvalidRequest: no such task, track or code, or a window that ends before it begins.
    """
    src, reference = v["src_audio_path"] or None, v["reference_audio_path"] or None
    task = v["task_type"].strip().lower() or "text2music"
    if task not in RULES:
        raise InvalidRequest(f"task_type must be one of {', '.join(RULES)}", field="task_type")
    edits = kind == "song" and settle_flow_edit(v, task, has_source=src is not None)
    codes = _codes(v)
    if task == "cover" and src is None and codes is None:
        v.warn("task_type", "cover", "text2music", "there is neither source audio nor codes")
        task = "text2music"
    rule = RULES[task]  # type: ignore[index]
    if codes is not None and kind == "song" and rule.source == "yes":
        if src is None:
            raise InvalidRequest(f"src_audio_path: task {task} needs source audio; {NO_CODES}", field="src_audio_path")
        v.warn("audio_code_string", "codes", None, f"task {task} works on source audio")
        codes = None
    noise = v["cover_noise_strength"]
    if noise > 0.0 and (src is None or not (rule.cover or rule.source == "no")):
        v.warn("cover_noise_strength", noise, 0.0, "needs source audio and one of the tasks cover and text2music")
        noise = 0.0
    if kind == "song" and src is not None and rule.source == "no" and noise == 0.0 and not edits:
        v.warn("src_audio_path", "source audio", None, f"task {task} does not use it; ask for cover or repaint")
        src = None
    if rule.window:
        _check_window_is_read(v, task)
    start, end = v["repainting_start"], v["repainting_end"]
    if end is not None and end <= 0.0 and not (end == 0.0 and start < 0.0):
        end = None  # -1 and 0 mean the end of the song; after a start before it, 0 is its beginning
    if not rule.window and (start != 0.0 or end is not None):
        v.warn("repainting_start", [start, end], None, f"task {task} has no use for it")
        start, end = 0.0, None
    if rule.window and end is not None and end <= start:
        raise InvalidRequest("repainting_end must be after repainting_start", field="repainting_end")
    _warn_of_repainting(v, task, rule)
    strength = v["audio_cover_strength"]
    if strength != 1.0 and not rule.cover and not (task == "text2music" and (codes is not None or v["thinking"])):
        v.warn("audio_cover_strength", strength, 1.0, f"task {task} has no use for it without codes")
        strength = 1.0
    if not 0.0 <= v["repaint_strength"] <= 1.0:
        raise InvalidRequest("repaint_strength must be between 0 and 1", field="repaint_strength")
    caption = v["global_caption"]
    if caption and not rule.stem:
        v.warn("global_caption", caption, "", f"task {task} has no use for it")
        caption = ""
    return {
        "task": task,
        "track_name": _track(v, task),
        "track_classes": _tracks(v, task),
        "global_caption": caption,
        "audio_codes": codes,
        "src_audio": src,
        "reference_audio": (reference,) if reference else (),
        "repainting_start": start,
        "repainting_end": end,
        "repaint_mode": v["repaint_mode"],
        "repaint_strength": v["repaint_strength"],
        "repaint_latent_crossfade_frames": v["repaint_latent_crossfade_frames"],
        "repaint_wav_crossfade_sec": v["repaint_wav_crossfade_sec"],
        "chunk_mask_mode": v["chunk_mask_mode"],
        "audio_cover_strength": strength,
        "cover_noise_strength": noise,
    }


def _check_window_is_read(v: Values, task: str) -> None:
    """What a window keeps of the source is lost where the window is misread: nothing of it is guessed."""
    for name in ("repainting_start", "repainting_end"):
        if name in v.unread:
            raise InvalidRequest(f"{name}: {v.unread[name]}", field=name)
    if stray := next((name for name in v.unknown if looks_like_window(name)), None):
        raise InvalidRequest(
            f"{stray[:100]}: unknown field, which may have been meant for the part that {task} makes anew; that is set by "
            f"{WINDOW_START[0]} and {WINDOW_END[0]}, in seconds",
            field=stray[:100],
        )


def _warn_of_repainting(v: Values, task: str, rule: TaskRule) -> None:
    names, reason = REPAINTING, f"task {task} has no use for it"
    if rule.window:
        names, reason = REPAINTING_BALANCED, f"repaint_mode {v['repaint_mode']} has no use for it"
        if v["repaint_mode"] == "balanced":
            return
    for name in names:
        if v[name] != (default := FIELDS[name].default):
            v.warn(name, v[name], default, reason)


def _codes(v: Values) -> tuple[int, ...] | None:
    """Codes as `<|audio_code_1|>...`, as numbers, or as a list of either."""
    given = v["audio_code_string"]
    text = ",".join(str(part) for part in given) if isinstance(given, list) else str(given)
    if not text.strip():
        return None
    codes = tuple(int(a or b) for a, b in _CODE.findall(text) if len(a or b) < 10)
    if not codes or max(codes) >= NUM_CODES:
        raise InvalidRequest(
            f"audio_code_string: must hold audio codes from 0 to {NUM_CODES - 1}", field="audio_code_string"
        )
    return codes


def _track(v: Values, task: str) -> str | None:
    if not v["track_name"]:
        return None
    if task not in ("extract", "lego"):
        v.warn("track_name", v["track_name"], None, f"task {task} has no use for it")
        return None
    return str(v["track_name"])


def _tracks(v: Values, task: str) -> tuple[str, ...] | None:
    names = split_names(v["track_classes"] or [])
    if names and task != "complete":
        v.warn("track_classes", ", ".join(names), None, f"task {task} has no use for it")
        return None
    return tuple(names) or None
