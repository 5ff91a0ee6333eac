"""What a chat message means as a song: description, lyrics, wish and audio."""

from __future__ import annotations

import base64
import binascii
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from acestep import words
from acestep.request import MAX_LYRICS_CHARS, MAX_PROMPT_CHARS, MAX_SEED, Adjustment
from deployments.ingress.acestep.values import adjustment, unknown_fields

_TAGS = {
    name: (re.compile(f"<{name}>", re.IGNORECASE), re.compile(f"</{name}>", re.IGNORECASE))
    for name in ("prompt", "lyrics")
}
MAX_TEXT_CHARS = MAX_PROMPT_CHARS + MAX_LYRICS_CHARS + 100  # of a message: both texts and their tags
_MIN_LINES, _MAX_MEAN_LINE = 4, 60
_NAMED = "|".join(re.escape(name) for name in sorted(words.SECTIONS, key=len, reverse=True))
# A line that begins a section: "[Verse 1: loud]", or alone on it "Chorus:", "(Bridge)", "**Verse 2**".
_SECTION = re.compile(
    rf"\s*(?:\[\s?(?:{_NAMED})(?!\w)|[(*#_ ]{{0,5}}(?:{_NAMED}) ?\d{{0,2}}[)*_]{{0,4}}[:：)*]\W{{0,4}}$)", re.IGNORECASE
)
_HEADING = re.compile(r"[*#_ \[(]{0,6}lyrics?(?: [*#_:：)\]]{0,6}|[*#_:：)\]]{0,6})$", re.IGNORECASE)
_PAIR = re.compile(r"\W{0,4}[\w][\w /&'-]{1,30}[:：]\s?\S")
_BULLET = re.compile(r"(?:[-*•·–—+>]|\d{1,2}[.)])\s{1,4}\S")
_TEMPO = re.compile(r"\d ?bpm\b", re.IGNORECASE)
# Fields of OpenAI's that mean nothing to a song.
NOT_OURS = frozenset((
    "max_completion_tokens", "stop", "tools", "tool_choice", "functions", "function_call", "parallel_tool_calls",
    "response_format", "user", "store", "metadata", "logprobs", "top_logprobs", "logit_bias", "frequency_penalty", "presence_penalty",
    "service_tier", "reasoning_effort", "prediction", "verbosity", "web_search_options", "safety_identifier", "prompt_cache_key",
))  # fmt: skip
_SONG_URL = re.compile(r"\s*(?:https?:/|)/\S{0,200}?(?<=/)(?:v1/audio\?|v1/jobs/)")
NOTHING = "No valid prompt, lyrics, sample query, or input audio found in request"


class OpenBody(BaseModel):
    """A body that may hold more than what is known here."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        # Many clients write null where they have nothing to say.
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


Said = Annotated[str, Field(max_length=1 << 20)]  # what is too long to mean anything is warned of, not refused


class InputAudio(OpenBody):
    data: str = Field(description="Base64, or a data URL.")  # as long as the body may be
    format: Said = Field("mp3", description="Of the data; what it really is decides.")


class AudioUrl(OpenBody):
    """As answers have it."""

    url: str = Field(description="Data URL, or URL of an own song.")


class Part(OpenBody):
    type: Said = Field(description="text, input_audio or audio_url.")
    text: Said | None = Field(None, description="Of type text.")
    input_audio: InputAudio | None = Field(None, description="Of type input_audio.")
    audio_url: AudioUrl | None = Field(None, description="Of type audio_url.")


class Message(OpenBody):
    role: Literal["system", "user", "assistant", "developer", "tool", "function"] = Field(
        description="The last of user counts."
    )
    content: Said | Annotated[list[Part], Field(max_length=1000)] | None = Field(None, description="Text, or parts.")


class AudioConfig(OpenBody):
    model_config = ConfigDict(coerce_numbers_to_str=True)
    duration: float | Said | None = Field(None, description="Seconds, also as '3:30'; left out: the planner decides.")
    format: Said | None = Field(None, description="Such as mp3, which it is by default, wav, flac.")
    bpm: float | Said | None = Field(None, description="Beats per minute.")
    key_scale: Said | None = Field(None, description="Such as 'F# minor'.")
    time_signature: Said | None = Field(None, description="2, 3, 4 or 6; also as '6/8'.")
    vocal_language: Said | None = Field(None, description="Code or name.")
    instrumental: bool | None = Field(None, description="Nobody sings.")


class OutputAudio(OpenBody):
    """OpenAI's way to ask for a format. Its `voice` means nothing to a song."""

    format: Said | None = Field(None, description="As in audio_config.")


class StreamOptions(OpenBody):
    include_usage: bool = Field(False, description="End the stream with its usage.")


class ChatRequest(OpenBody):
    """The body of a chat completion. Every field of `/release_task` is one of a chat, too; fields that other models have are accepted, and the
    answer says that they mean nothing here."""

    model: str = Field("", max_length=256, description="What follows the first / names the checkpoint.")
    messages: list[Message] = Field(min_length=1, max_length=1000, description="The last one of the user is the song.")
    audio_config: AudioConfig | None = Field(None, description="Metadata and format of the song.")
    audio: OutputAudio | None = Field(None, description="A format, as OpenAI has it.")
    modalities: list[Said] | None = Field(
        None, max_length=10,
        description="Without `audio` in it songs come as links alone; left out: as data up to 16 MiB, beyond it as links.",
    )  # fmt: skip
    n: int | None = Field(None, ge=1, description="As batch_size.")
    stream_options: StreamOptions | None = Field(None, description="What a stream holds.")
    temperature: float | None = Field(None, ge=0, le=2, description="Of the planner's sampling.")
    top_p: float | None = Field(
        None, ge=0, le=1, description="The planner chooses among the likeliest tokens of this probability together."
    )
    top_k: int | None = Field(None, ge=0, description="The planner chooses among so many tokens; 0 switches it off.")
    max_tokens: int | None = Field(None, ge=1, description="Has no effect on a song.")
    stream: bool = Field(False, description="Answer as server-sent events.")
    seed: int | Said | None = Field(None, description="One, or one per song, with commas; left out: random.")
    lm_seed: int | None = Field(None, ge=0, le=MAX_SEED, description="The planner's own seed.")
    thinking: bool | None = Field(None, description="The planner writes audio codes.")
    guidance_scale: float | None = Field(None, description="Left out: the checkpoint's default.")
    batch_size: int | None = Field(None, description="Number of songs.")
    lyrics: Annotated[Said, BeforeValidator(words.read_text)] = Field(
        "", description="Instead of lyrics in the message."
    )
    sample_mode: bool = Field(False, description="The message is a wish; the planner writes the song.")
    use_format: bool = Field(False, description="The planner writes the description anew first.")
    use_cot_caption: bool = Field(True, description="The renderer reads the planner's description.")
    use_cot_language: bool = Field(True, description="The planner decides the language where none is given.")
    task_type: Said = Field("text2music", description="As `task` of /v1/music.")
    repainting_start: float | Said = Field(
        0.0, validation_alias=AliasChoices(*words.WINDOW_START), description="Seconds; begin of the window."
    )
    repainting_end: float | Said | None = Field(
        None, validation_alias=AliasChoices(*words.WINDOW_END), description="Seconds; end of the window."
    )
    audio_cover_strength: float = Field(1.0, description="The share of steps, from the first, that follow the source.")
    inference_steps: int | None = Field(None, description="Left out: the checkpoint's default.")
    infer_method: Said = Field("ode", description="ode or sde.")
    lm_cfg_scale: float = Field(2.0, description="The planner's guidance; 1 switches it off.")
    audio_codes: Said | Annotated[list[int | Said], Field(max_length=3_000)] = Field(
        "", description="Skips the planning of codes."
    )
    cover_noise_strength: float = Field(
        0.0, description="Begin from the source instead of noise, the more so the higher."
    )
    use_cot_metas: bool = Field(True, description="The planner decides metadata that are not given.")
    enable_normalization: bool | None = Field(None, description="As `normalize` of /v1/music.")
    normalization_db: float | None = Field(None, description="dBFS of the highest sample.")

    @property
    def wants_data(self) -> bool:
        """Whether songs may come within the answer."""
        return self.modalities is None or "audio" in self.modalities

    @model_validator(mode="before")
    @classmethod
    def _only_the_last_counts(cls, data: Any) -> Any:
        """What other turns hold, such as null beside a tool call, is not looked at."""
        turns = data.get("messages") if isinstance(data, dict) else None
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            return data
        last = max((i for i, turn in enumerate(turns) if turn.get("role") == "user"), default=None)
        turns = [turn if i == last else {"role": turn.get("role")} for i, turn in enumerate(turns)]
        return {**data, "messages": turns}

    @model_validator(mode="after")
    def _has_content(self) -> ChatRequest:
        asked = [m.content for m in self.messages if m.role == "user"]
        if asked and asked[-1] is None:
            raise ValueError("messages: the last user message has no content")
        return self


@dataclass(frozen=True)
class Meaning:
    """What the last user message asks for."""

    caption: str = ""
    lyrics: str = ""
    query: str = ""
    audio: tuple[bytes | str, ...] = ()  # what was sent, or the URL of a song of this server
    guessed: str = ""


def _parts(chat: ChatRequest) -> list[Part]:
    """Of the last user message, which is the one that counts."""
    content = next((m.content for m in reversed(chat.messages) if m.role == "user"), None)
    return [Part(type="text", text=content)] if isinstance(content, str) else content or []


def read_messages(chat: ChatRequest) -> Meaning:
    """Fields and tags first, then lyrics by their looks, else it is a description.

    Raises:
        ValueError: there is nothing to make a song of, too much text, or audio that is not base64; the text is for the caller.
    """
    parts = _parts(chat)
    text = "\n".join(p.text for p in parts if p.type == "text" and p.text).strip()
    if len(text) > MAX_TEXT_CHARS:  # before any pattern looks at it
        raise ValueError(f"messages: a text of {len(text)} characters; at most {MAX_TEXT_CHARS} make a song")
    audio = tuple(
        decode_audio(data)
        for p in parts
        for data in (
            [p.input_audio.data] if p.type == "input_audio" and p.input_audio
            else [p.audio_url.url] if p.type == "audio_url" and p.audio_url else []
        )
    )  # fmt: skip
    query = ""
    if chat.sample_mode and not chat.lyrics.strip():
        caption, lyrics, query, guessed = "", "", words.read_text(text).strip(), ""
    else:
        caption, lyrics, guessed = split_text(text, chat.lyrics)
    if chat.audio_config and chat.audio_config.instrumental and not lyrics.strip():
        lyrics = "[inst]"
    found = caption.strip() or query or audio or chat.audio_codes or chat.sample_mode
    if not found and words.is_instrumental(lyrics):
        raise ValueError(NOTHING)
    return Meaning(caption.strip(), lyrics.strip(), query, audio, guessed)


def split_text(text: str, lyrics: str = "") -> tuple[str, str, str]:
    """Description, lyrics, and why where that had to be guessed: by its tags, else by its looks.

    Args:
        lyrics: Where they come beside the text, which then is a description.
    """
    text = words.read_text(text).strip()
    caption, rest = _take(text, "prompt")
    tagged, rest = _take(rest, "lyrics")
    if not lyrics.strip() and caption is None and tagged is None:
        return guess(text)
    return (rest if caption is None else caption), (lyrics if lyrics.strip() else tagged or ""), ""


def unused(chat: ChatRequest, meaning: Meaning) -> list[Adjustment]:
    """What of a chat means nothing to its song, and what had to be guessed."""
    no_effect = "no effect on a song"
    theirs = {name: value for name, value in (chat.model_extra or {}).items() if name in NOT_OURS}
    found = unknown_fields({**theirs, "max_tokens": chat.max_tokens}, (), no_effect)
    for part in (chat.audio_config, chat.audio, chat.stream_options):
        found += unknown_fields((part and part.model_extra) or {}, (), no_effect)
    if other := {p.type for p in _parts(chat) if p.type not in ("text", "input_audio", "audio_url")}:
        read = "parts are read as text, input_audio and audio_url"
        found.append(adjustment("messages", ", ".join(sorted(other)), None, read))
    if meaning.guessed:
        taken = {"prompt": meaning.caption, "lyrics": meaning.lyrics}
        given = " and ".join(name for name, text in taken.items() if text)
        found.append(adjustment("messages", "a text without <prompt> and <lyrics>", given, meaning.guessed))
    if chat.n is not None and chat.batch_size is not None and chat.n != chat.batch_size:
        found.append(adjustment("n", chat.n, chat.batch_size, "batch_size goes first"))
    if chat.sample_mode and chat.lyrics.strip():
        found.append(adjustment("sample_mode", True, False, "the request brings its lyrics"))
    if chat.audio_config and chat.audio_config.instrumental and not words.is_instrumental(meaning.lyrics):
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


def guess(text: str) -> tuple[str, str, str]:
    """Caption, lyrics and why, of a text that does not say which is which. There is no why where nobody could doubt."""
    lines = text.splitlines()
    heading = next((i for i, line in enumerate(lines) if _HEADING.match(line.strip()[:40])), None)
    if heading is not None and any(line.strip() for line in lines[heading + 1 :]):
        return "\n".join(lines[:heading]), "\n".join(lines[heading + 1 :]), "lyrics follow their heading"
    section = next((i for i, line in enumerate(lines) if _SECTION.match(line[:80])), None)
    if section is not None:
        if section == 0 or _is_verse(lines[:section]):
            return "", text, "a section tag: it is lyrics"
        return "\n".join(lines[:section]), "\n".join(lines[section:]), "lyrics begin with the first section tag"
    if _is_verse(lines):
        return "", text, f"{_MIN_LINES} or more short lines: it is lyrics"
    return text, "", "it does not look like lyrics: it is a description" if len(lines) > 1 else ""


def looks_like_lyrics(text: str) -> bool:
    return bool(guess(text)[1])


def _is_verse(lines: list[str]) -> bool:
    """Some short lines that neither list nor describe nor ask for something."""
    lines = [line.strip() for line in lines if line.strip()]
    if len(lines) < _MIN_LINES or sum(map(len, lines)) / len(lines) >= _MAX_MEAN_LINE:
        return False
    opening = " ".join(lines[:2]).casefold()
    asked = opening.startswith(words.REQUESTS) and not words.REQUESTED.isdisjoint(_words_of(opening))
    listed = sum(bool(_PAIR.match(line) or _BULLET.match(line) or line.count(",") > 2) for line in lines)
    described = sum(not words.DESCRIBED.isdisjoint(_words_of(line)) for line in lines)
    return not (asked or 2 * listed >= len(lines) or 2 * described >= len(lines) or any(map(_TEMPO.search, lines)))


def _words_of(line: str) -> list[str]:
    return re.findall(r"[\w'-]+", line.casefold())


def decode_audio(data: str) -> bytes | str:
    """Base64, or a data URL of it; the URL of a song stays one.

    Raises:
        ValueError: it is none of them.
    """
    if _SONG_URL.match(data):
        return data
    if data.startswith("data:"):
        data = data.partition(",")[2]
    try:
        return base64.b64decode("".join(data.split()), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("input_audio: data is neither base64 nor the URL of a song of this server") from None


def task_fields(chat: ChatRequest, meaning: Meaning) -> dict[str, Any]:
    """The request as fields of `/release_task`, without its audio."""
    config = chat.audio_config or AudioConfig()
    extra = {name: value for name, value in (chat.model_extra or {}).items() if name not in NOT_OURS}
    fields: dict[str, Any] = {
        "prompt": meaning.caption,
        "lyrics": meaning.lyrics,
        "sample_mode": chat.sample_mode and not chat.lyrics.strip(),
        "sample_query": meaning.query,
        "model": chat.model.partition("/")[2] or chat.model,
        "audio_duration": config.duration,
        "audio_format": config.format or (chat.audio and chat.audio.format),
        "bpm": config.bpm,
        "key_scale": config.key_scale,
        "time_signature": config.time_signature,
        "vocal_language": config.vocal_language,
        "lm_temperature": chat.temperature,
        "lm_top_p": chat.top_p,
        "lm_top_k": chat.top_k,
        "seed": chat.seed,
        "use_random_seed": chat.seed in (None, "", -1, "-1"),
        "batch_size": (chat.n or 1) if chat.batch_size is None else chat.batch_size,
        "thinking": bool(chat.thinking),
        "audio_code_string": chat.audio_codes,
    }
    same = (
        "guidance_scale", "use_format", "use_cot_caption", "use_cot_language", "use_cot_metas", "task_type", "repainting_start",
        "repainting_end", "audio_cover_strength", "inference_steps", "infer_method", "lm_seed", "lm_cfg_scale", "cover_noise_strength",
        "enable_normalization", "normalization_db",
    )  # fmt: skip
    fields |= {name: getattr(chat, name) for name in same}
    return extra | {name: value for name, value in fields.items() if value is not None}
