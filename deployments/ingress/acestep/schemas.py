"""What ACE-Step's own API answers, typed: what every answer is made and checked by, and the reference in the OpenAPI document."""

from __future__ import annotations

from typing import Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from acestep.request import Adjustment

T = TypeVar("T")
TASK_ID = "3f7c3c1e-6f0e-4a53-9f0d-0f4a7a3f1b52"
WARNINGS = "What was changed of the request or has no effect, and why; left out where that is nothing."


class Shape(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Envelope(Shape, Generic[T]):
    """What ACE-Step's answers come in. With a `code` that is not 200 it is an error, though the HTTP status is 200."""

    data: T | None = Field(description="The answer; null beside an error.")
    code: int = Field(ge=200, le=599, description="200, or what the HTTP status of the error would be.", examples=[200])
    error: str | None = Field(description="What is wrong; null where nothing is.", examples=[None])
    timestamp: int = Field(description="Unix milliseconds of the answer.", examples=[1790000000000])
    extra: None = Field(description="Null.", examples=[None])


class DetailEntry(Shape):
    """A parameter that is wrong."""

    type: str = Field(description="`value_error`.", examples=["value_error"])
    loc: list[str] = Field(description="Where it stood, and its name.", examples=[["query", "path"]])
    msg: str = Field(description="What is wrong with it.", examples=["is missing"])


class Detail(Shape):
    """An error as ACE-Step's server writes it."""

    detail: str | list[DetailEntry] = Field(description="What is wrong.", examples=["unknown task_id"])


# -- jobs


class ReleasedTask(Shape):
    """A job that was accepted."""

    task_id: str = Field(description="Names the job.", examples=[TASK_ID])
    status: Literal["queued"] = Field(description="`queued`.")
    queue_position: int = Field(ge=1, description="Its place in the queue, 1 for the next.", examples=[3])
    warnings: list[Adjustment] | None = Field(None, description=WARNINGS)


class CancelledTask(Shape):
    """A job after its cancellation was asked for."""

    task_id: str = Field(description="The job.", examples=[TASK_ID])
    status: Literal["cancelling", "cancelled", "succeeded", "failed"] = Field(
        description="`cancelling`: as soon as its card lets go; `succeeded` and `failed`: it had ended before."
    )


class _Entry(Shape):
    file: str = Field(description="URL of the audio, relative to this server; empty before its end.", examples=[""])
    wave: str = Field(description="Empty.", examples=[""])
    status: Literal[0, 1, 2] = Field(description="0 queued or running, 1 succeeded, 2 failed or cancelled.")
    create_time: int = Field(description="Unix seconds of its submission.", examples=[1790000000])
    env: str = Field(description="`development`.", examples=["development"])


class TaskMetas(Shape):
    """The song in numbers; `N/A` where nothing is known."""

    bpm: int | str = Field(description="Beats per minute.", examples=[92])
    duration: float | str = Field(description="Seconds.", examples=[60.0])
    genres: str = Field(description="`N/A`.", examples=["N/A"])
    keyscale: str = Field(description="Key.", examples=["A minor"])
    timesignature: str = Field(description="2, 3, 4 or 6.", examples=["4"])
    prompt: str = Field(description="The description as it was sent.", examples=["calm piano"])
    lyrics: str = Field(description="The lyrics as they were sent.", examples=[""])


class NoMetas(Shape):
    """Nothing yet."""


class QueuedEntry(_Entry):
    """Of a job that waits."""

    prompt: str = Field(description="Empty.", examples=[""])
    lyrics: str = Field(description="Empty.", examples=[""])
    metas: NoMetas = Field(description="Empty.")
    progress: float = Field(ge=0, le=1, description="0.", examples=[0.0])
    stage: Literal["queued"] = Field(description="`queued`.")
    error: None = Field(description="Null.", examples=[None])


class RunningEntry(_Entry):
    """Of a job that runs."""

    progress: float = Field(ge=0, le=1, description="Share of its way, 0 to 1.", examples=[0.42])
    stage: Literal["running", "queued", "planning", "planned", "rendering", "decoding", "encoding"] = Field(
        description="What is done for it now; `running`: not known yet."
    )


class FailedEntry(_Entry):
    """Of a job that failed or was cancelled, and of one that does not exist."""

    progress: float = Field(ge=0, le=1, description="0.", examples=[0.0])
    stage: Literal["failed"] = Field(description="`failed`.")
    error: str = Field(description="Why, in one line.", examples=["unknown task_id"])


class DoneEntry(_Entry):
    """Of a song that is there, or of metadata without one."""

    prompt: str = Field(description="The description that was rendered.", examples=["Calm piano, slow and warm"])
    lyrics: str = Field(description="The lyrics that were sung.", examples=["[Instrumental]"])
    metas: TaskMetas = Field(description="The song in numbers.")
    generation_info: str = Field(description="Markdown: where the time went.", examples=["- **Denoising:** 2.40 s"])
    seed_value: str = Field(description="All seeds of the job, separated by commas.", examples=["1234,1235"])
    lm_model: str = Field(description="Planner checkpoint; empty where none ran.", examples=["acestep-5Hz-lm-0.6B"])
    dit_model: str = Field(description="Renderer checkpoint.", examples=["acestep-v15-turbo"])
    progress: float = Field(ge=0, le=1, description="1.", examples=[1.0])
    stage: Literal["succeeded"] = Field(description="`succeeded`.")


class SongEntry(DoneEntry):
    """One song of a job."""

    url: str = Field(description="As `file`.", examples=["/v1/audio?path=%2Fsongs%2F3f7c3c1e%2F0.mp3"])
    seed: int = Field(ge=0, description="Its own seed.", examples=[1234])
    lm_seed: int | None = Field(
        description="With `seed`, what makes this song again alone; null where no planner ran.", examples=[1234]
    )
    retake_seed: int | None = Field(
        description="Of its other noise (`retake_variance`); null where there was none.", examples=[None]
    )
    warnings: list[Adjustment] | None = Field(None, description=WARNINGS)


class CodesEntry(Shape):
    """Of `extract_codes_only`."""

    status_message: str = Field(description="What was done.", examples=["Audio Codes Extraction Success"])
    audio_codes: str = Field(description="As the planner writes them.", examples=["<|audio_code_35847|>"])
    audio_paths: list[str] = Field(max_length=0, description="Empty.", examples=[[]])
    raw_audio_paths: list[str] = Field(max_length=0, description="Empty.", examples=[[]])
    first_audio_path: None = Field(description="Null.", examples=[None])
    metas: NoMetas = Field(description="Empty.")


class AnalysisMetas(Shape):
    """Audio in numbers; `N/A` where nothing is known."""

    bpm: int | str = Field(description="Beats per minute.", examples=[92])
    keyscale: str = Field(description="Key.", examples=["A minor"])
    timesignature: str = Field(description="2, 3, 4 or 6.", examples=["4"])
    duration: float | str = Field(description="Seconds.", examples=[60.0])


class AnalysisEntry(AnalysisMetas):
    """Of `full_analysis_only`."""

    status_message: str = Field(description="What was done.", examples=["Full Hardware Analysis Success"])
    genre: str = Field(description="`N/A`.", examples=["N/A"])
    prompt: str = Field(description="Description.", examples=["Calm piano, slow and warm"])
    lyrics: str = Field(description="Lyrics.", examples=["[Instrumental]"])
    language: str = Field(description="Code of the lyrics' language, or `unknown`.", examples=["en"])
    metas: AnalysisMetas = Field(description="The numbers once more.")
    audio_paths: list[str] = Field(max_length=0, description="Empty.", examples=[[]])
    audio_codes: str = Field(description="As the planner writes them.", examples=["<|audio_code_35847|>"])


TaskEntry = QueuedEntry | RunningEntry | FailedEntry | SongEntry | DoneEntry | CodesEntry | AnalysisEntry


class TaskState(Shape):
    """Where a job stands."""

    task_id: str = Field(description="The job.", examples=[TASK_ID])
    result: str = Field(
        description="JSON text of an array of `TaskEntry`: one of a job under way, one for each song of one that has ended.",
        examples=["[]"],
        json_schema_extra={
            "contentMediaType": "application/json",
            "contentSchema": {"type": "array", "items": {"$ref": "#/components/schemas/TaskEntry"}},
        },
    )
    status: Literal[0, 1, 2] = Field(description="0 queued or running, 1 succeeded, 2 failed, cancelled or unknown.")
    progress_text: str | None = Field(
        None, description="What is done now, in words; left out where `unknown_task: queued` hides an unknown id.",
        examples=["Rendering: 3 of 8 steps"],
    )  # fmt: skip
    error: str | None = Field(
        None, description="Why it failed, in one line; left out where it did not.", examples=["unknown task_id"]
    )


# -- texts


class FormattedSong(Shape):
    """A description that was written anew."""

    caption: str = Field(description="Description of the music.", examples=["Slow, sad piano ballad with strings"])
    lyrics: str = Field(description="Lyrics.", examples=["[Verse]\nThe lights go out"])
    bpm: int | None = Field(description="Beats per minute; null: none was found.", examples=[72])
    key_scale: str = Field(description="Key; may be empty.", examples=["D minor"])
    time_signature: str = Field(description="2, 3, 4 or 6; may be empty.", examples=["4"])
    duration: float | None = Field(description="Seconds; null: none was found.", examples=[150.0])
    vocal_language: str = Field(description="Code of the lyrics' language, or `unknown`.", examples=["en"])
    warnings: list[Adjustment] | None = Field(None, description=WARNINGS)


class CreatedSample(Shape):
    """A song that was thought up."""

    caption: str = Field(description="Description of the music.", examples=["Slow, sad piano ballad with strings"])
    lyrics: str = Field(description="Lyrics.", examples=["[Verse]\nThe lights go out"])
    bpm: int | None = Field(description="Beats per minute; null: none was found.", examples=[72])
    keyscale: str = Field(description="Key; may be empty.", examples=["D minor"])
    duration: float | None = Field(description="Seconds; null: none was found.", examples=[150.0])
    timesignature: str = Field(description="2, 3, 4 or 6; may be empty.", examples=["4"])
    vocal_language: str = Field(description="Code of the lyrics' language, or `unknown`.", examples=["en"])
    warnings: list[Adjustment] | None = Field(None, description=WARNINGS)


class SimpleSample(Shape):
    """An example of a wish."""

    description: str = Field(description="For `sample_query`.", examples=["a lullaby with music box"])
    instrumental: bool = Field(description="Nobody sings.", examples=[False])
    vocal_language: str = Field(description="Code, or `unknown`.", examples=["en"])


class CustomSample(Shape):
    """An example of a whole song."""

    think: bool = Field(description="For `thinking`.", examples=[True])
    caption: str = Field(description="For `prompt`.", examples=["Warm indie folk with finger-picked guitar"])
    lyrics: str = Field(description="For `lyrics`.", examples=["[Verse 1]\nI left the porch light burning low"])
    bpm: int = Field(ge=30, le=300, description="Beats per minute.", examples=[92])
    duration: int = Field(ge=10, le=600, description="Seconds.", examples=[150])
    keyscale: str = Field(description="For `key_scale`.", examples=["G major"])
    language: str = Field(description="For `vocal_language`.", examples=["en"])
    timesignature: str = Field(description="For `time_signature`.", examples=["4"])


RandomSample = SimpleSample | CustomSample
