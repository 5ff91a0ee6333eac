"""Songs through clients of other servers' audio routes: one request that waits, and the file as the answer.

What was changed of the request, and everything else there is to know, is in the job: `Location` names it.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Header, HTTPException, Query, Request
from fastapi.responses import Response, StreamingResponse

from acestep.song import AudioFile
from deployments.ingress.acestep.bodies import Body
from deployments.ingress.acestep.results import error_text
from deployments.ingress.acestep.tasks import submit
from deployments.ingress.auth import HeldStream
from deployments.ingress.downloads import SOUND
from deployments.ingress.links import job_path, public
from deployments.ingress.native.waiting import wait_for_end
from deployments.ingress.openai.answers import usage
from deployments.ingress.openai.route import (
    REFUSALS,
    STOPPING,
    Model,
    OpenAIRoute,
    body_of,
    busy,
    caller_of,
    error_body,
    failed_status,
    not_there,
    parse_as,
)
from deployments.ingress.openai.schemas import AudioDelta, AudioDone, AudioEvent, AudioFailed, SpeechUsage
from deployments.ingress.openai.sounds import (
    GenerationBody,
    SoundBody,
    SoundGenerationBody,
    SpeechBody,
    read_output_format,
)
from deployments.ingress.service import Service, Svc, check_idempotency_key
from deployments.jobs.store import SUCCEEDED, Busy, Job
from deployments.jobs.threads import with_files

HEARTBEAT_S = 15.0
CHUNK = 48 << 10  # bytes of a file in one event; three to four make base64
SCHEMAS: dict[str, Any] = {
    "GenerationBody": GenerationBody, "SpeechBody": SpeechBody, "SoundGenerationBody": SoundGenerationBody,
    "AudioEvent": AudioEvent,
}  # fmt: skip
GENERATION = {
    "model": "acestep-v15-turbo",
    "prompt": "warm acoustic folk, gentle voice",
    "lyrics": "[verse]\nLights go by",
    "duration": 60,
}
OMNI = {"input": "calm piano, rain", "audio_length": 30}
SPEECH = {"model": "acestep-v15-turbo", "input": "calm piano, rain", "voice": "alloy"}
SOUND_GENERATION = {"model_id": "acestep-v15-turbo", "text": "a soft Bengali love song", "duration_seconds": 60}
LOCATION: dict[str, Any] = {"description": "The job.", "schema": {"type": "string"}}
FILE: dict[str, Any] = {"description": "The song", "headers": {"Location": LOCATION}, "content": SOUND}
_EVENTS: dict[str, Any] = {
    "type": "string",
    "description": "With `stream_format` sse: lines `data:`, each an `AudioEvent`; comments between.",
    "contentMediaType": "text/event-stream",
    "contentSchema": {"type": "array", "items": {"$ref": "#/components/schemas/AudioEvent"}},
}
Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key", description="The same key and body again give the same song; another body is refused."
    ),
]

router = APIRouter(prefix="/v1", tags=["audio"], responses=REFUSALS, route_class=OpenAIRoute)


@router.post(
    "/audio/generations", summary="A song as a file, as lemonade's clients ask for it", response_class=Response,
    openapi_extra=body_of(GenerationBody, GENERATION), responses={200: FILE},
)  # fmt: skip
async def create_audio_generation(request: Request, service: Svc, idempotency_key: Key = None) -> Response:
    return await _song(request, service, GenerationBody, idempotency_key)


@router.post(
    "/audio/generate", summary="A song as a file, as vLLM-Omni's clients ask for it", response_class=Response,
    openapi_extra=body_of(GenerationBody, OMNI), responses={200: FILE},
)  # fmt: skip
async def generate_audio(request: Request, service: Svc, idempotency_key: Key = None) -> Response:
    return await _song(request, service, GenerationBody, idempotency_key)


@router.post(
    "/audio/speech", summary="A song as a file or as events, as OpenAI's clients ask for speech", response_class=Response,
    openapi_extra=body_of(SpeechBody, SPEECH),
    responses={200: {**FILE, "content": {**SOUND, "text/event-stream": {"schema": _EVENTS}}}},
)  # fmt: skip
async def create_speech(request: Request, service: Svc, idempotency_key: Key = None) -> Response:
    return await _song(request, service, SpeechBody, idempotency_key)


@router.post(
    "/sound-generation", summary="A song as a file, as LocalAI's and ElevenLabs' clients ask for it", response_class=Response,
    openapi_extra=body_of(SoundGenerationBody, SOUND_GENERATION), responses={200: FILE},
)  # fmt: skip
async def generate_sound(
    request: Request, service: Svc, idempotency_key: Key = None,
    output_format: Annotated[
        str | None, Query(max_length=40, description="As ElevenLabs names them: format, Hz, kbit/s.", examples=["mp3_44100_128"])
    ] = None,
) -> Response:  # fmt: skip
    return await _song(request, service, SoundGenerationBody, idempotency_key, read_output_format(output_format))


async def _song(
    request: Request,
    service: Service,
    model: type[Model],
    idempotency_key: str | None,
    more: dict[str, Any] | None = None,
) -> Response:
    """The song that a body of this model asks for, with `more` fields of `/release_task`."""
    caller = await caller_of(request, service)
    body = parse_as(model, await request.body(), request.headers.get("content-type", ""))
    assert isinstance(body, SoundBody)
    fields = {**body.fields(), **(more or {})}
    with contextlib.ExitStack() as place:
        place.enter_context(service.waiting.hold(caller.name))
        try:
            job = await submit(
                service,
                caller,
                Body(fields),
                idempotency_key=check_idempotency_key(idempotency_key),
                warnings=body.warnings(),
            )
        except Busy as error:
            return busy(service, error)
        headers = {"Location": public(job_path(job.id)), "Cache-Control": "no-store"}
        if getattr(body, "stream_format", None) == "sse":
            frames = _events(service, job)
            headers["X-Accel-Buffering"] = "no"
            return HeldStream(frames, place.pop_all(), media_type="text/event-stream", headers=headers)
        job = await wait_for_end(service, job, service.args.chat_timeout_s, to_the_end=True)
        if not job.ended:
            raise not_there(service, job)
        file = _file_of(job)
        headers["Content-Length"] = str(file.bytes)
        headers["Content-Disposition"] = f'inline; filename="{job.id}-0.{file.path.rpartition(".")[2]}"'
        content = service.storage.stream(file.path, 0, file.bytes)
        return StreamingResponse(content, media_type=file.content_type, headers=headers)


def _file_of(job: Job) -> AudioFile:
    """The file of a job's song.

    Raises:
        HTTPException: it has none.
    """
    if job.state != SUCCEEDED:
        raise HTTPException(failed_status(job), error_text(job))
    if job.result is None or not job.result.items[0].files:
        raise HTTPException(400, "what was asked for makes no audio; /release_task and /v1/plans answer it")
    return job.result.items[0].files[0]


def _read(service: Service, file: AudioFile, start: int) -> bytes:
    return b"".join(service.storage.stream(file.path, start, min(start + CHUNK, file.bytes)))


async def _events(service: Service, job: Job) -> AsyncIterator[bytes]:
    """The song's file in pieces, and what it counts for."""
    notices = service.dispatcher.notices

    def frame(event: AudioDelta | AudioDone | AudioFailed) -> bytes:
        return f"data: {event.model_dump_json()}\n\n".encode()

    try:
        yield b": your song is in the queue\n\n"
        while not (job := await wait_for_end(service, job, HEARTBEAT_S, to_the_end=True)).ended and not notices.over:
            yield b": still here\n\n"
        try:
            if not job.ended:
                raise HTTPException(504, STOPPING)
            file = _file_of(job)
        except HTTPException as error:
            yield frame(AudioFailed(type="error", error=error_body(error.status_code, str(error.detail))))
            return
        for start in range(0, file.bytes, CHUNK):
            data = await with_files(_read, service, file, start)
            yield frame(AudioDelta(type="speech.audio.delta", audio=base64.b64encode(data).decode()))
        counts = usage(job)
        told = SpeechUsage(
            input_tokens=counts.prompt_tokens, output_tokens=counts.completion_tokens, total_tokens=counts.total_tokens
        )
        yield frame(AudioDone(type="speech.audio.done", usage=told))
    finally:
        if not job.ended and service.args.cancel_with_stream and not notices.over:  # the client went away
            await asyncio.shield(service.dispatcher.cancel(job.id))
