"""Timed lyrics and scores of songs that are made already."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Body, Response
from pydantic import ConfigDict, Field, model_validator

from acestep.request import SongRequest
from deployments.ingress.auth import Auth
from deployments.ingress.bodies import KeyFirst
from deployments.ingress.errors import PROBLEMS, Conflict
from deployments.ingress.made import why_nothing
from deployments.ingress.native import examples
from deployments.ingress.native.answers import JobView
from deployments.ingress.native.songs import IdempotencyKey, JobId, Prefer, existing, submitted
from deployments.ingress.native.submission import JobOptions
from deployments.ingress.service import Service, Svc
from deployments.jobs.store import SUCCEEDED, Job
from deployments.jobs.threads import with_files

router = APIRouter(prefix="/v1", tags=["songs"], responses=PROBLEMS, route_class=KeyFirst)


class LyricsSubmission(JobOptions):
    """What to listen for in a song."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    timestamps: bool = Field(True, description="When each line and word is sung.")
    score: bool = Field(False, description="How well the lyrics can be heard.")

    @model_validator(mode="after")
    def _check(self) -> LyricsSubmission:
        if not (self.timestamps or self.score):
            raise ValueError("timestamps: ask for timestamps, score or both")
        return self


@router.post(
    "/jobs/{job_id}/lyrics", status_code=202, summary="Tell when the words of a finished song are sung, and how well they are heard",
    responses={202: examples.LYRICS_202, 200: {**examples.LYRICS_200, "model": JobView}},
)  # fmt: skip
async def time_lyrics(
    job_id: JobId, asked: Annotated[LyricsSubmission, Body(openapi_examples=examples.LYRICS)], response: Response, service: Svc, caller: Auth,
    idempotency_key: IdempotencyKey = None, prefer: Prefer = None,
) -> JobView:  # fmt: skip
    """A job of its own, of kind `lyrics`, that works on the latents which the song's job keeps. The song stays as it is."""
    request = await to_listen_to(service, await existing(service, job_id, caller), asked)
    return await submitted(service, caller, request, asked, response, "lyrics", idempotency_key, prefer, of=job_id)


async def to_listen_to(service: Service, job: Job, asked: LyricsSubmission) -> SongRequest:
    """The request that listens to all songs of a job, as they were made.

    Raises:
        Conflict: it has no songs, nobody sings in them, or what is needed is no longer kept.
    """
    song = job.result
    if job.state != SUCCEEDED or song is None or job.kind != "song":
        raise Conflict(why_nothing(job, "songs"), state=job.state)
    if job.request.instrumental:
        raise Conflict("nobody sings in this song: it has no lyrics", state=job.state)
    latents = [next((f.path for f in item.sidecars if f.kind == "latent"), None) for item in song.items]
    paths = [path for path in latents if path is not None]
    if len(paths) != len(latents):
        raise Conflict(
            "this song's latents were not kept; `keep_latents` of the renderer's pool keeps them", state=job.state
        )
    for path in (*paths, *filter(None, [job.request.src_audio]), *job.request.reference_audio):
        if await with_files(service.storage.size, path) is None:
            what = "latents are" if path in paths else "source audio is"
            raise Conflict(f"this song's {what} no longer kept", state=job.state)
    changes = {"plan": song.plan, "model": song.renderer, "latents": tuple(paths), "strict": False}
    return job.request.model_copy(update={**changes, "timestamps": asked.timestamps, "score": asked.score})
