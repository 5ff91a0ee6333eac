"""What a chat message means as a song: description, lyrics, wish and audio."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from acestep.request import MAX_LYRICS_CHARS, MAX_PROMPT_CHARS, Adjustment
from deployments.api.compat.fields import adjustment, unknown_fields
from deployments.api.compat.submission import NO_VOICE

_TAGS = {
    name: (re.compile(f"<{name}>", re.IGNORECASE), re.compile(f"</{name}>", re.IGNORECASE))
    for name in ("prompt", "lyrics")
}
MAX_TEXT_CHARS = MAX_PROMPT_CHARS + MAX_LYRICS_CHARS + 100  # of a message: both texts and their tags
_SECTIONS = (
    "[verse", "[chorus", "[bridge", "[intro", "[outro", "[hook", "[pre-chorus", "[refrain", "[inst"
)  # fmt: skip
_MIN_LINES, _MAX_MEAN_LINE = 4, 60
NOTHING = "No valid prompt, lyrics, sample query, or input audio found in request"


class _Open(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        # Many clients write null where they have nothing to say.
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class InputAudio(_Open):
    data: str
    format: str = "mp3"


class Part(_Open):
    type: str
    text: str | None = None
    input_audio: InputAudio | None = None


class Message(_Open):
    role: Literal["system", "user", "assistant", "developer"]
    content: str | list[Part]


class AudioConfig(_Open):
    model_config = ConfigDict(coerce_numbers_to_str=True)
    duration: float | None = None
    format: str = "mp3"
    bpm: int | None = None
    key_scale: str | None = None
    time_signature: str | None = None
    vocal_language: str | None = None
    instrumental: bool | None = None


class ChatRequest(_Open):
    """The body of a chat completion. Fields that other models have are accepted; the answer says that they mean nothing here."""

    model: str = Field("", max_length=256, description="What follows the first / names the checkpoint.")
    messages: list[Message] = Field(min_length=1, max_length=1000)
    audio_config: AudioConfig | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0)
    max_tokens: int | None = Field(None, ge=1)
    stream: bool = False
    seed: int | str | None = None
    thinking: bool | None = None
    guidance_scale: float | None = None
    batch_size: int | None = None
    lyrics: str = ""
    sample_mode: bool = False
    use_format: bool = False
    use_cot_caption: bool = True
    use_cot_language: bool = True
    task_type: str = "text2music"
    repainting_start: float = 0.0
    repainting_end: float | None = None
    audio_cover_strength: float = 1.0
    inference_steps: int | None = None
    infer_method: str = "ode"
    lm_cfg_scale: float = 2.0
    audio_codes: str = ""
    cover_noise_strength: float = 0.0
    use_cot_metas: bool = True
    enable_normalization: bool | None = None
    normalization_db: float | None = None


@dataclass(frozen=True)
class Meaning:
    """What the last user message asks for."""

    caption: str = ""
    lyrics: str = ""
    query: str = ""
    audio: tuple[bytes, ...] = ()


def _parts(chat: ChatRequest) -> list[Part]:
    """Of the last user message, which is the one that counts."""
    last = next((m for m in reversed(chat.messages) if m.role == "user"), None)
    if last is None:
        return []
    return [Part(type="text", text=last.content)] if isinstance(last.content, str) else last.content


def read_messages(chat: ChatRequest) -> Meaning:
    """Tags first, then lyrics by their looks, else it is a description.

    Raises:
        ValueError: there is nothing to make a song of, too much text, or audio that is not base64; the text is for the caller.
    """
    parts = _parts(chat)
    text = "\n".join(p.text for p in parts if p.type == "text" and p.text).strip()
    if len(text) > MAX_TEXT_CHARS:  # before any pattern looks at it
        raise ValueError(f"messages: a text of {len(text)} characters; at most {MAX_TEXT_CHARS} make a song")
    audio = tuple(decode_audio(p.input_audio.data) for p in parts if p.type == "input_audio" and p.input_audio)
    caption, lyrics, query = _split(text, guess=not (chat.lyrics.strip() or chat.sample_mode))
    if chat.lyrics.strip():
        lyrics = chat.lyrics
    elif chat.sample_mode:
        caption, lyrics, query = "", "", text
    if chat.audio_config and chat.audio_config.instrumental and not lyrics.strip():
        lyrics = "[inst]"
    found = caption.strip() or query or audio or chat.audio_codes or chat.sample_mode
    if not found and (not lyrics.strip() or lyrics == "[inst]"):
        raise ValueError(NOTHING)
    return Meaning(caption.strip(), lyrics.strip(), query, audio)


def unused(chat: ChatRequest, meaning: Meaning) -> list[Adjustment]:
    """What of a chat means nothing to its song."""
    no_effect = "no effect on a song"
    found = unknown_fields({**(chat.model_extra or {}), "max_tokens": chat.max_tokens}, ("modalities",), no_effect)
    found += unknown_fields((chat.audio_config and chat.audio_config.model_extra) or {}, (), no_effect)
    if other := {p.type for p in _parts(chat) if p.type not in ("text", "input_audio")}:
        found.append(adjustment("messages", ", ".join(sorted(other)), None, "parts are read as text and input_audio"))
    if chat.sample_mode and chat.lyrics.strip():
        found.append(adjustment("sample_mode", True, False, "the request brings its lyrics"))
    if chat.audio_config and chat.audio_config.instrumental and meaning.lyrics.lower() not in NO_VOICE:
        found.append(adjustment("instrumental", True, False, "the request brings its lyrics"))
    return found


def _take(text: str, name: str) -> tuple[str | None, str]:
    """What the first `<name>...</name>` holds, None without one, and the text without all of them."""
    opening, closing = _TAGS[name]
    first, rest, at = None, [], 0
    while (start := opening.search(text, at)) and (end := closing.search(text, start.end())):
        first = text[start.end() : end.start()].strip() if first is None else first
        rest.append(text[at : start.start()])
        at = end.end()
    return first, "".join([*rest, text[at:]]).strip()


def _split(text: str, *, guess: bool) -> tuple[str, str, str]:
    caption, rest = _take(text, "prompt")
    lyrics, rest = _take(rest, "lyrics")
    if caption is not None or lyrics is not None:
        return (rest if caption is None else caption), lyrics or "", ""
    return ("", text, "") if guess and looks_like_lyrics(text) else (text, "", "")


def looks_like_lyrics(text: str) -> bool:
    lowered = text.lower()
    if any(section in lowered for section in _SECTIONS):
        return True
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return len(lines) >= _MIN_LINES and sum(map(len, lines)) / len(lines) < _MAX_MEAN_LINE


def decode_audio(data: str) -> bytes:
    """Base64, or a data URL of it.

    Raises:
        ValueError: it is neither.
    """
    if data.startswith("data:"):
        data = data.partition(",")[2]
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("input_audio: data is not base64") from None


def task_fields(chat: ChatRequest, meaning: Meaning) -> dict[str, Any]:
    """The request as fields of `/release_task`, without its audio."""
    config = chat.audio_config or AudioConfig()
    fields: dict[str, Any] = {
        "prompt": meaning.caption,
        "lyrics": meaning.lyrics,
        "sample_mode": chat.sample_mode and not chat.lyrics.strip(),
        "sample_query": meaning.query,
        "model": chat.model.partition("/")[2] or chat.model,
        "audio_duration": config.duration,
        "audio_format": {"ogg": "opus", "m4a": "aac"}.get(config.format.lower(), config.format),
        "bpm": config.bpm,
        "key_scale": config.key_scale,
        "time_signature": config.time_signature,
        "vocal_language": config.vocal_language,
        "lm_temperature": chat.temperature,
        "lm_top_p": chat.top_p,
        "lm_top_k": chat.top_k,
        "seed": chat.seed,
        "use_random_seed": chat.seed in (None, "", -1, "-1"),
        "batch_size": 1 if chat.batch_size is None else chat.batch_size,
        "thinking": bool(chat.thinking),
        "audio_code_string": chat.audio_codes,
    }
    same = (
        "guidance_scale", "use_format", "use_cot_caption", "use_cot_language", "task_type", "repainting_start",
        "repainting_end", "audio_cover_strength", "inference_steps", "infer_method", "lm_cfg_scale", "cover_noise_strength",
        "enable_normalization", "normalization_db",
    )  # fmt: skip
    return fields | {name: getattr(chat, name) for name in same}
