"""What the routes of OpenAI's kind answer, typed: what every answer is made and checked by, and the reference in the OpenAPI document."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from acestep.request import Adjustment

WARNINGS = "What was changed of the request or has no effect, and why; left out where that is nothing."
COMPLETION_ID = "chatcmpl-3f7c3c1e6f0e4a539f0d0f4a"


class Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ErrorBody(Shape):
    """An error as OpenAI's clients read it."""

    message: str = Field(description="What is wrong.", examples=["Invalid request format: messages: is missing"])
    type: str = Field(description="OpenAI's kind of error.", examples=["invalid_request_error"])
    param: str | None = Field(description="Null.", examples=[None])
    code: str | None = Field(description="Null.", examples=[None])


class Refusal(Shape):
    """An error for both kinds of clients."""

    detail: str = Field(description="As ACE-Step's server has it.", examples=["Server busy: queue is full"])
    error: ErrorBody = Field(description="As OpenAI has it.")


class PromptDetails(Shape):
    """Of `prompt_tokens`."""

    cached_tokens: int = Field(description="0.", ge=0, examples=[0])
    audio_tokens: int = Field(description="0: source audio is not counted.", ge=0, examples=[0])


class CompletionDetails(Shape):
    """Of `completion_tokens`."""

    audio_tokens: int = Field(description="All of them.", ge=0, examples=[300])
    reasoning_tokens: int = Field(description="0.", ge=0, examples=[0])


class TokenUsage(Shape):
    """What a song counts for, in the units that gateways bill by. The job's own `usage` has the seconds on the devices."""

    prompt_tokens: int = Field(ge=0, description="A quarter of the characters of description and lyrics.", examples=[9])
    completion_tokens: int = Field(ge=0, description="Five per second of audio, over all songs.", examples=[300])
    total_tokens: int = Field(ge=0, description="Both.", examples=[309])
    prompt_tokens_details: PromptDetails = Field(description="What `prompt_tokens` are.")
    completion_tokens_details: CompletionDetails = Field(description="What `completion_tokens` are.")
    audio_seconds: float = Field(ge=0, description="Seconds of audio that were made, over all songs.", examples=[60.0])


class AudioLink(Shape):
    """Where the audio is."""

    url: str = Field(
        description="Data URL, or a signed URL, which works without a key until it expires.",
        examples=["data:audio/mpeg;base64,SUQz"],
    )


class AudioPart(Shape):
    """One song."""

    type: Literal["audio_url"] = Field(description="`audio_url`.")
    audio_url: AudioLink = Field(description="Where it is.")
    seed: int = Field(ge=0, description="Its seed.", examples=[1234])
    lm_seed: int | None = Field(
        description="With `seed`, what makes it again alone; null: no planner ran.", examples=[1234]
    )
    retake_seed: int | None = Field(description="Of its other noise; null where there was none.", examples=[None])


class ChatMessage(Shape):
    """A song as a chat's message."""

    role: Literal["assistant"] = Field(description="`assistant`.")
    content: str = Field(
        description="Markdown: what the song is, with a link to each, and its lyrics.",
        examples=[
            "## Metadata\n**Caption:** calm piano\n**Audio:** [mp3, 60 s](http://127.0.0.1:8000/v1/jobs/3f7c/audio/0.mp3)"
        ],
    )
    audio: list[AudioPart] | None = Field(description="Every song of the batch; null where a job makes none.")
    audio_codes: str | None = Field(description="Null.", examples=[None])


class Choice(Shape):
    """The only one."""

    index: Literal[0] = Field(description="0.")
    message: ChatMessage = Field(description="The song.")
    finish_reason: Literal["stop"] = Field(description="`stop`.")


class ChatCompletion(Shape):
    """A song as the answer of a chat."""

    id: str = Field(description="Of the answer.", examples=[COMPLETION_ID])
    object: Literal["chat.completion"] = Field(description="`chat.completion`.")
    created: int = Field(description="Unix seconds.", examples=[1790000000])
    model: str = Field(description="As it was sent.", examples=["acestep/acestep-v15-turbo"])
    choices: list[Choice] = Field(description="One.")
    usage: TokenUsage = Field(description="What it counts for.")
    warnings: list[Adjustment] | None = Field(None, description=WARNINGS)


class Delta(Shape):
    """What a chunk adds; what it does not is left out."""

    role: Literal["assistant"] | None = Field(None, description="In the first.", examples=["assistant"])
    content: str | None = Field(None, description="Text; a dot while the song is not there.", examples=["."])
    audio: list[AudioPart] | None = Field(None, description="All songs at once.")


class ChunkChoice(Shape):
    """The only one."""

    index: Literal[0] = Field(description="0.")
    delta: Delta = Field(description="What is added.")
    finish_reason: Literal["stop", "error"] | None = Field(description="In the last; null before.")


class ChatChunk(Shape):
    """An event of a chat's stream."""

    id: str = Field(description="Of the answer.", examples=[COMPLETION_ID])
    object: Literal["chat.completion.chunk"] = Field(description="`chat.completion.chunk`.")
    created: int = Field(description="Unix seconds.", examples=[1790000000])
    model: str = Field(description="As it was sent.", examples=["acestep/acestep-v15-turbo"])
    choices: list[ChunkChoice] = Field(description="One; none beside the usage.")
    usage: TokenUsage | None = Field(
        None, description="In one of its own at the end, where `stream_options` asks for it."
    )
    warnings: list[Adjustment] | None = Field(None, description="Beside the text. " + WARNINGS)


class AudioDelta(Shape):
    """Some more of a song's file."""

    type: Literal["speech.audio.delta"] = Field(description="`speech.audio.delta`.")
    audio: str = Field(description="Base64 of the next bytes.", examples=["SUQzBAAAAAAA"])


class SpeechUsage(Shape):
    """As `TokenUsage`, under the names of this event."""

    input_tokens: int = Field(ge=0, description="As `prompt_tokens`.", examples=[9])
    output_tokens: int = Field(ge=0, description="As `completion_tokens`.", examples=[300])
    total_tokens: int = Field(ge=0, description="Both.", examples=[309])


class AudioDone(Shape):
    """The file is complete."""

    type: Literal["speech.audio.done"] = Field(description="`speech.audio.done`.")
    usage: SpeechUsage = Field(description="What it counts for.")


class AudioFailed(Shape):
    """There is no song."""

    type: Literal["error"] = Field(description="`error`.")
    error: ErrorBody = Field(description="Why.")


AudioEvent = AudioDelta | AudioDone | AudioFailed
