"""What the native API answers, typed: the reference in the OpenAPI document, and what every answer is checked against."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from acestep.lineage import Lineage
from acestep.lm.work import Sample
from acestep.plan import Metadata, Plan, PlannerScores, PlanTimings
from acestep.request import Adjustment, Text
from acestep.song import LyricScores, Progress, RenderTimings, SidecarKind, StageName, TimedLyrics
from deployments.jobs.songs import MAX_LABEL, MAX_LABELS, MAX_TITLE

State = Literal["queued", "running", "succeeded", "failed", "cancelled"]
Ended = Literal["succeeded", "failed", "cancelled"]
Kind = Literal["song", "plan", "codes", "understand", "lyrics"]


class Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class JobError(BaseModel):
    """Why a job has no result. What belongs to its type (`field`, `limit`, ...) stands beside these."""

    model_config = ConfigDict(extra="allow", frozen=True)
    type: str = Field(description="One of the stable types, such as limit_exceeded, as problem bodies have them.")
    message: str = Field(description="One or two sentences: what is wrong and what to do.")


class Cost(Answer):
    """What a job asks for."""

    audio_s: float = Field(description="Seconds of audio, over all items; 0 for other jobs than songs.")
    plan_s: float = Field(description="Estimated seconds of planner work.")
    render_s: float = Field(description="Estimated seconds of renderer work.")


class DeviceSeconds(Answer):
    """Seconds of a job's own on the devices."""

    plan: float = Field(description="On the planner's card.")
    render: float = Field(description="On the renderer's card.")


class Usage(Answer):
    """What an ended job used."""

    audio_s: float = Field(description="Seconds of audio that were made, over all items.")
    device_s: DeviceSeconds = Field(description="Seconds on the devices, by stage.")
    total_s: float = Field(description="Seconds from its submission to its end.")


class Placement(Answer):
    """Where a job goes, or went; null before that is decided and where the stage is not needed."""

    planner: str | None = Field(description="The planner's pool.")
    renderer: str | None = Field(description="The renderer's pool.")


class Audio(Answer):
    """One file of a song."""

    format: str = Field(description="As asked for in `formats`.")
    content_type: str = Field(description="Its MIME type.")
    bytes: int = Field(description="Its size.")
    sha256: str = Field(description="Checksum of the file, in hexadecimal digits.")
    url: str = Field(description="Path of the file, signed: works without a key until it expires.")


class File(Answer):
    """A file beside the audio of a song."""

    kind: SidecarKind = Field(
        description="`latent`: what the sound was decoded from (safetensors); `lrc` and `lyrics`: when lines and words are sung (LRC, JSON)."
    )
    content_type: str = Field(description="Its MIME type.")
    bytes: int = Field(description="Its size.")
    sha256: str = Field(description="Checksum of the file, in hexadecimal digits.")
    url: str = Field(description="Path of the file, signed: works without a key until it expires.")


class Item(Answer):
    """One song of a job."""

    index: int = Field(description="Which of the batch, from 0.")
    seed: int = Field(description="The renderer's seed.")
    lm_seed: int | None = Field(
        description="With `seed` and the same request, what makes this item again alone; null where no planner ran."
    )
    retake_seed: int | None = Field(description="Of its other noise (`retake_variance`); null where there was none.")
    duration: float = Field(description="Seconds, exact: samples / sample_rate.")
    samples: int = Field(description="Samples per channel.")
    sample_rate: int = Field(description="Samples per second.")
    channels: int = Field(description="2: stereo.")
    gain_db: float | None = Field(description="What the whole song was turned up by after it was made.")
    made_gain_db: float | None = Field(
        description="Where source audio is kept around a window: what the window alone was turned up by, so as not to clip."
    )
    audio: list[Audio] = Field(description="The song in every format that was asked for; none of kind `lyrics`.")
    files: list[File] = Field(description="Its latents, where the renderer keeps them, and its timed lyrics.")
    scores: LyricScores | None = Field(description="How well the lyrics can be heard, where `score` asked for it.")
    planner_scores: PlannerScores | None = Field(
        description="How well its audio codes tell the planner what it was to be, where `score` asked for it and the planner wrote them."
    )


class Timings(Answer):
    """Wall seconds by stage."""

    plan: PlanTimings = Field(description="Inside the planner.")
    render: RenderTimings = Field(description="Inside the renderer.")


class SongResult(Answer):
    """What a song's job made."""

    items: list[Item] = Field(
        description="One per song of the batch; with `ranked` the best first, by its `dit_score`."
    )
    renderer: str = Field(description="The renderer's checkpoint.")
    renderer_hash: str | None = Field(description="Checksum of its weights, where it is known.")
    device: str | None = Field(description="The card that rendered it.")
    settings: dict[str, Any] = Field(description="Steps, shift, guidance and other settings by name, as used.")
    timings: Timings = Field(description="How long it took.")


class TextResult(Answer):
    """What a job of kind `codes` or `understand` found."""

    codes: list[int] = Field(description="Audio codes of its source, 5 per second.")
    sample: Sample | None = Field(None, description="The description, of kind `understand`.")


class Links(Answer):
    """Paths of the job."""

    self: str = Field(description="This view. Needs the key.")
    events: str = Field(description="Its events, signed: works without a key until it expires.")
    live: list[str] = Field(
        default_factory=list,
        description="Its songs' sound while they are made, signed, by index; `&format=` mp3 (the default), opus or wav. Empty where there is none to be.",
    )


class JobView(Answer):
    """A job: where it stands, what it costs and, once done, its result."""

    id: str = Field(description="Names the job in every path.")
    title: str | None = Field(None, description="What its owner calls it.")
    favourite: bool = Field(False, description="Its owner likes it.")
    labels: list[str] = Field(default_factory=list, description="Its owner's own words to find it by.")
    kind: Kind = Field(
        description="`song`; `plan` stops after the planner; `codes` and `understand` are ACE-Step's tasks that make no song; `lyrics` listens to one that is made."
    )
    of: str | None = Field(description="Of kind `lyrics`: the job whose songs it listens to.")
    state: State = Field(
        description="`queued` (also between planner and renderer of a job that is taken up again), `running`, or one of the three in which it ends and stays."
    )
    stage: StageName | Ended = Field(
        description="What is done for it now: more exact than `state`, and the same once it has ended."
    )
    progress: Progress | None = Field(
        description="How far its stage is; null while nothing is known of it and after the end."
    )
    position: int = Field(description="Its place in the queue, 1 for the next; 0 where it does not wait.")
    eta_s: float | None = Field(description="Estimated seconds until its end; null where unknown, and after the end.")
    cost: Cost = Field(description="What it asks for, estimated at its submission.")
    usage: Usage | None = Field(description="What it used; null before its end.")
    created_at: float = Field(description="Unix seconds of its submission.")
    started_at: float | None = Field(description="Unix seconds at which work on it began; null before.")
    finished_at: float | None = Field(description="Unix seconds of its end; null before.")
    cancel_requested: bool = Field(
        description="Its caller wants no more: it is cancelled, or will be as soon as its card lets go."
    )
    attempts: int = Field(
        description="How often it was begun; more than 1 after a router was lost. Other stages that are done again: events `requeued`."
    )
    placement: Placement = Field(description="The pools that work on it.")
    request: dict[str, Any] = Field(
        description="The request, as `POST /v1/music` takes it, with its seed drawn and what was changed; defaults are left out."
    )
    lineage: Lineage | None = Field(None, description="The songs that it is made from; null where there are none.")
    seeds: list[int] = Field(description="The renderer's seed of each item.")
    warnings: list[Adjustment] = Field(description="What was changed of the request or has no effect, and why.")
    plan: Plan | None = Field(description="What the planner decided; may be edited and sent as `plan`. Null before.")
    error: JobError | None = Field(description="Why it failed or was cancelled; null for all others.")
    result: SongResult | TextResult | None = Field(description="What was made; null before its end, and for plans.")
    links: Links = Field(description="Paths to go on with.")
    notice: str | None = Field(
        None, description="What is to be known of the checkpoints, such as that they make noise."
    )


class Quote(Answer):
    """What a song would become and take, if it were asked for now."""

    position: int | None = Field(description="Its place in the queue, 1 for the next; null where that is not known.")
    wait_s: float | None = Field(description="Estimated seconds until work on it begins; null where unknown.")
    eta_s: float | None = Field(description="Estimated seconds until its end; null where unknown.")
    cost: Cost = Field(description="What it asks for.")
    placement: Placement = Field(description="The pools that would work on it.")
    request: dict[str, Any] = Field(
        description="The request after what would be changed of it; defaults and seeds are left out."
    )
    warnings: list[Adjustment] = Field(description="What would be changed of the request or has no effect, and why.")


class JobPage(Answer):
    """Jobs, newest first."""

    jobs: list[JobView] = Field(description="At most `limit`.")
    next: str | None = Field(description="`cursor` of the next page; null on the last.")


class ShortAudio(Answer):
    """One file of a song."""

    index: int = Field(description="Which of the batch, from 0.")
    format: str = Field(description="As asked for in `formats`.")
    url: str = Field(description="Path of the file, signed: works without a key until it expires.")


class JobShort(Answer):
    """A job in few words, for lists. What is null or empty is left out."""

    id: str = Field(description="Names the job in every path.")
    kind: Kind = Field(description="As in the whole view.")
    state: State = Field(description="As in the whole view.")
    stage: StageName | None = Field(None, description="What is done for it now; left out once it has ended.")
    progress: Progress | None = Field(None, description="How far its stage is.")
    position: int | None = Field(None, description="Its place in the queue, 1 for the next.")
    eta_s: float | None = Field(None, description="Estimated seconds until its end.")
    title: str | None = Field(None, description="What its owner calls it.")
    favourite: bool = Field(False, description="Its owner likes it.")
    labels: list[str] = Field(default_factory=list, description="Its owner's own words.")
    prompt: str | None = Field(None, description="The first 200 characters of its description.")
    task: str | None = Field(None, description="What is done; left out for text2music.")
    duration: float | None = Field(None, description="Seconds of its first song.")
    bpm: int | None = Field(None, description="Tempo.")
    key_scale: str | None = Field(None, description="Key.")
    created_at: float = Field(description="Unix seconds of its submission.")
    finished_at: float | None = Field(None, description="Unix seconds of its end.")
    cancel_requested: bool = Field(False, description="Its caller wants no more.")
    error: str | None = Field(None, description="Why it failed, the first 200 characters.")
    audio: list[ShortAudio] = Field(default_factory=list, description="Its files.")

    @model_serializer(mode="wrap")
    def _few(self, whole: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in whole(self).items() if value not in (None, False, [])}


class ShortPage(Answer):
    """Jobs in few words, newest first."""

    jobs: list[JobShort] = Field(description="At most `limit`.")
    next: str | None = Field(description="`cursor` of the next page; null on the last.")


class JobChanges(BaseModel):
    """What the owner of a job may change; what is left out stays."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    title: Annotated[Text, Field(max_length=MAX_TITLE)] | None = Field(
        None, description="Null: called by its description again."
    )
    favourite: bool = Field(False, description="Liked.")
    labels: Annotated[list[Annotated[Text, Field(min_length=1, max_length=MAX_LABEL)]], Field(max_length=MAX_LABELS)] = Field(
        default_factory=list, description="Own words to find it by."
    )  # fmt: skip


class FileView(Answer):
    """An uploaded file."""

    id: str = Field(description="For `src_audio` and `reference_audio`.")
    kind: Literal["audio", "latent"] = Field(description="`latent`: a song's latents, as `files` of its job have them.")
    name: str = Field(description="As it was uploaded.")
    bytes: int = Field(description="Its size.")
    sha256: str = Field(description="Checksum of the file, in hexadecimal digits.")
    duration: float = Field(description="Seconds of audio.")
    created_at: float = Field(description="Unix seconds of its upload.")
    expires_at: float = Field(description="Unix seconds after which it is deleted, unless a job waits for it.")


class WebhookView(Answer):
    """A message about a job's end, and its delivery."""

    id: str = Field(description="Names the message; the same in every attempt (`webhook-id`).")
    job_id: str = Field(description="The job that ended.")
    url: str = Field(description="Where it goes: the job's `webhook_url`.")
    type: Literal["job.succeeded", "job.failed", "job.cancelled"] = Field(description="What it tells.")
    state: Literal["pending", "delivered", "dead"] = Field(
        description="`dead`: given up, after all attempts or since the receiver answered 410."
    )
    attempts: int = Field(description="How often it was sent.")
    next_at: float | None = Field(description="Unix seconds of the next attempt; null where there is none.")
    last_status: int | None = Field(description="HTTP status of the last answer; null where none came.")
    last_error: str | None = Field(description="What was wrong with the last attempt.")
    created_at: float = Field(description="Unix seconds of the job's end.")
    delivered_at: float | None = Field(description="Unix seconds of its delivery; null before.")


class WebhookList(Answer):
    """Messages, newest first."""

    webhooks: list[WebhookView] = Field(description="At most `limit`.")


class Secret(Answer):
    """What webhooks of your key are signed with."""

    secret: str = Field(description="As libraries for Standard Webhooks take it.")


# -- events of a job


class EventData(Answer):
    """What every event tells."""

    job_id: str = Field(description="The job.")
    at: float = Field(description="Unix seconds.")


class StartedData(EventData):
    """Work on the job began."""

    attempt: int = Field(description="1, or more after a router was lost.")


class PlannedData(EventData, Metadata):
    """The planner is done; with what it decided."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ProgressData(EventData, Progress):
    """How far a stage is."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class EndedData(EventData):
    """The job has ended."""

    error: JobError | None = Field(None, description="Why it failed or was cancelled.")


class _Event(Answer):
    id: int = Field(description="For `Last-Event-ID`.")


class QueuedEvent(_Event):
    """It waits: newly come, or for its stage to be done again, since a machine stopped or failed."""

    event: Literal["queued", "requeued"] = Field(description="What happened.")
    data: EventData = Field(description="As JSON.")


class StartedEvent(_Event):
    """It runs."""

    event: Literal["started"] = Field(description="What happened.")
    data: StartedData = Field(description="As JSON.")


class PlannedEvent(_Event):
    """Its plan is there."""

    event: Literal["planned"] = Field(description="What happened.")
    data: PlannedData = Field(description="As JSON.")


class ProgressEvent(Answer):
    """How far its stage is. Has no id: only the latest is kept."""

    event: Literal["progress"] = Field(description="What happened.")
    data: ProgressData = Field(description="As JSON.")


class EndedEvent(_Event):
    """It has ended: the last event."""

    event: Ended = Field(description="What happened.")
    data: EndedData = Field(description="As JSON.")


JobEvent = Annotated[
    QueuedEvent | StartedEvent | PlannedEvent | ProgressEvent | EndedEvent, Field(discriminator="event")
]


# What no route has as its answer: events, and the file `lyrics`.
SCHEMAS: dict[str, Any] = {"JobEvent": JobEvent, "TimedLyrics": TimedLyrics}
