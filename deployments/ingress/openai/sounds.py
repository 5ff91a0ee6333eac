"""What the bodies of other servers' audio routes mean as a song."""

from __future__ import annotations

import re
from abc import abstractmethod
from typing import Annotated, Any, Literal

from fastapi import HTTPException
from pydantic import AliasChoices, BeforeValidator, ConfigDict, Field, model_validator

from acestep import words
from acestep.formats import FORMATS, AudioFormat
from acestep.request import (
    MAX_LYRICS_CHARS,
    MAX_PROMPT_CHARS,
    MAX_SEED,
    Adjustment,
    Bpm,
    Caption,
    Duration,
    Key,
    Language,
    Lyrics,
    TimeSignature,
)
from deployments.ingress.acestep.values import adjustment, unknown_fields
from deployments.ingress.openai.messages import MAX_TEXT_CHARS, OpenBody, split_text

NO_EFFECT = "no effect on a song"
_OUTPUT = re.compile(r"([a-z0-9]{2,10}?)(?:_([0-9]{4,6})(?:_([0-9]{1,4}))?)?")


_FORMAT_NAMES = AliasChoices("response_format", "audio_format", "format")
Format = Annotated[AudioFormat, BeforeValidator(words.read_format)]


class SoundBody(OpenBody):
    """A body that asks for one song and is answered with its file. Fields of `/release_task` work in all of them."""

    model_config = ConfigDict(coerce_numbers_to_str=True)
    model: str = Field(
        "", max_length=256, validation_alias=AliasChoices("model", "model_id"), examples=["acestep-v15-turbo"],
        description="Renderer checkpoint, with or without `acestep/` in front; empty: the default. `model_id` is the same.",
    )  # fmt: skip

    @abstractmethod
    def song(self) -> dict[str, Any]:
        """The song as fields of `/release_task`."""

    def fields(self) -> dict[str, Any]:
        """All of the body as fields of `/release_task`."""
        asked = {
            "model": self.model.partition("/")[2] or self.model, "thinking": True, **(self.model_extra or {})
        }  # fmt: skip
        own = {name: value for name, value in self.song().items() if value not in (None, "")}
        return {name: value for name, value in (asked | own).items() if name not in self.ignored()} | {"batch_size": 1}

    def ignored(self) -> tuple[str, ...]:
        """Fields that other models have."""
        return ()

    def warnings(self) -> list[Adjustment]:
        """What has no effect on a song."""
        sent = {name: (self.model_extra or {}).get(name) for name in self.ignored()}
        count = (self.model_extra or {}).get("batch_size")
        told = [] if count in (None, 1) else [adjustment("batch_size", count, 1, "the answer is one song")]
        return [*unknown_fields(sent, (), NO_EFFECT), *told]


class GenerationBody(SoundBody):
    """As lemonade (`prompt`, `duration`, ...) and vLLM-Omni (`input`, `audio_length`, ...) have it."""

    prompt: Caption = Field(
        min_length=1, max_length=MAX_PROMPT_CHARS, validation_alias=AliasChoices("prompt", "input"), examples=["calm piano, rain"],
        description="Description of the music. `input` is the same.",
    )  # fmt: skip
    lyrics: Lyrics = Field(
        "",
        max_length=MAX_LYRICS_CHARS,
        description="Lyrics; empty means instrumental.",
        examples=["[verse]\nLights go by"],
    )
    vocal_language: Language = Field(None, description="Code or name; left out: the planner decides.", examples=["en"])
    duration: Duration = Field(
        None, validation_alias=AliasChoices("duration", "audio_length"), examples=[30],
        description="Seconds; left out: the planner decides. `audio_length` is the same.",
    )  # fmt: skip
    steps: int | None = Field(
        None, ge=1, le=200, validation_alias=AliasChoices("steps", "num_inference_steps"), examples=[8],
        description="Denoising steps; left out: the checkpoint's default. `num_inference_steps` is the same.",
    )  # fmt: skip
    cfg: float | None = Field(
        None, ge=1, le=30, validation_alias=AliasChoices("cfg", "guidance_scale"), examples=[7.0],
        description="Guidance; left out: the checkpoint's default. `guidance_scale` is the same.",
    )  # fmt: skip
    negative_prompt: Caption | None = Field(
        None,
        max_length=MAX_PROMPT_CHARS,
        description="What the planner's guidance leads away from.",
        examples=["noise"],
    )
    seed: int | None = Field(None, ge=-1, le=MAX_SEED, description="Left out or -1: random.", examples=[42])
    response_format: Format = Field("wav", validation_alias=_FORMAT_NAMES, description="Of the file.", examples=["wav"])

    def song(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt, "lyrics": self.lyrics, "vocal_language": self.vocal_language,
            "audio_duration": self.duration, "inference_steps": self.steps, "guidance_scale": self.cfg,
            "lm_negative_prompt": self.negative_prompt, "audio_format": self.response_format,
            "seed": self.seed, "use_random_seed": self.seed in (None, -1),
        }  # fmt: skip

    def ignored(self) -> tuple[str, ...]:
        return ("audio_start", "speed", "stream", "user", "extra_params")


class SpeechBody(SoundBody):
    """As OpenAI has it, with what it means where songs are made: there is no voice to choose but that of the description."""

    input: str = Field(
        min_length=1, max_length=MAX_TEXT_CHARS, examples=["<prompt>calm piano</prompt><lyrics>Lights go by</lyrics>"],
        description="Description or lyrics, told apart as the text of a chat is; beside `instructions` lyrics alone.",
    )  # fmt: skip
    instructions: Caption | None = Field(
        None, max_length=MAX_PROMPT_CHARS, description="Description of the music.", examples=["calm piano, soft voice"]
    )
    response_format: Format = Field("mp3", validation_alias=_FORMAT_NAMES, description="Of the file.", examples=["mp3"])
    stream_format: Literal["audio", "sse"] = Field(
        "audio", description="audio: the file; sse: events, each an `AudioEvent`, with the usage in the last one."
    )

    def song(self) -> dict[str, Any]:
        if self.instructions:
            caption, lyrics = self.instructions, self.input
        else:
            caption, lyrics, _ = split_text(self.input)
        return {"prompt": caption, "lyrics": lyrics, "audio_format": self.response_format}

    def ignored(self) -> tuple[str, ...]:
        return ("voice", "speed", "user", "stream")

    def warnings(self) -> list[Adjustment]:
        guessed = "" if self.instructions else split_text(self.input)[2]
        told = [] if not guessed else unknown_fields({"input": "a text without <prompt> and <lyrics>"}, (), guessed)
        return [*super().warnings(), *told]


class SoundGenerationBody(SoundBody):
    """As ElevenLabs (`text`) and LocalAI (`text`, or `caption` and the rest) have it."""

    text: Caption = Field(
        "", max_length=MAX_PROMPT_CHARS, description="Description of the music.", examples=["a soft Bengali love song"]
    )
    caption: Caption = Field(
        "", max_length=MAX_PROMPT_CHARS, description="Goes before `text`.", examples=["funk, disco"]
    )
    lyrics: Lyrics = Field(
        "", max_length=MAX_LYRICS_CHARS, description="Lyrics; empty means instrumental.", examples=["[Verse 1]\nLa la"]
    )
    instrumental: bool = Field(False, description="Nobody sings.", examples=[False])
    duration_seconds: Duration = Field(None, description="Seconds; left out: the planner decides.", examples=[30])
    bpm: Bpm = Field(None, description="Beats per minute; left out: the planner decides.", examples=[120])
    keyscale: Key = Field(None, description="Key; left out: the planner decides.", examples=["Ab major"])
    timesignature: TimeSignature = Field(
        None, description="2, 3, 4 or 6; left out: the planner decides.", examples=["4"]
    )
    language: Language = Field(None, description="Code or name; left out: the planner decides.", examples=["ja"])
    vocal_language: Language = Field(None, description="As `language`, which goes first.", examples=["ja"])
    think: bool = Field(True, description="The planner writes audio codes first.", examples=[True])
    do_sample: bool = Field(True, description="False: the planner always takes the likeliest.", examples=[True])
    response_format: Format = Field(
        "mp3", validation_alias=_FORMAT_NAMES, description="Of the file; `output_format` goes first.", examples=["mp3"]
    )

    @model_validator(mode="after")
    def _something(self) -> SoundGenerationBody:
        if not (self.text.strip() or self.caption.strip()):
            raise ValueError("text: give text or caption")
        return self

    def song(self) -> dict[str, Any]:
        return {
            "prompt": self.caption.strip() or self.text, "lyrics": self.lyrics, "instrumental": self.instrumental,
            "audio_duration": self.duration_seconds, "bpm": self.bpm, "key_scale": self.keyscale,
            "time_signature": self.timesignature, "vocal_language": self.language or self.vocal_language,
            "thinking": self.think, "audio_format": self.response_format,
            "lm_temperature": None if self.do_sample else 0.0,
        }  # fmt: skip

    def ignored(self) -> tuple[str, ...]:
        return ("prompt_influence", "loop")

    def warnings(self) -> list[Adjustment]:
        beside = {"text": self.text} if self.caption.strip() else {}
        return [*super().warnings(), *unknown_fields(beside, (), "caption goes first")]


def read_output_format(value: str | None) -> dict[str, Any]:
    """ElevenLabs' name of a format, such as `mp3_44100_128` (format, Hz, kbit/s), as fields of `/release_task`.

    Raises:
        HTTPException: 400; it is not made here.
    """
    if not value:
        return {}
    match = _OUTPUT.fullmatch(value.strip().lower())
    name = words.readable(words.read_format, match.group(1)) if match else None
    if match is None or name is None:
        raise HTTPException(400, f"output_format: {value[:40]!r} is not made here; one of {', '.join(FORMATS)}")
    rate, kbps = match.group(2), match.group(3)
    if rate not in (None, "48000", "44100"):
        raise HTTPException(400, f"output_format: {rate} Hz is not made here; 48000 or 44100")
    found = {"audio_format": name, "mp3_sample_rate": rate and int(rate), "mp3_bitrate": kbps and int(kbps)}
    return {name: value for name, value in found.items() if value is not None}
